"""What a predict run prints when it ends, one table and a few sentences; the whole of it goes to `summary.txt`.

What guidance changed in solve rates is said by :func:`dgd_lightning.report.solve_rates.verdict`.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dgd_lightning.analysis.adaptation import Gain
from dgd_lightning.analysis.arms import ArmStats, baseline_of, speed_up
from dgd_lightning.files import whole_files
from dgd_lightning.metrics.clustered import FEWEST_CONTEXTS, counted, shown
from dgd_lightning.report.print_tables import WIDTH, plain_console, print_tables
from dgd_lightning.report.run_tables import tasks_of
from dgd_lightning.report.solve_rates import change
from dgd_lightning.report.words import words_of
from dgd_lightning.scoring.graded import Graded, by_arm
from dgd_lightning.scoring.summary import Compared, rates
from dgd_lightning.types import Summary

FILE = "summary.txt"
MOST = 5  # sentences that are printed


def add_decoding(summary: Summary, stats: Mapping[str, ArmStats], total: int) -> None:
    """Sets the columns of the table that decoding fills; ``total``: tasks of the data."""
    for arm in stats.values():
        summary.add_cell(arm.name, "tasks", tasks_of(arm, total))
        summary.add_cell(arm.name, "τ", shown(arm.tau.micro, "{:.2f}"))
        summary.add_cell(arm.name, "tokens/s", shown(arm.tokens_per_second, "{:.1f}"))
        summary.add_cell(arm.name, "speed-up", shown(speed_up(arm, stats), "{:.2f}×"))


def add_solve_rates(summary: Summary, scores: Sequence[Graded], found: Sequence[Compared]) -> None:
    """Sets the columns of the table that grading fills: the rates, and the difference to the arm's baseline."""
    column = words_of(scores).column
    for arm, tasks in by_arm(scores).items():
        found_rates = rates(list(tasks.values()))
        summary.add_cell(arm, column, shown(found_rates.official.value, "{:.1%}"))
        for name, share in (found_rates.lm_eval or {}).items():
            summary.add_cell(arm, name.replace("-", "-\n"), f"{share:.1%}")
    for one in found:
        if not one.versus.control:
            points = change(one.result).replace("none", "+0.0").replace(" [", "\n[")
            if one.versus.other_sampling:  # no arm that could be the baseline has this arm's
                points += f"\nvs {one.versus.base}\n(other sampling)"
            summary.add_cell(one.versus.arm, "points vs\nbaseline", points)


def finish(summary: Summary, folder: Path, *, verbose: bool) -> None:
    """Writes `summary.txt` into the run folder, and prints the summary; its details too where that is asked for."""
    file = Console(file=io.StringIO(), width=WIDTH, markup=False, emoji=False)
    table = [summary_table(summary)] if summary.cells else []
    print_tables(file, [*table, "", *summary.sentences, "", *summary.details, "", *summary.pointers])
    with whole_files(folder, FILE) as scratch:
        text: str = file.file.getvalue()  # type: ignore[attr-defined]
        (scratch / FILE).write_text(text, encoding="utf-8", errors="backslashreplace")
    console = plain_console()
    print_tables(console, [*(summary.details if verbose else ()), *table, ""])
    for sentence in summary.sentences[:MOST]:
        console.print(sentence, highlight=False)
    more = len(summary.sentences) - MOST
    extra = f"{counted(more, 'more sentence')} and all tables" if more > 0 else "all tables"
    pointers = [*summary.pointers, *([] if verbose and more <= 0 else [f"{extra}: {folder / FILE}"])]
    print_tables(console, ["", *pointers])


def summary_table(summary: Summary) -> Table:
    """One line per arm; a cell that nobody has set is a dash."""
    columns = list(dict.fromkeys(column for cells in summary.cells.values() for column in cells))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("arm")
    for column in columns:
        table.add_column(column, justify="right")
    for arm, cells in summary.cells.items():
        table.add_row(arm, *(cells.get(column, "–") for column in columns))
    return table


def speed_sentences(stats: Mapping[str, ArmStats]) -> list[str]:
    """Which arms are lossless and how much faster than their baseline; then which are not, by design."""
    arms = [arm for arm in stats.values() if arm.tasks]
    lossless = [arm for arm in arms if arm.lossless and not arm.baseline]
    guided = [arm for arm in arms if not arm.lossless]
    sentences = []
    if lossless:
        sentences.append(f"Lossless, answers have the target's own distribution: {_speeds(lossless, stats)}.")
    if guided:
        sentences.append(f"Not lossless, another distribution by design: {_speeds(guided, stats)}.")
    if not arms:
        return ["No task was decoded."]
    return sentences or [f"Nothing was compared in speed: only {_listed([arm.name for arm in arms])} decoded tasks."]


def _speeds(arms: Sequence[ArmStats], stats: Mapping[str, ArmStats]) -> str:
    """``a 2.31× and b 2.52× as fast as plain; c, which has no baseline at its sampling``."""
    parts: dict[str, list[str]] = {}
    for arm in arms:
        base, factor = baseline_of(arm, stats), speed_up(arm, stats)
        if base is None:
            parts.setdefault("without a baseline of the same temperature, top_k and top_p", []).append(arm.name)
        elif factor == factor:
            parts.setdefault(f"as fast as {base.name}", []).append(f"{arm.name} {factor:.2f}×")
        else:
            parts.setdefault("without a speed of their own" if arm.shared.tokens else "not timed", []).append(arm.name)
    return "; ".join(f"{_listed(names)} {rest}" for rest, names in parts.items())


def adaptation_sentences(gains: Sequence[Gain], alone: Sequence[str] = ()) -> list[str]:
    """What adaptation changed in τ, in one sentence; none where no arm adapts.

    ``alone``: adapting arms without one that differs in nothing else; named only where there is no gain at all.
    """
    if gains:
        return [f"Adaptation: {'; '.join(map(_gain, gains))}."]
    if alone:
        which = "no arm differs from it" if len(alone) == 1 else "no arms differ from them"
        return [f"What adaptation changed is not known: {_listed(alone)} adapted, but {which} in adaptation alone."]
    return []


def _gain(gain: Gain) -> str:
    tau, against = gain.tau, f"in {gain.arm} against {gain.base}"
    if not tau.contexts:
        return f"nothing was verified {against} in the same context"
    numbers = f"τ {tau.base:.2f} → {tau.tau:.2f}, {tau.ratio.text('{:+.1%}')} over {counted(tau.contexts, 'context')}"
    if tau.contexts < FEWEST_CONTEXTS:
        return f"too few contexts to say what changed {against} ({numbers}; {FEWEST_CONTEXTS} are the least)"
    low, high = tau.difference.low, tau.difference.high
    if tau.difference.value == tau.median.low == tau.median.high == tau.worst == 0:
        return f"τ did not change {against} (τ {tau.tau:.2f} in {counted(tau.contexts, 'context')})"
    changed = "τ rose" if low > 0 else "τ fell" if high < 0 else "no change of τ found"
    return f"{changed} {against} ({numbers})"


def ungraded_sentences(stats: Mapping[str, ArmStats]) -> list[str]:
    """Where nothing is graded: whose answers may be better or worse without anybody knowing."""
    names = [arm.name for arm in stats.values() if not arm.lossless and arm.tasks]
    return [f"Whether {_listed(names)} answered better is not known: no answer is graded yet."] if names else []


def _listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
