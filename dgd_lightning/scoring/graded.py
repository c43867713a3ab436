"""What statistics need to know of a graded answer and of its arm, made of rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dgd_lightning.lab.checks import grade, has_checks, reverted_to_prior
from dgd_lightning.types import Score

LOSSLESS = ("autoregressive", "speculative")  # methods whose answers have the target's own law


class Graded(NamedTuple):
    """One answer's score."""

    idx: str
    arm: str
    context: str
    category: str
    sub_category: str
    score: float | None  # None: not scored
    satisfied: tuple[int, int]  # rubrics that hold, of how many
    reverted: bool | None  # to the prior; None where no prior is contradicted


class ArmFacts(NamedTuple):
    """What decides which arms are compared."""

    name: str
    method: str
    sampling: tuple[Any, ...]  # temperature, top_k, top_p
    control_of: str | None  # the arm whose null control it is


class Versus(NamedTuple):
    """A comparison to make: ``arm`` against ``base``."""

    arm: str
    base: str
    control: bool  # whether the base is the arm's null control


def graded_by_program(row: dict[str, Any]) -> Graded | None:
    """A lab row's answer, graded by its program checks; None for other rows and for rows without an answer."""
    text = row["model_output"]
    if text is None or not has_checks(row):
        return None
    reverted = reverted_to_prior(row, text) if row["metadata"]["lab"].get("prior") == "contradict" else None
    return graded(row, grade(row, text))._replace(reverted=reverted)


def graded(row: dict[str, Any], score: Score) -> Graded:
    """A row with its score."""
    metadata = row.get("metadata")
    about = metadata if isinstance(metadata, dict) else {}
    return Graded(
        row["idx"],
        row.get("dgd", {}).get("arm", ""),
        str(about.get("context_id", row["idx"])),
        str(about.get("context_category", "")),
        str(about.get("sub_category", "")),
        score.value,
        (sum(status == "yes" for status in score.status), len(score.status)),
        None,
    )


def arm_facts(row: dict[str, Any]) -> ArmFacts:
    """Of the arm that a row belongs to."""
    record = row.get("dgd", {})
    sampling = tuple(record.get(name) for name in ("temperature", "top_k", "top_p"))
    return ArmFacts(record.get("arm", ""), record.get("method", ""), sampling, record.get("control_of"))


def comparisons(arms: Sequence[ArmFacts]) -> list[Versus]:
    """Which arms are compared: each whose law is not its baseline's with that, and with its null controls.

    The baseline of an arm is the first autoregressive or speculative one with its sampling, or else the first of all.
    """
    plain = [arm for arm in arms if arm.method in LOSSLESS]
    found = []
    for arm in arms:
        base = next((other for other in plain if other.sampling == arm.sampling), None)
        if arm.method in LOSSLESS:  # the same law as its baseline, so only another sampling is worth a line
            base = None if arm.sampling == plain[0].sampling else plain[0]
        elif base is None and plain:
            base = plain[0]
        if base is not None:
            found.append(Versus(arm.name, base.name, False))
        found += [Versus(arm.name, other.name, True) for other in arms if other.control_of == arm.name]
    return found


def by_arm(scores: Iterable[Graded]) -> dict[str, dict[str, Graded]]:
    """Scores by arm and task."""
    found: dict[str, dict[str, Graded]] = {}
    for one in scores:
        found.setdefault(one.arm, {})[one.idx] = one
    return found
