"""Error classes: the program's rules on lab answers, and what became of tasks from arm to arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dgd_lightning.grader import ERROR_CLASSES
from dgd_lightning.lab.grader import LabGrader, grade, lab_error
from dgd_lightning.lab.rows import eval_rows
from dgd_lightning.report.solve_rates import transition_table
from dgd_lightning.scoring.given_grader import AsGraded
from dgd_lightning.scoring.graded import Graded, Versus, read_graded
from dgd_lightning.scoring.score_run import rows_of, score_rows, source, write_graded
from dgd_lightning.scoring.summary import compared, summary, transitions


def value_row(*, prior: str = "contradict", stop: str = "stop") -> dict[str, Any]:
    """The hare eats nettles here, and crabs elsewhere; the heron eats eels."""
    checks = [{"type": "contains", "value": "nettles"}, {"type": "absent", "value": "crabs"}, {"type": "sentence"}]
    context = "The hare eats nettles. The heron eats eels. The Pone haunts the desert."
    lab = {"answer": "The hare eats nettles.", "checks": checks, "prior": prior, "prior_answer": "crabs"}
    return {
        "messages": [{"role": "user", "content": f"{context}\n\nWhat does the hare eat?"}],
        "rubrics": ["nettles", "no crabs", "a sentence"],
        "metadata": {"lab": lab},
        "dgd": {"stop_reason": stop},
    }


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The hare eats crabs.", "context_ignored"),
        ("The hare eats crabs", "context_ignored"),  # the first rule that fits
        ("", "incomplete_or_refused"),
        (" \n", "incomplete_or_refused"),
        ("The hare eats nettles", "incomplete_or_refused"),
        ("The hare eats", "incomplete_or_refused"),
        ("The hare. It eats nettles.", "format_error"),
        ("The hare eats eels.", "context_misused"),  # the heron's
        ("The hare eats nettles or crabs.", "context_misused"),  # hedged
        ("The hare eats Desert.", "context_misused"),
        ("The hare eats worms.", "other"),  # nowhere in the context
        ("The hare eats.", "other"),
    ],
)
def test_short_answers(answer: str, expected: str) -> None:
    row = value_row()
    assert grade(row, answer).value == 0.0
    assert lab_error(row, answer) == expected


def test_a_prior_counts_only_where_the_context_contradicts_it() -> None:
    assert lab_error(value_row(prior="agree"), "The hare eats crabs.") == "other"


def test_an_answer_cut_off_at_the_limit_is_incomplete_but_a_prior_told_before_is_one() -> None:
    assert lab_error(value_row(stop="length"), "The hare eats eels.") == "incomplete_or_refused"
    assert lab_error(value_row(stop="length"), "The hare eats crabs.") == "context_ignored"


def long_row() -> dict[str, Any]:
    items = ["Step one: fold the Zomi.", "Step two: weigh the Tela.", "Step three: warm the Kofe."]
    checks: list[dict[str, Any]] = [
        {"type": "contains_all", "value": items},
        {"type": "ordered", "value": items},
        {"type": "equals", "value": " ".join(items)},
    ]
    return {
        "messages": [{"role": "user", "content": f"{' '.join(items)}\n\nRecite it."}],
        "rubrics": ["all", "in order", "nothing else"],
        "metadata": {"lab": {"answer": " ".join(items), "checks": checks, "prior": "novel", "prior_answer": None}},
    }


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["Here it is:", 0, 1, 2], "format_error"),
        ([1, 0, 2], "context_misused"),  # another order
        ([0, 2], "context_misused"),  # one is missing
        (["Step one: fold the Tela."], "other"),  # no whole entry, and no word that the right answer has not
        (["I can't."], "other"),
    ],
)
def test_long_answers(parts: list[int | str], expected: str) -> None:
    row = long_row()
    items = row["metadata"]["lab"]["checks"][0]["value"]
    answer = " ".join(part if isinstance(part, str) else items[part] for part in parts)
    assert grade(row, answer).value == 0.0
    assert lab_error(row, answer) == expected


def test_equals_alone_is_form_only_where_the_value_is_there() -> None:
    row = value_row(prior="novel")
    row["metadata"]["lab"]["checks"] = [{"type": "equals", "value": "nettles"}]
    assert lab_error(row, "It is nettles.") == "format_error"
    assert lab_error(row, "It is worms.") == "other"


def test_real_lab_rows_of_every_family() -> None:
    """Every kind of failure that can be made from a row itself gets its class, in all families."""
    seen = set()
    for row in eval_rows(2):
        lab = row["metadata"]["lab"]
        assert grade(row, lab["answer"]).value == 1.0
        assert lab_error(row, "") == "incomplete_or_refused"
        assert lab_error(row, "Qwx zzy.") == "other"
        assert lab_error({**row, "dgd": {"stop_reason": "length"}}, "Qwx zzy.") == "incomplete_or_refused"
        if lab["long"]:
            assert lab_error(row, "Sure! " + lab["answer"]) == "format_error"
            assert lab_error(row, lab["checks"][0]["value"][-1]) == "context_misused"
        else:
            assert lab_error(row, lab["answer"].rstrip(".") + ". So it is.") == "format_error"
            context, _, question = row["messages"][-1]["content"].rpartition("\n\n")
            names = [word.strip(".,:;") for word in context.split() if word[0].isupper()]
            others = [name for name in names if name not in lab["answer"] + question]
            if others and lab["prior"] != "contradict":
                assert lab_error(row, f"It is {others[0]}.") == "context_misused"
                seen.add(row["metadata"]["sub_category"])
        if lab["prior"] == "contradict":
            assert lab_error(row, f"It is {lab['prior_answer']}.") == "context_ignored"
            seen.add("contradict")
    assert "contradict" in seen
    assert len(seen) > 6


def test_the_lab_grader_names_a_class_only_of_what_failed() -> None:
    contradicted = {"error_class": "context_ignored", "reverted_to_prior": True}
    assert LabGrader().grade(value_row(), "The hare eats nettles.").details == {"reverted_to_prior": False}
    assert LabGrader().grade(value_row(prior="agree"), "The hare eats nettles.").details is None
    assert LabGrader().grade(value_row(), "The hare eats crabs.").details == contradicted
    assert LabGrader().grade(value_row(), "The hare eats crabs.").value == 0.0
    assert LabGrader().grade(value_row(prior="agree"), "The hare eats crabs.").details == {"error_class": "other"}
    odd = value_row()
    odd["metadata"]["lab"]["checks"] = [5]
    assert LabGrader().grade(odd, "The hare eats crabs.").value is None


@pytest.mark.parametrize(("answer", "score"), [("It eats crabs.", 0), ("It eats nettles.", 0), ("It eats crabs.", 1)])
def test_an_answer_that_somebody_else_graded_gets_no_class_of_ours(tmp_path: Path, answer: str, score: int) -> None:
    """A verdict of the lab's own checks might contradict theirs; a class that the row came with stays."""
    given = {"score": score, "requirement_status": [], "grading_rationale": "by hand", "model_output": answer}
    classed = {"grading": {"error_class": "format_error", "by": "hand"}}
    for record in ({}, classed):
        path = tmp_path / f"{len(record)}.jsonl"
        path.write_text(json.dumps({**value_row(), **given, "idx": "a", "dgd": record}) + "\n")
        where = source(path)
        for _ in range(2):  # again: what is read of scores.jsonl says the same
            (found,) = score_rows(where, [AsGraded(), LabGrader()]).values()
            assert (found.grader, found.score, found.details) == ("as graded", score, record.get("grading"))
        write_graded(where, {("a", path.stem): found})
        (one,), _ = read_graded(rows_of(where.graded))
        assert (one.reverted, one.error_class) == (None, "format_error" if record and not score else None)


