"""Tables of solve rates: a line per arm, and below them what an arm changed against its baseline and null controls."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import NamedTuple

from rich.table import Table

from dgd_lightning.metrics.paired import Difference
from dgd_lightning.scoring.graded import Graded, Versus, by_arm
from dgd_lightning.scoring.statistics import Comparison, Pair, compare, holm, rate

ALL = "all tasks"
REVERTED = "reverted to the prior"
HEADER = 14  # characters of a header's line


class Compared(NamedTuple):
    """Two arms, and how they differ."""

    versus: Versus
    result: Comparison
    holm: float  # p adjusted for all comparisons of the table


def compared(scores: Sequence[Graded], wanted: Sequence[Versus], *, seed: int = 0) -> list[Compared]:
    """Every wanted comparison over the tasks scored under both arms; those without such tasks are left out."""
    arms = by_arm(scores)
    found = []
    for versus in wanted:
        base, other = arms.get(versus.base, {}), arms.get(versus.arm, {})
        pairs = [
            Pair(one.context, one.score, other[idx].score)  # type: ignore[arg-type]
            for idx, one in base.items()
            if idx in other and one.score is not None and other[idx].score is not None
        ]
        if pairs:
            found.append((versus, compare(pairs, seed=seed)))
    adjusted = holm([result.p for _, result in found])
    return [Compared(versus, result, p) for (versus, result), p in zip(found, adjusted, strict=True)]


def rate_table(scores: Sequence[Graded]) -> Table:
    """Solve rates: a line per arm; all tasks with their 95% interval over contexts, then by category."""
    table = Table(title="Solve rate (all rubrics hold; 95% intervals over contexts)", title_justify="left")
    arms = by_arm(scores)
    categories = sorted({one.category for one in scores if one.category})
    reversible = any(one.reverted is not None for one in scores)
    table.add_column("arm")
    for header in (ALL, *categories, *([REVERTED] if reversible else [])):
        table.add_column("\n".join(wrap(header, HEADER)), justify="right")
    for arm, tasks in arms.items():
        graded = [one for one in tasks.values() if one.score is not None]
        cells = [_rate(graded, interval=True)]
        cells += [_rate([one for one in graded if one.category == category]) for category in categories]
        if reversible:
            contradicted = [one.reverted for one in graded if one.reverted is not None]
            cells.append(_share(sum(contradicted), len(contradicted)))
        table.add_row(arm, *cells)
    return table


def comparison_table(found: Sequence[Compared]) -> Table:
    """One line per comparison."""
    table = Table(
        title="Solve rate, paired by task (percentage points; 95% intervals over contexts)",
        title_justify="left",
        caption="fixed, broken: tasks that only one of the two solved. p: exact sign-flip test over contexts; Holm: "
        "adjusted for all lines. finds: smallest difference seen in 80% of such runs.",
        caption_justify="left",
    )
    for column in ("arm", "against", "tasks", "difference", "fixed", "broken", "p", "Holm", "finds"):
        table.add_column(column, justify="left" if column in ("arm", "against") else "right")
    for one in found:
        result = one.result
        against = f"{one.versus.base} (null control)" if one.versus.control else one.versus.base
        table.add_row(
            one.versus.arm,
            against,
            f"{result.tasks}",
            points(result.difference),
            f"{result.fixed}",
            f"{result.broken}",
            f"{result.p:.3f}",
            f"{one.holm:.3f}",
            "–" if result.detectable != result.detectable else f"±{100 * result.detectable:.1f}",
        )
    return table


def points(difference: Difference) -> str:
    """A difference of rates in percentage points, with its interval where there is one."""
    value = f"{100 * difference.value:+.1f}"
    if difference.low != difference.low:  # NaN: too few contexts, or none differs
        return value if difference.value else "none"
    return f"{value} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _rate(graded: Sequence[Graded], *, interval: bool = False) -> str:
    solved = [float(one.score or 0.0) for one in graded]
    if not solved:
        return "–"
    bounds = ""
    if interval:
        found = rate([(one.context, value) for one, value in zip(graded, solved, strict=True)])
        bounds = f" [{100 * found.low:.0f}, {100 * found.high:.0f}]" if found.low == found.low else ""
    return f"{100 * sum(solved) / len(solved):.1f}%{bounds}\n{sum(solved):g}/{len(solved)}"


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}%\n{count}/{total}" if total else "–"
