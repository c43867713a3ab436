"""Graded runs for a report: read, named, brought to the same tasks, pooled over seeds where that is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.metrics.clustered import counted
from dgd_lightning.report.words import words_of
from dgd_lightning.row_files import stem
from dgd_lightning.run_folder import newest_version
from dgd_lightning.scoring.given_grader import AsGraded
from dgd_lightning.scoring.graded import ArmFacts, Graded, Versus, arm_facts, comparisons, graded, odd_score
from dgd_lightning.scoring.judge_text import rubric_texts
from dgd_lightning.scoring.score_run import rows_of

GRADED, SUFFIX = "graded.jsonl", "_graded"  # in run folders; of files beside their rows
Row = dict[str, Any]


class Run(NamedTuple):
    """One file of graded rows."""

    label: str
    file: Path
    scores: list[Graded]
    arms: list[ArmFacts]
    twice: list[Row]  # of rows that two judges graded: what `agreement` reads
    without_status: int  # answers with score 0, but no rubric's status: perhaps their judge failed
    odd: int  # scores that are a text or a fraction

    @property
    def tasks(self) -> set[str]:
        """Ids of its tasks."""
        return {one.idx for one in self.scores}


class Study(NamedTuple):
    """What a report is about."""

    runs: list[Run]
    scores: list[Graded]  # with arms and tasks named apart
    wanted: list[Versus]
    note: str  # to every title: what was left out or put together; may be empty


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Graded rows of run folders and files, each under a label of its own."""
    places = [Path(path).resolve() for path in paths]
    if doubled := {path for path in places if places.count(path) > 1}:
        raise InputError("runs", expected="each run once", received=f"{min(doubled)} twice", hint="name it once")
    return [_read(place, label) for place, label in zip(places, _labels(places), strict=True)]


def study(runs: Sequence[Run], *, pool: bool, common: bool, against: str | None) -> Study:
    """What is compared with what.

    Args:
        runs: of :func:`read_runs`.
        pool: count every run's answer to a task, within its context; otherwise arms of several runs are ``run/arm``.
        common: keep the tasks that all runs have; otherwise all runs must have the same ones.
        against: an arm, as named, that all others are compared with instead of their baselines.
    """
    shared, note = _shared_tasks(runs, common)
    if pool and len(runs) > 1:
        _check_same_arms(runs)
        task = words_of(runs[0].scores).task
        note = f"{len(runs)} runs pooled, a {task} counts once for each{'; ' + note if note else ''}"
    scores: list[Graded] = []
    arms: list[ArmFacts] = []
    wanted: list[Versus] = []
    for run in runs:
        prefix, before = "" if pool or len(runs) == 1 else f"{run.label}/", f"{run.label}: " if pool else ""
        # Rows of another program name no arm, and go by their file.
        names = {arm.name: run.label if arm.name == stem(run.file) else prefix + arm.name for arm in run.arms}
        scores += [one._replace(arm=names[one.arm], idx=before + one.idx) for one in run.scores if one.idx in shared]
        controls = [None if arm.control_of is None else names.get(arm.control_of) for arm in run.arms]
        named = zip(run.arms, names.values(), controls, strict=True)
        own = [arm._replace(name=name, control_of=control) for arm, name, control in named]
        own = [arm for arm in own if arm.name not in {known.name for known in arms}]  # of pooled runs: once
        arms += own
        wanted += comparisons(own)  # baselines are those of the same run
    if against is not None:
        every = [arm.name for arm in arms]
        meant = [name for name in every if against in name.split("/", 1)]  # a run's only arm, or an arm of one run only
        if against not in every and len(meant) == 1:
            against = meant[0]
        if against not in every:
            raise InputError(
                "against", expected=f"one of the arms {', '.join(every)}", received=against, hint="name one of them"
            )
        others = [arm for arm in arms if arm.name != against]
        controlled = {arm.control_of for arm in arms if arm.name == against}  # is compared with its null control anyway
        wanted = [Versus(a.name, against, False, blends=a.blends and a.name not in controlled) for a in others]
        wanted += [Versus(a.control_of, a.name, True, strength=a.strength) for a in others if a.control_of is not None]
    return Study(list(runs), scores, wanted, f" ({note})" if note else "")


def as_graded(row: Row) -> bool:
    """Whether another program gave the row its score, in CL-bench's form."""
    return "requirement_status" in row and row["dgd"].get("grader") in (None, AsGraded.name)


def _shared_tasks(runs: Sequence[Run], common: bool) -> tuple[set[str], str]:
    tasks, word = [run.tasks for run in runs], words_of(runs[0].scores).task
    shared = set.intersection(*tasks)
    if all(own == shared for own in tasks):
        return shared, ""
    differ = "; ".join(
        f"{run.label} has {counted(len(own), word)}, {len(own - shared)} of them "
        f"{'alone' if len(runs) == 2 else 'not in all runs'}"
        for run, own in zip(runs, tasks, strict=True)
    )
    if not common or not shared:
        hint = f"--common true compares over the {len(shared)} that all have" if shared else "name other runs"
        raise InputError("runs", expected=f"runs on the same {word}s", received=differ, hint=hint)
    return shared, f"only the {counted(len(shared), f'common {word}')}: {differ}"


def _check_same_arms(runs: Sequence[Run]) -> None:
    first = set(runs[0].arms)
    for run in runs[1:]:
        if odd := sorted({arm.name for arm in first ^ set(run.arms)}):
            raise InputError(
                "pool",
                expected=f"the same arms with the same settings in {runs[0].label} and {run.label}",
                received=f"{', '.join(odd)}, which differ",
                hint="pool runs that differ in their seed alone",
            )


def _labels(places: Sequence[Path]) -> list[str]:
    """The shortest names by which the runs differ."""
    forms = (
        [place.parent.name if place.name.startswith("version_") else _stem(place) for place in places],
        [f"{place.parent.name}/{_stem(place)}" for place in places],
        [str(place) for place in places],
    )
    return next(form for form in forms if len(set(form)) == len(form))


def _stem(place: Path) -> str:
    return place.name if place.is_dir() else stem(place).removesuffix(SUFFIX)


def _read(place: Path, label: str) -> Run:
    file = place / GRADED if place.is_dir() else place
    if not file.is_file():
        raise InputError(
            "runs",
            expected=f"a folder with {GRADED}, or a file of graded rows",
            received=place,
            hint=f"dgd score {newest_version(place) or place}" if place.is_dir() else "check the path",
        )
    scores: list[Graded] = []
    arms: dict[str, ArmFacts] = {}
    twice: list[Row] = []
    scored, without_status, odd = False, 0, 0
    for row in rows_of(file, graded=True):
        one = graded(row)
        scores.append(one)
        arms.setdefault(one.arm, arm_facts(row))
        scored = scored or "score" in row
        answered = isinstance(row["model_output"], str) and row["model_output"].strip()
        judged = rubric_texts(row.get("rubrics")) or ("rubrics" not in row and as_graded(row))
        without_status += bool(one.score == 0.0 and answered and not one.satisfied[1] and judged)
        odd += odd_score(row)
        grading = row["dgd"].get("grading")
        if isinstance(grading, dict) and isinstance(grading.get("second"), dict):
            kept = {name: row.get(name) for name in ("score", "requirement_status")}
            twice.append({**kept, "dgd": {"grading": {"second": grading["second"]}}})
    if not scored:
        raise InputError("runs", expected="rows with a score", received=file, hint=f"dgd score {place}")
    return Run(label, file, scores, list(arms.values()), twice, without_status, odd)
