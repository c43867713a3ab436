"""What evaluation reads: CL-bench from the Hub, subsets for development, and the columns that graders need."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dgd_lightning.data import contexts as contexts_module
from dgd_lightning.data import prompts as prompts_module
from dgd_lightning.data.contexts import ContextsData
from dgd_lightning.data.prompts import HubData, PromptsData
from dgd_lightning.data.rows import HubRows, Row
from dgd_lightning.data.tasks import Subset, TaskData, context_of
from dgd_lightning.errors import InputError
from dgd_lightning.scoring.code_grader import CodeGrader
from dgd_lightning.scoring.math_grader import MathGrader
from dgd_lightning.types import Task

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"A": 30, "B": 20, "C": 3}  # contexts of each category


def rows() -> list[dict[str, Any]]:
    """Contexts of one to four tasks."""
    made = []
    for category, contexts in SIZES.items():
        for number in range(contexts):
            for task in range(1 + number % 4):
                metadata = {"task_id": f"{category}{number}-{task}", "context_id": f"{category}{number}"}
                metadata |= {"context_category": category, "sub_category": "s"}
                made.append({"messages": [{"role": "user", "content": "q"}], "rubrics": ["r"], "metadata": metadata})
    return made


def written(tmp_path: Path, made: list[dict[str, Any]]) -> str:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def kept(data: ContextsData) -> set[str]:
    return {context_of(task) for task in data.tasks}


def test_a_subset_has_its_share_of_every_category_in_whole_contexts(tmp_path: Path) -> None:
    made = rows()
    path = written(tmp_path, made)
    data = ContextsData(path, subset=Subset(0.1))
    assert Counter(context[0] for context in kept(data)) == {"A": 3, "B": 2, "C": 1}
    wanted = [row["metadata"]["task_id"] for row in made if row["metadata"]["context_id"] in kept(data)]
    assert [task.idx for task in data.tasks] == wanted  # whole contexts, in the file's order
    random.Random(1).shuffle(made)
    assert kept(ContextsData(written(tmp_path, made), subset=Subset(0.1))) == kept(data)
    assert kept(data) < kept(ContextsData(path, subset=Subset(0.3)))
    assert kept(ContextsData(path, subset=Subset(0.1, seed=1))) != kept(data)
    assert kept(ContextsData(path, subset=Subset(1.0))) == kept(ContextsData(path))
    only = ContextsData(path, category="B", subset=Subset(0.1), limit=1)
    assert len(only.tasks) == 1
    assert kept(only) <= kept(data)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan"), True])
def test_a_share_that_is_none_is_told(share: Any) -> None:
    with pytest.raises(InputError, match=r"data\.subset\.share: expected a finite number above 0 and at most 1"):
        Subset(share)


def test_a_fixed_subset_stays_what_it_was(tmp_path: Path) -> None:
    """Development sets of two releases are the same."""
    data = ContextsData(written(tmp_path, rows()), subset=Subset(0.1))
    assert sorted(kept(data)) == FIXED


# By `printf "0\0%s" ID | sha256sum`, the first three of A, two of B, one of C.
COMMIT = "c" * 40
FIXED = ["A0", "A11", "A15", "B15", "B9", "C0"]


def stand_in(monkeypatch: pytest.MonkeyPatch, module: Any, values: list[dict[str, Any]]) -> list[Any]:
    """Rows in place of the Hub's; what was asked for."""
    asked: list[Any] = []

    def load(path: str, **options: Any) -> HubRows:
        asked.append((path, options))
        return HubRows((Row(f"data.path row {at}", at, dict(value)) for at, value in enumerate(values, 1)), COMMIT)

    monkeypatch.setattr(module, "load_rows", load)
    return asked


def test_contexts_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = stand_in(monkeypatch, contexts_module, rows())
    data = ContextsData("tencent/CL-bench", revision="main", category=["A", "C"])
    assert {task.row["metadata"]["context_category"] for task in data.tasks} == {"A", "C"}
    assert data.is_clbench
    options = {"split": "train", "revision": "main"}
    assert asked == [("tencent/CL-bench", options)]
    with pytest.raises(InputError, match=r"data\.path: expected an existing file"):
        _ = ContextsData("folder/none.jsonl").tasks  # a file that is not there is none of the Hub's
    with pytest.raises(InputError, match=r"data\.category: expected one of A, B, C, received Z"):
        _ = ContextsData("tencent/CL-bench", category="Z").tasks


