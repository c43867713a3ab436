"""CL-bench's rows are recognised wherever they come from, and nothing is fitted to them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dgd_lightning.clbench import is_clbench_row, with_context
from dgd_lightning.commands.trials import check_rows
from dgd_lightning.data.contexts import ContextsData
from dgd_lightning.data.licence import LicensedData, check_clbench
from dgd_lightning.data.one_context import FileContext
from dgd_lightning.data.prompts import HubData, PromptsData
from dgd_lightning.data.responses import ResponsesData
from dgd_lightning.data.without_context import without_context
from dgd_lightning.errors import InputError
from dgd_lightning.lab.contexts import LabContexts
from dgd_lightning.lab.one_context import LabOneContext
from dgd_lightning.modules.adaptation import contexts_to_adapt
from dgd_lightning.scoring.score_run import rows_of

METADATA = {"task_id": "t", "context_id": "c", "context_category": "Rules", "sub_category": "s"}
ROW = {"messages": [{"role": "user", "content": "q"}], "rubrics": ["r"], "metadata": METADATA}
LIFE_METADATA = {"task_id": "t", "context_category": "Game", "context_subcategory": "Logs"}
LIFE = {"messages": [{"role": "user", "content": "The log.\n<|TASK|> Who won?"}], "rubrics": ["r"]}
LIFE |= {"metadata": LIFE_METADATA}
LAB = {**ROW, "metadata": {**METADATA, "lab": {}}}
FLAT = {"question": "What is it?", "context_id": "c", "sub_category": "s"}


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "source", "found"),
    [
        (ROW, "x.jsonl", True),
        ({"prompt": "q", "metadata": METADATA}, "x.jsonl", True),  # a prediction's row, or what was left of one
        ({"prompt": "q", "metadata": json.dumps(METADATA)}, "x.csv", True),
        (FLAT, "x.jsonl", True),
        ({"prompt": "q", **{f"metadata.{key}": value for key, value in METADATA.items()}}, "x.jsonl", True),
        ({"prompt": "q"}, "tencent/CL-bench", True),
        ({"prompt": "q"}, "data/cl_bench_dev.jsonl", True),
        ({}, Path("CL-bench.context-3.txt"), True),
        (LIFE, "x.jsonl", True),
        ({"prompt": "q", "metadata": LIFE_METADATA}, "x.jsonl", True),
        ({"prompt": "q", "metadata.context_subcategory": "Logs"}, "x.jsonl", True),
        ({"messages": LIFE["messages"]}, "x.jsonl", True),  # its mark alone
        ({"prompt": "The log.\n<|TASK|> Who won?"}, "x.jsonl", True),
        ({"prompt": "q", "rubrics": ["r"], "task_id": "t"}, "x.jsonl", True),
        ({"prompt": "q", **{f"metadata_{key}": value for key, value in LIFE_METADATA.items()}}, "x.jsonl", True),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Log\n<|TASK|> Who?"}]}]},
            "x.jsonl",
            True,
        ),
        ({"conversations": [{"from": "human", "value": "The log.\n<|TASK|> Who won?"}]}, "x.jsonl", True),
        (LAB, "clbench_format.jsonl", False),
        (LAB, "x.jsonl", False),
        ({"prompt": "q"}, "clbench/own.jsonl", False),  # a folder's name is no source's
        ({"prompt": "q", "task_id": "HumanEval/0", "metadata": None}, "HumanEval.jsonl", False),
        ({"prompt": "q", "metadata": {"context_id": "own"}}, "x.jsonl", False),
    ],
)
def test_which_rows_may_be_clbench_s(row: dict[str, Any], source: str | Path, found: bool) -> None:
    assert is_clbench_row(row, source) is found


def test_a_text_with_life_s_mark_is_guarded(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("The log.\n<|TASK|> Who won?")
    assert FileContext(str(path)).is_clbench
    path.write_text("The log.\nWho won?")
    assert not FileContext(str(path)).is_clbench


def life(idx: str, *contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return {**LIFE, "messages": messages, "metadata": {**LIFE_METADATA, "task_id": idx}}


def test_life_s_tasks_of_one_context_belong_together(tmp_path: Path) -> None:
    rows = [
        life("a", "The log.\n<|TASK|> Who won?"),
        life("b", "The log. \n<|TASK|> Who lost?"),
        life("c", "Another log.\n<|TASK|> Who won?"),
        life("d", "The log.\n<|TASK|> Who won?", "Ann.", "And then?"),
        life("e", "A diary. What was first?", "Rain.", "What was second?"),
        life("f", "A diary. What was first?", "Rain.", "What was third?"),
        life("g", "One text alone"),
    ]
    data = ContextsData(written(tmp_path / "life.jsonl", *rows), sub_category="Logs")
    contexts = [task.row["metadata"]["context_id"] for task in data.tasks]
    assert [contexts.index(context) for context in contexts] == [0, 0, 2, 0, 4, 4, 6]
    assert data.is_clbench
    assert data.tasks[0].messages == rows[0]["messages"]  # as they are, the mark included
    bare = without_context(data.tasks[0], data.tasks[1:2])
    assert bare.messages == [{"role": "user", "content": "Who won?"}]
    # graded by another program, without ids of contexts
    graded = [{**row, "model_output": "x", "score": 1, "requirement_status": ["yes"]} for row in rows]
    found = [row["metadata"]["context_id"] for row in rows_of(Path(written(tmp_path / "g.jsonl", *graded)))]
    assert found == contexts
    assert with_context(ROW) is ROW


def data_modules(folder: Path, monkeypatch: pytest.MonkeyPatch, clbench: bool | None) -> list[LicensedData]:
    """Every data module that reads rows from elsewhere, with some that may be CL-bench's."""
    rows = written(folder / "rows.jsonl", LAB, ROW | {"metadata": {**METADATA, "task_id": "u", "context_id": "d"}})
    text = folder / "CL-bench-context.txt"
    text.write_text("A context.")
    prompts = {"path": written(folder / "flat.jsonl", FLAT), "field": "question", "clbench": clbench}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    hub = folder / "set"
    hub.mkdir()
    written(hub / "test.jsonl", FLAT)
    return [
        ContextsData(rows, clbench=clbench),
        PromptsData(**prompts),  # type: ignore[arg-type]
        HubData(str(hub), field="question", clbench=clbench),
        FileContext(rows, context_id="d", clbench=clbench),
        FileContext(str(text), clbench=clbench),
    ]


