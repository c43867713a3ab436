"""What adaptation gained: τ of an adapting arm against its twin, context by context; scores and cost of adapting."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dgd_lightning.data.tasks import context_of
from dgd_lightning.metrics.clustered import NAN
from dgd_lightning.metrics.paired import TauGain, Verified, tau_gain
from dgd_lightning.modules.arms import Arm
from dgd_lightning.types import Task

SECONDS = ("ttt_prefill_seconds", "ttt_validation_seconds", "ttt_fit_seconds")
MEMORY = "ttt_peak_memory"
Counts = dict[str, dict[str, Verified]]  # [arm][context]
Record = dict[str, Any]


class Gain(NamedTuple):
    """An adapting arm against the arm that differs in nothing else."""

    arm: str
    base: str
    tau: TauGain
    contexts: list[str]  # in which both verified something, in the order of the base's


def twin(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm without adaptation whose other settings are those of an adapting one; None where there is none."""

    def settings(one: Arm) -> Arm:
        return replace(one, name="", ttt=False, online_every=None)

    return next((other for other in arms if not other.adapts and settings(other) == settings(arm)), None)


def collect(rows: Iterable[dict[str, Any]]) -> tuple[Counts, dict[str, Record]]:
    """Verifications by arm and context, and the record of each context's adaptation with its cost."""
    counts: Counts = defaultdict(dict)
    records: dict[str, Record] = {}
    for row in rows:
        record = row["dgd"]
        if "skipped" in record:
            continue
        context = context_of(Task(row["idx"], None, None, row))
        arm = counts[record["arm"]]
        arm[context] = arm.get(context, Verified(0, 0)).plus(record["acceptance_lengths"])
        if record.get("ttt"):
            records[context] = {**record["ttt"], **{name: record.get(name) for name in (*SECONDS, MEMORY)}}
    return counts, records


def gain_of(counts: Counts, base: str, arm: str) -> Gain:
    """τ of an arm against another over the contexts in which both verified something."""
    ours, theirs = counts.get(arm, {}), counts.get(base, {})
    nothing = Verified(0, 0)
    both = [name for name, one in theirs.items() if one.verifications and ours.get(name, nothing).verifications]
    return Gain(arm, base, tau_gain([(theirs[name], ours[name]) for name in both]), both)


def is_scored(record: Record) -> bool:
    """Whether an adaptation did not fail and has held-out scores."""
    return "error" not in record and bool(record["held_out_before"])


class Adaptations(NamedTuple):
    """All adaptations of a run; means are over contexts, NaN where there is nothing to measure."""

    contexts: int
    kept: int
    failed: int
    loss: tuple[float, float]  # held-out, before and after
    tau: tuple[float, float]
    seconds: list[float]  # in the order of ``SECONDS``
    peak: int | None  # bytes
    texts: tuple[int, int, int]  # that judged: a question asked for, one of a user's turn gone on, a continuation


def summed(records: Iterable[Record]) -> Adaptations:
    """Sums adaptations up; those that failed count as failed alone."""
    every = list(records)
    fine = [one for one in every if "error" not in one]
    scored = [one for one in every if is_scored(one)]

    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else NAN

    def change(key: str) -> tuple[float, float]:
        before, after = (mean([one[f"held_out_{when}"][key] for one in scored]) for when in ("before", "after"))
        return before, after

    judged = [one for one in fine if one.get("held_out_by") == "validation_texts"]
    texts, answers, asked = (
        sum(one.get(f"validation_{name}", 0) for one in judged) for name in ("texts", "answers", "asked")
    )
    return Adaptations(
        len(every),
        sum(one["kept"] for one in fine),
        len(every) - len(fine),
        change("loss"),
        change("tau"),
        [mean([one[name] for one in fine]) for name in SECONDS],
        max((one[MEMORY] for one in fine if one[MEMORY] is not None), default=None),
        (asked, answers - asked, texts - answers),
    )
