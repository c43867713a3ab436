"""The drawn acceptance curve, as a figure for TensorBoard and as a line of block characters for the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dgd_lightning.callbacks.arm_stats import ArmStats

BARS = " ▁▂▃▄▅▆▇█"


def bar_line(rates: Sequence[float]) -> str:
    """One character per rate in 0 … 1; ``·`` where there is none."""
    return "".join("·" if rate != rate else BARS[max(1, round(rate * 8))] if rate > 0 else BARS[0] for rate in rates)


def acceptance_figure(arms: Iterable[ArmStats]) -> Any:
    """A matplotlib figure: P(slots 1 … j all accepted) as lines, P(slot j | reached) as dots, per arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for arm in arms:
        rates = arm.rates
        slots = range(1, len(rates.overall) + 1)
        (line,) = axes.plot(slots, rates.overall.tolist(), label=f"{arm.name} (τ {arm.tau.micro:.2f})")
        axes.plot(slots, rates.given_reached.tolist(), ".", color=line.get_color())
    axes.set(
        xlabel="slot of the block",
        ylabel="acceptance",
        ylim=(0, 1.02),
        title="line: all up to here; dots: given reached",
    )
    axes.legend()
    return figure
