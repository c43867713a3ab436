"""What a sweep shows and writes: a table of its best trials, a curve per setting, `trials.csv` and `best.yaml`."""

import csv
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dgd_lightning.report.canvas import empty_figure

TRIALS, BEST = "trials.csv", "best.yaml"
Row = dict[str, Any]  # a trial: its folder, the objective, settings by dotted key
LABEL_WIDTH = 28  # letters of a value's label before it is broken


def leaders(rows: list[Row], objective: str, keys: Sequence[str], count: int = 10) -> Table:
    """The best of the finished trials by the objective, best first, with the settings of these dotted keys."""
    table = Table(title=f"Sweep: the best of {len(rows)} trials", title_justify="left", box=SIMPLE_HEAD)
    names = [key.rpartition(".")[2] for key in keys]
    names = [key if names.count(name) > 1 else name for key, name in zip(keys, names, strict=True)]
    table.add_column("trial", no_wrap=True)
    table.add_column(objective.replace("_", " "), justify="right")
    for key, name in zip(keys, names, strict=True):
        table.add_column(name, no_wrap=not isinstance(rows[0][key], list))
    for row in sorted(rows, key=lambda one: -one[objective])[:count]:
        table.add_row(row["trial"], f"{row[objective]:+.4f}", *(in_words(row[key]) for key in keys))
    return table


def in_words(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def curve(
    rows: list[Row], key: str, objective: str, folder: Path, *, listed: list[Any] | None = None, log: bool = False
) -> Path:
    """Draw the objective over one setting: all trials as dots, and the best of them (at each value, where listed).

    Numbers are along the x axis; other values are below one another, since their names may be long. ``listed``: the
    values it was searched among; None: a range, with a logarithmic axis where ``log`` says so.
    """
    values, scores = [row[key] for row in rows], [row[objective] for row in rows]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed or values)
    turn = 1 if numeric else -1
    labels = [textwrap.fill(in_words(value), LABEL_WIDTH) for value in listed or []]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = empty_figure(6, 3.5 if numeric else max(2.5, 1 + 0.3 * lines))
    axes = figure.add_subplot()
    places = values if numeric else [(listed or []).index(value) for value in values]
    points = sorted(zip(places, scores, strict=True))
    best = dict(points) if listed else dict([max(points, key=lambda point: point[1])])  # the highest at a place is last
    axes.scatter(*(places, scores)[::turn], color="tab:gray", s=18, label="trials")
    axes.plot(
        *(list(best), list(best.values()))[::turn],
        linestyle="-" if numeric and listed else "",
        label="best at each value" if listed else "best",
        color="tab:blue",
        marker="o",
        markerfacecolor="none",
        markersize=9,
    )
    xlabel, ylabel = (key, objective)[::turn]
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if numeric:
        _number_axis(axes, values, listed, log)
    else:
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)  # the first value on top
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    path = folder / f"curve_{key.replace('.', '_')}.png"  # whole: other settings may end alike
    figure.savefig(path, dpi=120)
    return path


def _number_axis(axes: Any, values: Sequence[float], listed: list[Any] | None, log: bool) -> None:
    """A logarithmic axis where values span much, with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullLocator

    shown = listed or values
    if log or (min(shown) > 0 and max(shown) >= 10 * min(shown)):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    if listed:
        axes.set_xticks(sorted(listed), [in_words(value) for value in sorted(listed)])


def write_sweep(
    root: Path, rows: list[Row], objective: str, curves: Mapping[str, tuple[list[Any] | None, bool]], base: Path
) -> list[Path]:
    """Writes the table of all trials, the best configuration and the curves, and returns the curves' paths.

    Args:
        root: the sweep's folder; its name is the sweep's.
        rows: a finished trial each: its folder (``trial``), the objective, settings by dotted key, ``seconds``.
        objective: the column that counts.
        curves: the values that a setting was searched among (None: a range) and whether its axis is logarithmic, by
            dotted key.
        base: the configuration that every trial started from.
    """
    with (root / TRIALS).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    best = max(rows, key=lambda row: row[objective])
    config = yaml.safe_load(base.read_text())
    for key, value in best.items():
        if key not in ("trial", objective, "seconds"):
            _put(config, key, value)
    config["name"] = f"{root.name}-best"
    head = f"# The best of {len(rows)} trials: {objective} {best[objective]:+.4f}\n"
    head += "# Chosen by the data named here: what is reported should be measured on others.\n"
    (root / BEST).write_text(head + yaml.safe_dump(config, sort_keys=False))
    return [curve(rows, key, objective, root, listed=values, log=log) for key, (values, log) in curves.items()]


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key as the command line would: below a class path, settings stand in ``init_args``."""
    *path, last = key.split(".")
    place = config
    for part in path:
        place = place.setdefault(part, {})
        if "class_path" in place:
            place = place.setdefault("init_args", {})
    place[last] = value
