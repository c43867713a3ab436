"""Tables of a predict run: how the arms decoded, what adaptation gained, how target and readout differ."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

from rich.table import Table

from dgd_lightning.analysis.adaptation import Adaptations, Gain
from dgd_lightning.analysis.arms import ArmStats, Cost, speed_up
from dgd_lightning.analysis.chains import Chains
from dgd_lightning.analysis.divergence import CLASSES, ArmDivergence
from dgd_lightning.metrics.clustered import counted, shown
from dgd_lightning.report.print_tables import new_table

BARS = " ▁▂▃▄▅▆▇█"
Numbers = Mapping[str, tuple[str, str]]  # title -> name of the number, format
DIVERGENCES: Numbers = {
    "KL(t‖r)": ("kl_target_readout", "{:.2f}"),
    "KL(r‖t)": ("kl_readout_target", "{:.2f}"),
    "JS": ("js", "{:.3f}"),
    "TV": ("tv", "{:.3f}"),
    "same top-1 token": ("agree", "{:.1%}"),
    "H(t) − H(r)": ("entropy_gap", "{:+.2f}"),
}
EMITTED: Numbers = {
    "argmax changed": ("argmax_changed", "{:.2%}"),
    "TV(t, g)": ("tv_target_guided", "{:.3f}"),
    "prob t": ("target_prob", "{:.3f}"),
    "prob r": ("readout_prob", "{:.3f}"),
    "rank t": ("target_rank", "{:.2f}"),
    "rank r": ("readout_rank", "{:.2f}"),
}


def decoding_table(stats: Mapping[str, ArmStats], total: int) -> Table:
    """One line per arm; ``total``: tasks of the data."""
    numbers = ("tasks", "tokens", "τ micro", "τ macro", "tokens/s", "speed-up")
    table = new_table("Decoding", ["arm"], numbers)
    table.add_column("acceptance by slot")
    for arm in stats.values():
        speeds = shown(arm.tokens_per_second, "{:.1f}"), shown(speed_up(arm, stats), "{:.2f}×")
        taus = (shown(tau, "{:.2f}") for tau in arm.tau)
        bars = bar_line(arm.rates.overall.tolist())
        table.add_row(arm.name, tasks_of(arm, total), f"{arm.tokens:,}", *taus, *speeds, bars)
    return table


def tasks_of(arm: ArmStats, total: int) -> str:
    """``6/8 (1 skipped)``."""
    return f"{arm.tasks}/{total}" + (f" ({arm.skipped} skipped)" if arm.skipped else "")


def bar_line(rates: Sequence[float]) -> str:
    """One character per rate in 0 … 1; ``·`` where there is none."""
    return "".join("·" if rate != rate else BARS[max(1, round(rate * 8))] if rate > 0 else BARS[0] for rate in rates)


def notes(stats: Mapping[str, ArmStats]) -> list[str]:
    """What the table's speeds mean, of arms that were decoded together and of those that choose among answers."""
    lines = []
    shared = [arm.shared for arm in stats.values() if arm.shared.tokens]
    if shared:
        whole = reduce(Cost.plus, shared)
        lines.append(
            f"{len(shared)} arms were decoded together, {whole.tokens:,} tokens in {whole.seconds:.1f} s "
            f"({whole.speed:.1f} tokens/s): none has a speed of its own."
        )
    if choosing := ", ".join(arm.name for arm in stats.values() if arm.chooses):
        lines.append(
            f"{choosing}: τ and tokens are those of the chosen answers; tokens/s counts the time of all answers."
        )
    return lines


def compute_tables(stats: Mapping[str, ArmStats]) -> list[Table]:
    """What an answer costs, a line per arm; no table where every arm draws no more than it returns."""
    if not any(arm.draws_more for arm in stats.values()):
        return []
    title = "Compute per answer (forwards of all that was drawn and ranked, counted per row)"
    table = new_table(title, ["arm"], ("target forwards", "draft forwards", "seconds"))
    for arm in stats.values():
        if arm.tasks:
            spent = (f"{count / arm.tasks:,.1f}" for count in arm.spent)
            table.add_row(arm.name, *spent, shown(arm.total.seconds / arm.tasks, "{:.2f}"))
    return [table]


def chains_table(arms: Mapping[str, Chains]) -> Table:
    """What chains and populations of power sampling did, a line per arm."""
    numbers = ("answers", "proposals taken", "effective sample size", "tokens drawn per token", "log p")
    table = new_table("Power sampling", ["arm"], numbers)
    for name, chains in arms.items():
        found = chains.scalars()
        table.add_row(
            name,
            str(chains.answers),
            shown(found["acceptance_rate"], "{:.1%}"),
            shown(found["effective_sample_size"], "{:.1%}"),
            shown(found["tokens_drawn_per_token"], "{:.1f}"),
            shown(found["log_p"], "{:.2f}"),
        )
    return table