def test_no_data_module_hands_them_to_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in data_modules(tmp_path, monkeypatch, None):
        with pytest.raises(InputError, match=r"^model\.ttt: .*licence is evaluation only.*data\.clbench: false"):
            check_clbench(data, False, "model.ttt")
        check_clbench(data, True, "model.ttt")
    prompts = PromptsData(str(tmp_path / "flat.jsonl"), field="question")
    with pytest.raises(InputError, match="licence"):
        contexts_to_adapt(prompts, accepted=False, inference_mode=False)
    assert not FileContext(str(tmp_path / "rows.jsonl")).is_clbench  # its first context is the lab's


def test_rows_of_one_s_own_may_be_fitted_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [*data_modules(tmp_path, monkeypatch, False), LabContexts(contexts_per_family=1), LabOneContext()]
    assert [data.is_clbench for data in own] == [False] * len(own)


def test_predictions_on_them_train_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = {"idx": "0", "model_output": "text", "dgd": {"prompt_ids": [1, 2], "output_ids": [3, 4, 5]}}
    rows = [answered, {**answered, "idx": "1", "metadata": METADATA}]
    path = written(tmp_path / "answers.jsonl", *rows)
    for clbench, own, found in ((None, rows, True), (False, rows, False), (None, rows[:1], False)):
        data = ResponsesData(written(Path(path), *own), "lab", clbench=clbench, val_share=0.0)
        data.setup("fit")
        assert data.is_clbench is found


@pytest.mark.parametrize("permitted", ["no", "own rows", "permission"])
def test_a_sweep_chooses_nothing_by_them(tmp_path: Path, permitted: str) -> None:
    model = {"class_path": "Decoding", "init_args": {"accept_clbench_license": permitted == "permission"}}
    data = {"class_path": "ContextsData", "init_args": {"path": "x.jsonl"}}
    if permitted == "own rows":
        data["init_args"]["clbench"] = False  # type: ignore[index]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    written(tmp_path / "predictions.jsonl", {**ROW, "idx": "t", "dgd": {"arm": "a"}})
    if permitted == "no":
        with pytest.raises(InputError, match=r"^base: .*calibrating"):
            check_rows(tmp_path)
    else:
        check_rows(tmp_path)


def test_a_data_module_of_a_user_s_own_is_theirs_to_answer_for() -> None:
    check_clbench(SimpleNamespace(), False, "model.ttt")
