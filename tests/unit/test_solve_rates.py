"""Which arms are compared with which, and the tables of solve rates."""

from __future__ import annotations

import io

from rich.console import Console

from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.matched_entropy import MatchedEntropy
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.methods.guided import Guided
from dgd_lightning.modules.arms import Arm, control_of
from dgd_lightning.report.print_tables import print_tables
from dgd_lightning.report.solve_rates import comparison_table, rate_table
from dgd_lightning.scoring.graded import ArmFacts, Graded, Versus, comparisons
from dgd_lightning.scoring.summary import compared

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


def test_no_difference_is_no_interval() -> None:
    scores = graded("plain", [1, 0, 1, 0]) + graded("guided", [1, 0, 1, 0])
    table = comparison_table(compared(scores, [Versus("guided", "plain", False)]))
    cells = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert (cells["difference"], cells["finds"], cells["p"]) == ("none", "nothing", "1.000")
