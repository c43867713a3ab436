"""The grader of a row, the lab's grader, and what scoring must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dgd_lightning
from dgd_lightning.errors import InputError
from dgd_lightning.grader import grader_for, package_graders
from dgd_lightning.lab.grader import LabGrader
from dgd_lightning.scoring.code_grader import CodeGrader
from dgd_lightning.scoring.math_grader import MathGrader

LAB = {
    "messages": [],
    "rubrics": ["names Ora", "one sentence"],
    "metadata": {"lab": {"checks": [{"type": "contains", "value": "Ora"}, {"type": "sentence"}]}},
}
ROWS = {
    "lab": LAB,
    "math": {"question": "?", "answer": "#### 1"},
    "code": {"prompt": "def f():\n", "entry_point": "f", "test": "", "canonical_solution": "", "task_id": "1"},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_goes_to_its_grader(name: str) -> None:
    graders = [LabGrader(), MathGrader(), CodeGrader()]
    assert [grader.name for grader in graders if grader.takes(ROWS[name])] == [name]
    assert grader_for(ROWS[name], graders).name == name


def test_other_rows_are_told() -> None:
    with pytest.raises(InputError, match=r"what one of the graders needs \(lab, math\), received .* fields messages"):
        grader_for({"messages": []}, [LabGrader(), MathGrader()])


@pytest.mark.parametrize("row", [{}, {"metadata": None}, {"metadata": {"lab": 3}}, {"answer": 3}, {"test_list": 3}])
def test_any_row_can_be_looked_at(row: dict[str, object]) -> None:
    assert not any(grader.takes(row) for grader in (LabGrader(), MathGrader(), CodeGrader()))


OPTIONS = {"judge": None, "allow_code_execution": False, "allow_no_isolation": False, "regrade": False}
OPTIONS |= {"code_workers": 1, "math_workers": 3}


def test_the_packages_graders_are_found_the_cheapest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)

    def names(**options: object) -> list[str]:
        return [grader.name for grader in package_graders({**OPTIONS, **options})]

    assert names() == ["as graded", "lab", "code", "math", "judge"]
    # without a judge, rows that one would take are told apart from those that nobody takes, judge or not
    missing = package_graders(OPTIONS)[-1]
    assert missing.takes({"rubrics": ["yes"]})
    assert not any(missing.takes({"rubrics": other}) for other in ("yes", [""], [{"rubric": "yes"}]))
    assert names(regrade=True) == ["lab", "code", "math", "judge"]
    assert names(leave=True) == ["as graded", "lab", "math"]
    assert names(leave=True, allow_code_execution=True) == ["as graded", "lab", "code", "math"]
    assert [grader.workers for grader in package_graders(OPTIONS)] == [1, 1, 1, 3, 1]


def test_lab() -> None:
    assert LabGrader().grade(LAB, "Ora lives.")[:3] == (1.0, ["yes", "yes"], "every rubric holds")
    assert LabGrader().grade(LAB, "Ora lives")[:3] == (0.0, ["yes", "no"], "one sentence")


def test_scoring_needs_no_torch() -> None:
    """`dgd score` starts fast, and where there is no torch at all."""
    modules = ["grader", "lab.grader", "scoring.math_grader", "scoring.code_grader"]
    script = (
        "import sys\nfor name in ('torch', 'lightning', 'transformers', 'numpy', 'sympy'): sys.modules[name] = None\n"
        + "".join(f"import dgd_lightning.{name}\n" for name in modules)
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(dgd_lightning.__file__).parents[1])
