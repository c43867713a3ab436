"""Which arms are compared with which, and the tables of solve rates."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from dgd_lightning.callbacks.clbench_scorer import log_scores
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.matched_entropy import MatchedEntropy
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.methods.guided import Guided
from dgd_lightning.modules.arms import Arm, control_of
from dgd_lightning.report.print_tables import print_tables
from dgd_lightning.report.run_summary import add_solve_rates
from dgd_lightning.report.runs_page import page
from dgd_lightning.report.solve_rates import comparison_table, rate_table, score_tables, verdict
from dgd_lightning.report.words import words_of
from dgd_lightning.scoring.graded import ArmFacts, Graded, Versus, arm_facts, comparisons
from dgd_lightning.scoring.summary import compared, summary
from dgd_lightning.types import Summary

GREEDY, WARM = (0.0, None, None), (1.0, None, None)


def test_controls_find_the_arm_they_control() -> None:
    arms = [
        Arm("target", Autoregressive()),
        Arm("draft", Guided(beta=0.3)),
        Arm("adapted", Guided(beta=0.3), ttt=True),
        Arm("lens", Guided(beta=0.3, readout=LogitLens(3))),
        Arm("noise", Guided(beta=0.3, readout=Noise())),
        Arm("noise adapted", Guided(beta=0.3, readout=Noise()), ttt=True),
        Arm("noise lens", Guided(beta=0.3, readout=Noise(LogitLens(3)))),
        Arm("shuffled", Guided(beta=0.3, readout=DraftReadout(features="shuffled", seed=4))),
        Arm("entropy", Guided(beta=0.3, readout=MatchedEntropy())),
        Arm("noise of nothing", Guided(beta=0.4, readout=Noise())),
    ]
    assert control_of(arms) == {
        "noise": "draft",
        "noise adapted": "adapted",
        "noise lens": "lens",
        "shuffled": "draft",
        "entropy": "draft",
    }


class Bare:
    """A user's readout that has what is needed and no more."""

    def layers(self, pair: object) -> tuple[int, ...]:
        return ()

    def begin(self, pair: object, request: object, width: int) -> object:
        raise NotImplementedError


def test_a_readout_of_a_users_own_controls_nothing() -> None:
    assert control_of([Arm("own", Guided(beta=0.3, readout=Bare()))]) == {}  # type: ignore[arg-type]


def test_comparisons_leave_out_what_has_one_law() -> None:
    arms = [
        ArmFacts("plain", "Autoregressive", True, GREEDY, None),
        ArmFacts("fast", "Speculative", True, GREEDY, None),
        ArmFacts("guided", "Guided", False, GREEDY, None),
        ArmFacts("noise", "Guided", False, GREEDY, "guided"),
        ArmFacts("warm", "Speculative", True, WARM, None),
        ArmFacts("warm guided", "Guided", False, WARM, None),
        ArmFacts("cold only", "Guided", False, (0.5, None, None), None),
    ]
    assert comparisons(arms) == [
        Versus("guided", "plain", False),
        Versus("guided", "noise", True),
        Versus("noise", "plain", False),
        Versus("warm", "plain", False, True),
        Versus("warm guided", "warm", False),
        Versus("cold only", "plain", False, True),
    ]
    assert comparisons([ArmFacts("guided", "Guided", False, GREEDY, None)]) == []
    blending = arms[2]._replace(blends=True)
    assert comparisons([arms[0], blending]) == [Versus("guided", "plain", False, blends=True)]
    record = {"arm": "noise", "control_of": "guided", "matched": {"matched": True, "words": "0.1, guided's 0.1"}}
    noise = arm_facts({"dgd": record})
    assert comparisons([arms[2], noise]) == [Versus("guided", "noise", True, strength="matched: 0.1, guided's 0.1")]
    for other in ("text", {}, {"matched": True}, [1]):  # another program's field of this name
        assert arm_facts({"dgd": {**record, "matched": other}}).strength == ""
    late = [*arms[1:3], arms[0]._replace(baseline=True)]  # rates and speed-ups refer to one arm
    assert comparisons(late) == [Versus("guided", "plain", False)]