def configured(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CONFIGS / "decode" / f"{name}.yaml").read_text())["data"]["init_args"])


MBPP = {
    "task_id": 11,
    "text": "Write a function to drop a {prompt} of two numbers.",
    "code": "def drop(a, b):\n    return a",
    "test_list": ["assert drop(1, 2) == 1", "assert drop(3, 4) == 3"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def test_the_columns_that_graders_need_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {
        "gsm8k": {"question": "1+1?", "answer": "2\n#### 2"},
        "math500": {"problem": "$1+1$?", "solution": "\\boxed{2}", "answer": "2", "subject": "Algebra", "level": 1,
                    "unique_id": "test/algebra/1.json"},
        "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): ...",
                      "canonical_solution": "    return 1\n"},
        "mbpp": MBPP,
        "mtbench": {"prompt": ["First?", "Second?"], "prompt_id": 7, "category": "writing", "reference": []},
    }  # fmt: skip
    for name, row in samples.items():
        stand_in(monkeypatch, prompts_module, [row])
        (task,) = HubData(**configured(name)).tasks
        assert task.row == row
        graders: list[Any] = [MathGrader(workers=1), CodeGrader(allow_code_execution=True)]
        takes = [grader.name for grader in graders if grader.takes({**task.row, "idx": task.idx})]
        expected = {"gsm8k": ["math"], "math500": ["math"], "humaneval": ["code"], "mbpp": ["code"], "mtbench": []}
        assert takes == expected[name], name
        for grader in graders:
            grader.close()


def test_templates_take_other_texts_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, prompts_module, [MBPP])
    (task,) = HubData(**configured("mbpp")).tasks
    assert task.idx == "11"
    content = (task.messages or [{}])[-1]["content"]
    assert "drop a {prompt} of two numbers." in content  # what a text holds is not filled in turn
    assert "\n".join(MBPP["test_list"]) in content  # type: ignore[arg-type]
    assert "return a" not in content


def test_of_turns_the_first_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, prompts_module, [{"prompt": ["First {turns}?", "Second?"], "prompt_id": 7}])
    (task,) = HubData(**configured("mtbench")).tasks
    assert task.messages == [{"role": "user", "content": "First {turns}?"}]
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"turns": []}) + "\n")
    with pytest.raises(InputError, match="expected a prompt in 'turns', received an empty text"):
        _ = PromptsData(str(path), field="turns").tasks


def test_a_template_tells_no_gold_answer() -> None:
    with pytest.raises(InputError, match=r"data\.template"):
        PromptsData("p.jsonl", field="q", template="{prompt} {answer}")
    kept = PromptsData("p.jsonl", field="q", template=r"{prompt} End with \boxed{answer}.")
    (task,) = kept.parse([Row("row 1", 1, {"q": "2 + 2?", "answer": "4"})])
    assert task.messages is not None
    assert task.messages[-1]["content"] == r"2 + 2? End with \boxed{answer}."


def test_prompts_from_graded_rows_carry_no_old_score() -> None:
    old = {
        "q": "2 + 2?",
        "answer": "4",
        "model_output": "5",
        "score": 0,
        "grading_rationale": "no",
        "dgd": {"arm": "a"},
    }
    fresh = PromptsData("p.jsonl", field="q")
    (task,) = fresh.parse([Row("row 1", 1, old)])
    assert task.row == {"q": "2 + 2?", "answer": "4"}


class Counted(TaskData):
    """Contexts of several tasks."""

    def __init__(self, contexts: int, tasks: int) -> None:
        super().__init__(batch_size=2)
        self.contexts, self.per_context = contexts, tasks

    def read(self) -> list[Task]:
        return [
            Task(f"{c}-{t}", None, "text", {"metadata": {"context_id": str(c)}})
            for c in range(self.contexts)
            for t in range(self.per_context)
        ]


@pytest.mark.parametrize(("contexts", "ranks"), [(3, 4), (2, 3), (5, 2), (8, 4)])
def test_no_rank_is_without_work_where_beginnings_are_shared(contexts: int, ranks: int) -> None:
    """A rank without a batch would never meet the others at the end of the run."""
    data = Counted(contexts, 4)
    data.check_ranks(ranks)
    shards = data.shards(ranks, SimpleNamespace(ttt=None, reuse_prefix=True))
    assert all(shards)
    assert sorted(group for shard in shards for group in shard) == list(range(len(data.groups)))
