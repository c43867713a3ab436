"""The pictures of a diagnostic: by confidence, by depth, by slot, by rank, by ablation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dgd_lightning.analysis.diagnosis import ALL, MAIN, Diagnosis
from dgd_lightning.metrics.clustered import NAN, Difference
from dgd_lightning.metrics.diagnosis import ADAPTED, DRAFT, RANDOM, SHUFFLED, TARGET, Wins
from dgd_lightning.report.canvas import empty_figure

RANK_LABEL = "mean rank of the right token\n(geometric; higher up: knows better)"
COLOURS = {TARGET: "black", DRAFT: "tab:blue", ADAPTED: "tab:green", SHUFFLED: "tab:orange", RANDOM: "tab:red"}


def figures(found: Diagnosis) -> dict[str, Any]:
    """Matplotlib figures by name."""
    made = {"confidence": confidence_figure(found)}
    if found.unsure[TARGET].placement.tokens:
        made["ranks"] = ranks_figure(found)
    if found.group("layer"):
        made["depth"] = depth_figure(found)
    if found.group("slot"):
        made["slots"] = slots_figure(found)
    if found.further:
        made["further"] = further_figure(found)
    return made


def _main(found: Diagnosis) -> list[str]:
    return [name for name in MAIN if name in found.cells[ALL]]


def confidence_figure(found: Diagnosis) -> Any:
    """Net wins against the target per bucket of its confidence: by rank, and by probability beside it."""
    figure = empty_figure(11, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    counts = [found.cells[bucket][TARGET].placement.tokens for bucket in found.buckets]
    ticks = [f"{bucket}\n{count:,} tokens" for bucket, count in zip(found.buckets, counts, strict=True)]
    names = _main(found)
    decides = {"rank": "this decides", "probability": "this does not decide"}
    for panel, (by, title) in zip(panels, decides.items(), strict=True):
        for number, name in enumerate(names):
            nets = [getattr(found.cells[bucket][name], by) for bucket in found.buckets]
            at = np.arange(len(nets)) + 0.12 * (number - (len(names) - 1) / 2)
            panel.errorbar(at, *_bars(nets), fmt="o", capsize=3, color=COLOURS[name], label=name)
        panel.axhline(0, color=COLOURS[TARGET], linewidth=1, label="target")
        panel.axvspan(-0.5, 0.5, color="0.93", zorder=0)
        panel.set_xlim(-0.5, len(ticks) - 0.5)
        panel.set_xticks(range(len(ticks)), ticks, fontsize=8)
        panel.set_xlabel("probability of the target's top-1 token (grey: these tokens decide)")
        panel.set_title(f"By {by}: {title}", loc="left")
        panel.yaxis.set_major_formatter("{x:+.0%}")
    panels[0].set_ylabel("net share of tokens against the target\nabove 0: knows better")
    return _with_legend_below(figure)


def ranks_figure(found: Diagnosis) -> Any:
    """Share of the deciding tokens whose right token is among a reader's first so many choices."""
    figure = empty_figure(6.5, 4.2)
    axes = figure.subplots()
    part = found.tokens.part(found.bucket == 0)
    for name in (TARGET, *_main(found)):
        axes.ecdf(part.readers[name].rank, color=COLOURS[name], linewidth=_width(name), label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("rank (log scale)")
    axes.set_ylabel("share of tokens placed at this rank or better")
    axes.set_title(f"Target unsure (top-1 token {found.buckets[0]}): {len(part.context):,} tokens", loc="left")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def depth_figure(found: Diagnosis) -> Any:
    """Mean ranks along the target's layers, with the draft and its controls as lines."""
    figure = empty_figure(11, 4.2)
    buckets = _drawn(found)
    panels = figure.subplots(1, len(buckets), squeeze=False)[0]
    layers = found.group("layer")
    numbers = [int(name.split()[1]) for name in layers]
    for panel, bucket in zip(panels, buckets, strict=True):
        title = "All tokens" if bucket == ALL else f"Target unsure ({bucket})"
        cells = found.cells[bucket]
        means = [cells[name].placement.mean_rank for name in layers]
        panel.plot(numbers, means, "o-", color="0.45", zorder=3, label="layer, logit lens")
        for name in (TARGET, *_main(found)):
            style = "-" if name in (TARGET, DRAFT, ADAPTED) else "--"
            colour, width = COLOURS[name], _width(name)
            panel.axhline(cells[name].placement.mean_rank, linestyle=style, color=colour, linewidth=width, label=name)
        panel.set_xlabel("layer of the target")
        panel.set_xticks(numbers[:: max(1, len(numbers) // 12)])
        _rank_axis(panel)
        panel.set_title(f"{title}: {cells[TARGET].placement.tokens:,} tokens", loc="left")
    panels[0].set_ylabel(RANK_LABEL)
    return _with_legend_below(figure)


def slots_figure(found: Diagnosis) -> Any:
    """Mean ranks by slot of the draft's blocks."""
    figure = empty_figure(6.5, 4.2)
    axes = figure.subplots()
    slots = [DRAFT, *found.group("slot")]
    numbers = [1, *(int(name.split()[1]) for name in slots[1:])]
    for bucket in _drawn(found):
        cells = found.cells[bucket]
        colour, what = ("tab:blue", ALL) if bucket == ALL else ("tab:cyan", "target unsure")
        axes.plot(
            numbers, [cells[name].placement.mean_rank for name in slots], "o-", color=colour, label=f"{what}: draft"
        )
        axes.axhline(cells[TARGET].placement.mean_rank, linestyle="--", color=colour, label=f"{what}: target")
    axes.set_xticks(numbers)
    _rank_axis(axes)
    axes.set_xlabel("slot of the block (slot j says nothing of an answer's first j − 1 tokens)")
    axes.set_ylabel(RANK_LABEL)
    axes.legend(fontsize=8)
    return figure


def further_figure(found: Diagnosis) -> Any:
    """Readers that the user added, against the draft as it is."""
    names = found.further
    figure = empty_figure(8, 1.6 + 0.3 * len(names))
    axes = figure.subplots()
    for shift, bucket, colour in ((-0.13, ALL, "tab:blue"), (0.13, found.buckets[0], "tab:cyan")):
        values, errors = _bars([found.cells[bucket][name].draft for name in names])
        label = bucket if bucket == ALL else f"target {bucket}"
        axes.errorbar(values, np.arange(len(names)) + shift, xerr=errors, fmt="o", capsize=3, color=colour, label=label)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:+.0%}")
    axes.set_xlabel("net share of tokens placed better (right) or worse (left) than by the draft as it is")
    axes.legend(fontsize=8)
    return figure


def _drawn(found: Diagnosis) -> list[str]:
    """The tokens that decide, where there are any, and all."""
    return [name for name in (found.buckets[0], ALL) if found.cells[name][TARGET].placement.tokens]


def _with_legend_below(figure: Any) -> Any:
    """The figure, with one legend for all its panels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _width(name: str) -> float:
    """The target's line is wide, so that it shows where another lies on it."""
    return 2.5 if name == TARGET else 1.5


def _rank_axis(axes: Any) -> None:
    """Ranks on a log scale, the first one on top."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _bars(won: Sequence[Wins | None]) -> tuple[np.ndarray, np.ndarray]:
    """Net wins [n], and how far their intervals reach down and up [2, n]; 0 where there is no interval."""
    nets = (Difference(NAN) if one is None else one.net for one in won)
    values, low, high = (np.array(column, dtype=float) for column in zip(*nets, strict=True))
    return values, np.nan_to_num(np.stack([values - low, high - values])).clip(min=0)
