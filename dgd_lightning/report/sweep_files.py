"""What a finished sweep writes: `trials.csv`, a curve per setting and `best.yaml`, a configuration that runs."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dgd_lightning.report.sweep_views import Row, curve

TRIALS, BEST = "trials.csv", "best.yaml"


def write_sweep(
    root: Path, rows: list[Row], objective: str, curves: Mapping[str, tuple[list[Any] | None, bool]], base: Path
) -> list[Path]:
    """Writes the three.

    Args:
        root: the sweep's folder; its name is the sweep's.
        rows: a finished trial each: its folder (``trial``), the objective, settings by dotted key, ``seconds``.
        objective: the column that counts.
        curves: the values that a setting was searched among (None: a range) and whether its axis is logarithmic, by
            dotted key.
        base: the configuration that every trial started from.

    Returns:
        The pictures.
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
