"""What statistics need to know of a graded answer and of its arm, made of rows alone."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dgd_lightning.grader import ERROR_CLASSES
from dgd_lightning.scoring.harness_rules import FILTERS
from dgd_lightning.scoring.judge_text import status_of
from dgd_lightning.types import Score


class Graded(NamedTuple):
    """One answer's score."""

    idx: str
    arm: str
    context: str
    category: str
    sub_category: str
    score: float | None  # None: not scored
    satisfied: tuple[int, int]  # rubrics that hold, of how many
    reverted: bool | None  # to a prior that the context contradicts; None where there is none
    prompt_tokens: int | None = None
    error_class: str | None = None  # why it failed, one of `grader.ERROR_CLASSES`; None where that is not known
    lm_eval: tuple[int, ...] | None = None  # 1 or 0 by each of lm-evaluation-harness' `FILTERS`; None: not GSM8K
    grader: str = ""  # its name; empty where another program gave the score, or nobody
    alone: bool = False  # of no context: `context` is the task itself


class ArmFacts(NamedTuple):
    """What decides which arms are compared."""

    name: str
    method: str
    lossless: bool  # its answers have the target's own distribution
    sampling: tuple[Any, ...]  # temperature, top_k, top_p
    control_of: str | None  # the arm whose null control it is
    baseline: bool = False  # what speed-ups refer to; rates do so too, where there is one
    blends: bool = False  # a readout with the target, which a null control would tell from noise
    strength: str = ""  # of a null control, beside that of the arm it controls; empty where it was not measured


class Versus(NamedTuple):
    """A comparison to make: ``arm`` against ``base``."""

    arm: str
    base: str
    control: bool  # whether the base is the arm's null control
    other_sampling: bool = False  # whether the base was drawn with another temperature, top_k or top_p
    blends: bool = False  # whether the arm should have a null control
    strength: str = ""  # of the null control that the base is, see `ArmFacts`


def graded(row: dict[str, Any]) -> Graded:
    """What statistics need of a graded row."""
    metadata, record, score = row.get("metadata"), row.get("dgd", {}), read_score(row)
    about = metadata if isinstance(metadata, dict) else {}
    named = {name: about.get(name) for name in ("context_id", "context_category", "sub_category")}
    context, category, sub_category = ("" if value is None else str(value) for value in named.values())
    length, details = record.get("prompt_tokens"), score.details or {}
    error, reverted = details.get("error_class"), details.get("reverted_to_prior")
    harness = details.get("lm_eval")
    return Graded(
        str(row["idx"]),
        str(record.get("arm", "")),
        context or str(row["idx"]),
        category,
        sub_category,
        score.value,
        (sum(status == "yes" for status in score.status), len(score.status)),
        reverted if isinstance(reverted, bool) else None,
        length if isinstance(length, int) and length >= 0 else None,
        error if error in ERROR_CLASSES and score.value is not None and score.value < 1.0 else None,
        tuple(int(harness.get(name) == 1) for name in FILTERS) if isinstance(harness, dict) else None,
        str(record.get("grader") or ""),
        not context,
    )


def read_graded(rows: Iterable[dict[str, Any]]) -> tuple[list[Graded], list[ArmFacts]]:
    """Scores and arms of graded rows: ours, or CL-bench's own (``score``, ``requirement_status``)."""
    scores: list[Graded] = []
    arms: dict[str, ArmFacts] = {}
    for row in rows:
        scores.append(graded(row))
        arms.setdefault(scores[-1].arm, arm_facts(row))
    return scores, list(arms.values())


def read_score(row: dict[str, Any]) -> Score:
    """The score in a row, however a program wrote it, from 0 to 1; None where there is none (null, NaN).

    Of other programs' scores that are no plain 0 or 1 (:func:`odd_score`) none is solved, as CL-bench's script counts
    them. Statuses that say neither yes nor no stay as they are and do not count as rubrics that hold.
    """
    value, status, details = row.get("score"), row.get("requirement_status"), row.get("dgd", {}).get("grading")
    value = 0 if odd_score(row) else value
    return Score(
        float(value) if isinstance(value, bool | int | float) and 0 <= value <= 1 else None,
        [status_of(one) or str(one) for one in status] if isinstance(status, list) else [],
        str(row.get("grading_rationale", "")),
        details if isinstance(details, dict) else None,
    )


def odd_score(row: dict[str, Any]) -> bool:
    """Whether another program gave a score, and neither 0 nor 1: CL-bench's ``eval.py`` takes ``score == 1`` alone.

    Our own graders may give shares.
    """
    value, record = row.get("score"), row.get("dgd", {})
    theirs = not (record.get("grader") or record.get("grading"))
    missing = value is None or value != value  # null, NaN
    return theirs and not missing and value not in (0, 1)


def odd_scores(count: int) -> str:
    """What a user is told of so many of them."""
    return (
        f"{count} answers came with another score than 0 or 1. They count as not solved: CL-bench's script takes the "
        "number 1 alone."
    )


def arm_facts(row: dict[str, Any]) -> ArmFacts:
    """Of the arm that a row belongs to; an arm whose rows do not say so is not lossless."""
    record = row.get("dgd", {})
    sampling = tuple(record.get(name) for name in ("temperature", "top_k", "top_p"))
    control, lossless = record.get("control_of"), record.get("lossless") is True
    name, method = (str(record.get(name, "")) for name in ("arm", "method"))
    control = control if isinstance(control, str) else None
    baseline, blends = (record.get(name) is True for name in ("baseline", "blends"))
    matched = record.get("matched")
    known = isinstance(matched, dict) and {"matched", "words"} <= matched.keys()
    strength = f"{'matched' if matched['matched'] else 'unmatched'}: {matched['words']}" if known else ""
    return ArmFacts(name, method, lossless, sampling, control, baseline, blends, strength)


def comparisons(arms: Sequence[ArmFacts]) -> list[Versus]:
    """Which arms are compared: each whose distribution is not its baseline's with that, and with its null controls.

    The baseline of an arm is the first lossless one with its sampling, or else the first lossless one of all; those
    that are a ``baseline`` come before the others.
    """
    plain = sorted((arm for arm in arms if arm.lossless), key=lambda arm: not arm.baseline)
    found = []
    for arm in arms:
        base = next((other for other in plain if other.sampling == arm.sampling), None)
        if arm.lossless:  # the same distribution as its baseline, so only another sampling is worth a line
            base = None if arm.sampling == plain[0].sampling else plain[0]
        elif base is None and plain:
            base = plain[0]
        if base is not None:
            found.append(Versus(arm.name, base.name, False, base.sampling != arm.sampling, arm.blends))
        controls = [other for other in arms if other.control_of == arm.name]
        found += [Versus(arm.name, other.name, True, strength=other.strength) for other in controls]
    return found


def by_arm(scores: Iterable[Graded]) -> dict[str, dict[str, Graded]]:
    """Scores by arm and task."""
    found: dict[str, dict[str, Graded]] = {}
    for one in scores:
        found.setdefault(one.arm, {})[one.idx] = one
    return found
