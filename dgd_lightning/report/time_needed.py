"""How long a whole data set takes, from the seconds that a part of it took.

    python -m dgd_lightning.report.time_needed logs/clbench_dev/version_0 --tasks 1899 --contexts 500 --devices 8

Seconds of a batch are shared out among its rows by the tokens that each decoded; they are those of one device. The last
groups, during which some devices have nothing left to do, and loading the model are not in them.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from dgd_lightning.checks import check_integer
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.clustered import NAN, Difference, clustered_mean, counted, shown
from dgd_lightning.report.print_tables import new_table, plain_console, print_tables
from dgd_lightning.run_folder import PREDICTIONS, batch_share, rows_so_far

ADAPTING = ("ttt_prefill_seconds", "ttt_validation_seconds", "ttt_fit_seconds")


class Needed(NamedTuple):
    """What one part of a run takes."""

    part: str  # an arm, or adapting
    measured: int  # answered tasks; for adapting contexts
    tokens: float  # new ones per task; NaN for adapting
    speed: float  # new tokens per second and device, prefill and ranking included
    seconds: Difference  # per task or context, 95% interval over contexts


def needed(rows: Iterable[dict[str, Any]]) -> list[Needed]:
    """Seconds per task of every arm, in the rows' order, and per context of adapting; skipped rows do not count."""
    arms: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    adapted: dict[str, float] = {}  # seconds, by context
    for row in rows:
        record = row["dgd"]
        if "skipped" in record:
            continue
        context = str((row.get("metadata") or {}).get("context_id", row["idx"]))
        arms[record["arm"]][context].append((record["tokens"], _seconds(record)))
        if record.get(ADAPTING[0]) is not None:
            adapted[context] = sum(record.get(name) or 0.0 for name in ADAPTING)
    found = []
    for name, contexts in arms.items():
        tokens = sum(number for tasks in contexts.values() for number, _ in tasks)
        sums = [sum(seconds for _, seconds in tasks) for tasks in contexts.values()]
        counts = [len(tasks) for tasks in contexts.values()]
        speed = tokens / sum(sums) if sum(sums) else NAN
        found.append(Needed(name, sum(counts), tokens / sum(counts), speed, clustered_mean(sums, counts)))
    if adapted:
        each = clustered_mean(list(adapted.values()), [1] * len(adapted))
        found.append(Needed("adapting", len(adapted), NAN, NAN, each))
    return found


def _seconds(record: dict[str, Any]) -> float:
    """A row's share of its batch; of a batch that decoded nothing after the prefill, nothing."""
    shared = record["prefix_seconds"] + record["prefill_seconds"] + record["decode_seconds"]
    return batch_share(record) * shared + record.get("rank_seconds", 0.0)


def table(found: Sequence[Needed], *, tasks: int, contexts: int, devices: int) -> Table:
    """Hours of the whole data on so many devices that work side by side, per part and in total."""
    numbers = ("measured", "new tokens per task", "tokens/s", "seconds each", "hours")
    size = f"{counted(tasks, 'task')} of {counted(contexts, 'context')} on {counted(devices, 'device')}"
    result = new_table(size, ["part"], numbers)
    total = 0.0
    for one in found:
        hours = (contexts if one.part == "adapting" else tasks) / devices / 3600
        total += hours * one.seconds.value
        result.add_row(
            one.part,
            f"{one.measured:,}",
            shown(one.tokens, "{:,.0f}"),
            shown(one.speed, "{:,.1f}"),
            f"{one.seconds.value:,.2f}",
            Difference(*(hours * seconds for seconds in one.seconds)).text("{:,.2f}"),
        )
    result.add_row("sum", "", "", "", "", f"{total:,.2f}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of a run folder, finished or not; 2 on a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m dgd_lightning.report.time_needed", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run folder, such as logs/clbench_dev/version_0")
    parser.add_argument("--tasks", type=int, default=1899, help="of the whole data; default: CL-bench's")
    parser.add_argument("--contexts", type=int, default=500)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args(argv)
    whole = {name: getattr(options, name) for name in ("tasks", "contexts", "devices")}
    try:
        for name, value in whole.items():
            check_integer(name, value)
        found = needed(rows_so_far(options.folder))
        if not found:
            raise InputError(
                "folder",
                expected=f"a run folder of dgd predict with answers in {PREDICTIONS}",
                received=options.folder,
                hint="give the path that the run printed",
            )
    except InputError as error:
        print(f"time_needed: error: {error}", file=sys.stderr)
        return 2
    print_tables(plain_console(), [table(found, **whole)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
