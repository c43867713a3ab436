"""Draw the README's picture from a quickstart run: python docs/quickstart_figure.py logs/quickstart/version_0"""

from __future__ import annotations

import sys
from pathlib import Path

from dgd_lightning import run_folder
from dgd_lightning.analysis.arms import ArmStats, collect
from dgd_lightning.report.canvas import empty_figure


def main(folder: Path) -> None:
    stats: dict[str, ArmStats] = {}
    for row in run_folder.read_predictions(folder):
        collect(stats, row)
    arm = next(arm for arm in stats.values() if arm.block_size > 1)
    figure = empty_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    slots = range(1, arm.block_size)
    left.plot(slots, arm.rates.overall.tolist(), marker="o", label="all slots up to here")
    left.plot(slots, arm.rates.given_reached.tolist(), ".", label="given reached")
    left.set(xlabel="slot of the block", ylabel="accepted", ylim=(0, 1.02), title=f"{arm.name}: τ {arm.tau.micro:.2f}")
    left.legend()
    shares = arm.histogram[1:] / arm.histogram.sum()
    right.bar(range(1, arm.block_size + 1), shares.tolist())
    right.set(xlabel="tokens per verification", ylabel="share of verifications")
    figure.savefig(Path(__file__).with_name("quickstart.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