def graded(arm: str, *outcomes: str | None) -> list[Graded]:
    """A task per outcome: "solved", a class, "?" for a failure of no known class, None for no score."""
    found = []
    for number, outcome in enumerate(outcomes):
        score = None if outcome is None else float(outcome == "solved")
        error = outcome if outcome in ERROR_CLASSES else None
        found.append(Graded(str(number), arm, f"c{number}", "", "", score, (0, 0), None, error_class=error))
    return found


BASE = ("solved", "solved", "context_ignored", "context_ignored", "other", "?", None, "format_error")
OTHER = ("solved", "format_error", "solved", "context_misused", "other", "solved", "solved", None)


def test_transitions_by_hand() -> None:
    scores = graded("base", *BASE) + graded("guided", *OTHER)
    assert transitions(scores, Versus("guided", "base", False)) == {
        "solved": {"solved": 1, "format_error": 1},
        "context_ignored": {"solved": 1, "context_misused": 1},
        "other": {"other": 1},
        "unclassified": {"solved": 1},
    }


def test_transitions_add_up_to_the_comparison_and_are_shown() -> None:
    versus = Versus("guided", "base", False)
    scores = graded("base", *BASE) + graded("guided", *OTHER)
    (one,) = found = compared(scores, [versus])
    nested = transitions(scores, versus)
    moves = {(before, after): n for before, row in nested.items() for after, n in row.items()}
    assert sum(moves.values()) == one.result.tasks == 6
    assert sum(n for (before, after), n in moves.items() if before != "solved" == after) == one.result.fixed == 2
    assert sum(n for (before, after), n in moves.items() if after != "solved" == before) == one.result.broken == 1
    report = summary(scores, found)
    assert report["comparisons"][0]["transitions"]["context_ignored"] == {"solved": 1, "context_misused": 1}
    assert report["arms"]["guided"]["outcomes"] == {
        "solved": 4, "context_misused": 1, "format_error": 1, "other": 1
    }  # fmt: skip
    table = transition_table(scores, versus)
    assert table is not None
    assert [str(column.header).replace("\n", "_") for column in table.columns] == [
        "before \\ after", "solved", "context_misused", "format_error", "other"
    ]  # fmt: skip
    rows = [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]
    assert rows[1] == ["context_ignored", "1", "1", "·", "·"]
    Console(width=80).print(table)
    assert transition_table(graded("base", *BASE) + graded("guided", *BASE), versus) is None


def test_scores_without_classes_tell_no_transitions() -> None:
    scores = graded("base", "solved", "?") + graded("guided", "?", "solved")
    report = summary(scores, compared(scores, [Versus("guided", "base", False)]))
    assert "transitions" not in report["comparisons"][0]
    assert "outcomes" not in report["arms"]["base"]
