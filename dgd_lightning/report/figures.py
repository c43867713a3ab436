"""Pictures of a predict run for TensorBoard: acceptance by slot, τ by context, divergence by position and by token."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dgd_lightning.analysis.adaptation import Counts, Gain, Record
from dgd_lightning.analysis.arms import ArmStats
from dgd_lightning.analysis.chains import steps_of
from dgd_lightning.analysis.divergence import COLUMNS, ArmDivergence
from dgd_lightning.metrics.clustered import counted
from dgd_lightning.report.canvas import empty_figure
from dgd_lightning.report.text import visible

WIDTH, LINES = 64, 60  # characters of the coloured text: TensorBoard shows pictures small
FONT_SIZE = 15
LEAST = 2  # answers that a point of a curve by position needs


def acceptance_figure(arms: Iterable[ArmStats]) -> Any:
    """P(slots 1 … j all accepted) as lines, P(slot j | reached) as dots, per arm."""
    figure = empty_figure(6, 4)
    axes = figure.add_subplot()
    for arm in arms:
        rates = arm.rates
        slots = range(1, len(rates.overall) + 1)
        (line,) = axes.plot(slots, rates.overall.tolist(), label=f"{arm.name} (τ {arm.tau.micro:.2f})")
        axes.plot(slots, rates.given_reached.tolist(), ".", color=line.get_color())
    title = "line: all up to here; dots: given reached"
    axes.set(xlabel="slot of the block", ylabel="acceptance", ylim=(0, 1.02), title=title)
    axes.legend()
    return figure


def tau_figure(counts: Counts, gain: Gain) -> Any:
    """τ of every context before and after adaptation, ordered by the gain."""
    base, arm = counts[gain.base], counts[gain.arm]
    pairs = sorted(((base[c].tau, arm[c].tau) for c in gain.contexts), key=lambda pair: pair[1] - pair[0])
    figure = empty_figure(7, 3.5)
    axes = figure.add_subplot()
    for number, pair in enumerate(pairs):
        axes.plot([number, number], pair, color="0.7", zorder=1)
    for at, (name, colour) in enumerate(((gain.base, "tab:gray"), (gain.arm, "tab:blue"))):
        axes.scatter(range(len(pairs)), [pair[at] for pair in pairs], label=name, color=colour, zorder=2)
    axes.set(xlabel="contexts, by gain", ylabel="τ, tokens per verification")
    axes.set_ylim(bottom=1)
    axes.legend()
    return figure


def held_out_figure(records: Sequence[Record]) -> Any:
    """Share of held-out blocks accepted up to each slot, before and after adaptation, mean over contexts."""
    figure = empty_figure(7, 3.5)
    axes = figure.add_subplot()
    for when, colour in (("before", "tab:gray"), ("after", "tab:blue")):
        rates = [record[f"held_out_{when}"]["acceptance"] for record in records]
        means = [statistics.fmean(values) for values in zip(*rates, strict=True)]
        axes.plot(range(1, len(means) + 1), means, marker="o", color=colour, label=f"{when} adaptation")
    axes.set(xlabel="slot of the block", ylabel="share accepted up to here", ylim=(0, 1))
    axes.set_xticks(range(1, len(means) + 1))
    axes.set_title(f"Held-out blocks, mean over {counted(len(records), 'context')}", loc="left")
    axes.legend()
    return figure


def position_figure(arms: Sequence[ArmDivergence]) -> Any:
    """Mean JS and share of tokens whose argmax guidance changed, by position, a line per arm."""
    figure = empty_figure(8, 5.5)
    shown = (("js", "JS(target, readout), nats"), ("argmax_changed", "share changed"))
    for axes, (name, label) in zip(figure.subplots(2, sharex=True), shown, strict=True):
        for arm in arms:
            counts = arm.positions.counts[:-1].numpy()  # the last group holds all later positions
            means = arm.positions.compute()[:-1, COLUMNS.index(name)].numpy()
            axes.plot(np.where(counts >= LEAST, means, np.nan), label=arm.name, linewidth=1)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    axes.set_xlabel(f"tokens generated before (points of at least {LEAST} answers)")
    figure.axes[0].legend(fontsize="small")
    return figure


def text_image(title: str, record: dict[str, Any]) -> np.ndarray:
    """A picture [height, width, 3] of a row's ``dgd.divergence``: darker orange for more JS(target, readout), red lines
    under tokens whose top-1 token guidance changed.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", FONT_SIZE)
    cell, line = font.getlength("m"), FONT_SIZE + 7
    places = list(_places(record["tokens"]))  # (token, character, column, line)
    lines = max((row for *_, row in places), default=0) + 1
    image = Image.new("RGB", (round(cell * (WIDTH + 2)), line * (lines + 2)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((cell, 2), visible(title).replace("\n", " ")[:WIDTH], fill="#666666", font=font)
    for token, character, column, row in places:
        js = record["js"][token]
        share = min(1.0, (math.log(2) if js is None else js) / math.log(2))
        left, top = cell * (column + 1), line * (row + 1) + 6
        colour = tuple(round(255 - share * (255 - full)) for full in (240, 140, 40))
        draw.rectangle((left, top, left + cell, top + line - 3), fill=colour)
        draw.text((left, top), character, fill="black", font=font)
        if record["argmax_changed"][token]:
            draw.line((left, top + line - 4, left + cell, top + line - 4), fill="#c00000", width=2)
    return np.asarray(image)


def _places(tokens: list[str]) -> Iterable[tuple[int, str, int, int]]:
    """The place of every character, the text broken into lines; the rest of a long text is left out."""
    column = row = 0
    for token, text in enumerate(tokens):
        for character in visible(text).replace("\t", "    "):
            if column == WIDTH or character == "\n":
                column, row = 0, row + 1
            if row == LINES:
                return
            if character != "\n":
                yield token, character, column, row
                column += 1


def chain_figure(name: str, history: dict[str, list[Any]]) -> Any:
    """The proposals along one chain: from the cut to the end, green where it was taken; and log p after each step."""
    figure = empty_figure(8, 5)
    above, below = figure.subplots(2, 1, sharex=True)
    steps = list(steps_of(history))
    for taken, colour, word in ((True, "tab:green", "taken"), (False, "0.75", "left")):
        some = [step for step in steps if step.accepted is taken]
        numbers = [step.number for step in some]
        above.vlines(
            numbers, [step.cut for step in some], [step.length for step in some], color=colour, linewidth=3, label=word
        )
    rate = sum(step.accepted for step in steps) / len(steps)
    above.set(ylabel="tokens: cut to end", title=f"{name}: one chain, {rate:.0%} of {len(steps)} proposals taken")
    above.legend()
    below.plot(range(1, len(steps) + 1), history["log_p"], drawstyle="steps-post")
    below.set(xlabel="step", ylabel="log p of the answer")
    return figure