def histogram_tables(stats: Mapping[str, ArmStats]) -> list[Table]:
    """How many tokens the verifications committed, a line per drafting arm; no table where no arm drafts."""
    drafting = [arm for arm in stats.values() if arm.block_size > 1 and arm.histogram.sum() > 0]
    if not drafting:
        return []
    lengths = range(1, max(arm.block_size for arm in drafting) + 1)
    table = new_table("Tokens per verification (share of verifications)", ["arm"], map(str, lengths))
    for arm in drafting:
        shares = arm.histogram[1:] / arm.histogram.sum()
        table.add_row(arm.name, *(f"{100 * share:.0f}%" for share in shares.tolist()))
    return [table]


def gain_table(gains: Iterable[Gain]) -> Table:
    """One line per arm that adapts."""
    title = "Test-time training: τ, paired by context (95% intervals over contexts)"
    numbers = ("contexts", "τ before", "τ after", "Δτ", "gain", "median gain", "worst")
    table = new_table(title, ("arm", "against"), numbers)
    for arm, base, gain, _ in gains:
        table.add_row(
            arm,
            base,
            str(gain.contexts),
            shown(gain.base, "{:.2f}"),
            shown(gain.tau, "{:.2f}"),
            gain.difference.text("{:+.2f}"),
            gain.ratio.text("{:+.1%}"),
            gain.median.text("{:+.1%}"),
            shown(gain.worst, "{:+.1%}"),
        )
    return table


def adaptation_table(found: Adaptations) -> Table:
    """What the adaptations were, over all contexts."""
    numbers = ("contexts", "kept", "failed", "judged by", "held-out loss", "held-out τ")
    seconds = ("prefill s", "validation s", "fit s", "peak MiB")
    caption = "Judged by: validation texts with a question asked for / of a user's turn gone on / without a question."
    table = new_table("Adaptations (means per context)", (), (*numbers, *seconds), caption)
    changes = (f"{before:.2f} → {after:.2f}" if before == before else "–" for before, after in (found.loss, found.tau))
    spent = (shown(mean, "{:.2f}") for mean in found.seconds)
    peak = "–" if found.peak is None else f"{found.peak / 2**20:.0f}"
    texts = " / ".join(map(str, found.texts)) if any(found.texts) else "–"
    table.add_row(str(found.contexts), str(found.kept), str(found.failed), texts, *changes, *spent, peak)
    return table


def divergence_tables(stats: Mapping[str, ArmDivergence]) -> list[Table]:
    """A line per arm: means over tokens, below them their intervals over contexts."""
    distributions = (
        "t: target; r: readout, of arms without guidance the draft; nats. Means over tokens, 95% over contexts."
    )
    words = (
        "argmax changed: guidance changed the top-1 token. TV(t, g): total variation of target and guided. "
        "prob, rank: of the emitted token; ranks by geometric mean."
    )
    return [
        _mean_table("Divergence of target and readout", distributions, DIVERGENCES, stats),
        _mean_table("Guidance and emitted tokens", words, EMITTED, stats),
    ]


def _mean_table(title: str, caption: str, numbers: Numbers, stats: Mapping[str, ArmDivergence]) -> Table:
    table = new_table(title, ["arm"], numbers, caption)
    for column in table.columns[1:]:
        column.no_wrap = True
    for arm in stats.values():
        cells = []
        for name, form in numbers.values():
            found = arm.interval(name)
            interval = f"{form.format(found.low)}…{form.format(found.high)}" if found.bounded else ""
            cells.append(f"{form.format(found.value)}\n{interval}")
        about = f"β {arm.beta:g}, {counted(len(arm.contexts), 'context')}, {counted(arm.tokens, 'token')}"
        table.add_row(f"{arm.name}\n{about}", *cells)
    return table


def class_table(stats: Mapping[str, ArmDivergence]) -> Table:
    """By token class: JS and share of tokens with a changed argmax, one line per arm."""
    found = {arm.name: arm.by_class() for arm in stats.values()}
    kinds = [kind for kind in CLASSES if any(kind in classes for classes in found.values())]
    table = new_table("JS, and share of tokens that guidance changed, by token class", ["arm"], kinds)
    for arm, classes in found.items():
        cells = (classes.get(kind) for kind in kinds)
        table.add_row(arm, *("–" if c is None else f"{c['js']:.3f}  {c['argmax_changed']:.1%}" for c in cells))
    return table