def graded(arm: str, scores: list[float | None]) -> list[Graded]:
    """Two tasks per context and two categories."""
    return [Graded(str(n), arm, f"c{n // 2}", "AB"[n % 2], "", score, (0, 1), None) for n, score in enumerate(scores)]


def shown(*tables: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    print_tables(console, list(tables))  # type: ignore[arg-type]
    return console.export_text()


def test_tables_pair_tasks_and_pass_over_unscored_ones() -> None:
    scores = graded("plain", [1, 0, 0, 0, None, 1]) + graded("guided", [1, 1, 1, 0, 1, None])
    found = compared(scores, [Versus("guided", "plain", False), Versus("guided", "absent", True)])
    (one,) = found
    assert (one.result.tasks, one.result.fixed, one.result.broken) == (4, 2, 0)
    assert one.result.difference.value == 0.5
    assert one.holm == one.result.p == 0.5  # two contexts, both better: one coin in two
    text = shown(rate_table(scores), comparison_table(found))
    assert all(number in text for number in ("40.0%", "80.0%", "+50.0"))


CLBENCH = ("Solve rate (all rubrics hold; 95% intervals over contexts)", "Solve rate, paired by task", "all tasks")


@pytest.mark.parametrize(
    ("grader", "alone", "rubrics", "words"),
    [
        ("rubrics", False, 1, CLBENCH),
        ("rubrics", True, 1, CLBENCH),
        ("math", True, 0, ("Accuracy (95% intervals over problems)", "Accuracy, paired by problem", "all problems")),
        (
            "code",
            True,
            0,
            ("Accuracy (pass@1; 95% intervals over problems)", "Accuracy, paired by problem", "all problems"),
        ),
        ("math", False, 0, ("Accuracy (95% intervals over contexts)", "Accuracy, paired by task", "all tasks")),
        ("mine", True, 0, ("Solve rate (95% intervals over contexts)", "Solve rate, paired by task", "all tasks")),
    ],
)
def test_every_data_set_has_its_own_words(grader: str, alone: bool, rubrics: int, words: tuple[str, ...]) -> None:
    scores = [
        Graded(f"{n}", arm, f"{n}", "", "", float(n % 2 or arm == "guided"), (0, rubrics), None, 5000 * n)
        for arm in ("plain", "guided")
        for n in range(8)
    ]
    scores = [one._replace(grader=grader, alone=alone) for one in scores]
    found = compared(scores, [Versus("guided", "plain", False)])
    tables = score_tables(scores, found)
    said = [*(str(table.title) for table in tables), *(str(table.caption) for table in tables), *verdict(found, scores)]
    said += verdict([], [one for one in scores if one.arm == "plain"])
    said += [str(column.header) for table in tables for column in table.columns]
    numbers = summary(scores, found)
    shown = ["plain", "guided"]
    said.append(page("a", said, numbers, found, tables, shown=shown, words=words_of(scores), note=""))
    writer = SimpleNamespace(add_scalar=lambda tag, *_: said.append(tag), flush=lambda: None)
    log_scores(writer, scores, found)
    add_solve_rates(run := Summary(), scores, found)
    said += [name for cells in run.cells.values() for name in cells]
    text = "\n".join(said).replace("all\n", "all ")
    assert all(word in text for word in words)
    tag = "accuracy" if words[0].startswith("Accuracy") else "solve_rate"
    assert {f"guided/{tag}/{words[2]}", f"guided/{tag}_against/plain/value"} <= set(said)
    assert ("solved" in run.cells["plain"]) == (tag == "solve_rate")
    if words[2] == "all problems":
        assert not any(word in text for word in ("Solve rate", "rubric", "context", "tasks"))
    else:
        assert "problem" not in text


def test_no_difference_is_no_interval() -> None:
    scores = graded("plain", [1, 0, 1, 0]) + graded("guided", [1, 0, 1, 0])
    table = comparison_table(compared(scores, [Versus("guided", "plain", False)]))
    cells = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert (cells["difference"], cells["finds"], cells["p"]) == ("none", "nothing", "1.000")
