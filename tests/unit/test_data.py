"""Sources of tasks: formats, ids, filters, groups; prompts from chat templates."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.data import ContextsData, HubData, PromptsData
from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.one_context import FileContext
from dgd_lightning.data.rows import Row
from dgd_lightning.data.tasks import context_of, group_shards, group_tasks
from dgd_lightning.errors import InputError
from dgd_lightning.types import Task


def row(context: str, task: str, category: str = "A", **changes: Any) -> dict[str, Any]:
    metadata = {"task_id": task, "context_id": context, "context_category": category, "sub_category": "s"}
    return {"messages": [{"role": "user", "content": "q " + task}], "rubrics": ["r"], "metadata": metadata, **changes}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return str(path)


def test_contexts_keep_rows_and_drop_old_answers(tmp_path: Path) -> None:
    graded = {"idx": "t", "model_output": "old", "score": 1, "requirement_status": ["yes"], "grading_rationale": "good"}
    data = ContextsData(write(tmp_path / "x.jsonl", [row("c", "t", **graded, note=3)]))
    assert data.tasks[0].idx == "t"
    assert set(data.tasks[0].row) == {"messages", "rubrics", "metadata", "idx", "note"}


def test_huge_messages_pass(tmp_path: Path) -> None:
    long = row("c", "t")
    long["messages"][0]["content"] = "héllo " * 40_000
    assert ContextsData(write(tmp_path / "x.jsonl", [long])).tasks[0].messages == long["messages"]


def test_filters_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row("c", "1"), row("c", "2", "B"), row("d", "3", "B"), row("e", "4", "C")])
    assert [task.idx for task in ContextsData(path, category="B").tasks] == ["2", "3"]
    assert [task.idx for task in ContextsData(path, category=["B", "C"], limit=2).tasks] == ["2", "3"]
    with pytest.raises(InputError, match="expected one of A, B, C, received D"):
        _ = ContextsData(path, category="D").tasks


def test_groups_put_contexts_together() -> None:
    tasks = [Task(str(i), None, "p", row(context, str(i))) for i, context in enumerate("abacba")]
    groups = group_tasks(tasks, 4)
    assert ["".join(map(context_of, group)) for group in groups] == ["aaa", "bbc"]
    assert ["".join(map(context_of, group)) for group in group_tasks(tasks, 2)] == ["aa", "a", "bb", "c"]
    assert sorted(task.idx for group in groups for task in group) == list("012345")


def test_a_contexts_groups_stay_on_one_rank() -> None:
    tasks = [Task(str(i), None, "p", row(context, str(i))) for i, context in enumerate("aaaaabbbcdef")]
    groups = group_tasks(tasks, 2)
    assert ["".join(map(context_of, group)) for group in groups] == ["aa", "aa", "a", "bb", "b", "cd", "ef"]
    assert group_shards(groups, 1, together=True) == [[0, 1, 2, 3, 4, 5, 6]]
    assert group_shards(groups, 2, together=True) == [[0, 1, 2, 5], [3, 4, 6]]
    assert group_shards(groups, 5, together=True) == [[0, 1, 2], [3, 4], [5], [6], []]
    assert group_shards(groups, 2) == [[0, 2, 4, 6], [1, 3, 5]]  # nothing is done once per context


def test_more_ranks_than_can_share_the_work_are_told(tmp_path: Path) -> None:
    data = ContextsData(write(tmp_path / "x.jsonl", [row("c", str(i)) for i in range(6)]), batch_size=2)
    data.check_ranks(3)
    with pytest.raises(InputError, match="at most 3 ranks, one per group of 2 tasks"):
        data.check_ranks(4)
    with pytest.raises(InputError, match="at most 1 ranks, one per adapted context"):
        data.check_ranks(2, together=True)


def test_fingerprint_follows_what_the_model_sees(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row("c", "1"), row("c", "2")])
    first = ContextsData(path).fingerprint()
    assert ContextsData(path).fingerprint() == first
    assert ContextsData(path, batch_size=2).fingerprint() != first
    assert ContextsData(path, limit=1).fingerprint() != first
    write(tmp_path / "x.jsonl", [row("c", "1"), row("c", "3")])
    assert ContextsData(path).fingerprint() != first


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\nthree\n")
    text = PromptsData(str(tmp_path / "p.txt"), chat=False)
    assert [(task.idx, task.prompt) for task in text.tasks] == [("p-1", "one"), ("p-3", "three")]

    gsm8k = PromptsData(write(tmp_path / "g.jsonl", [{"question": "1+1?", "answer": "#### 2"}]), field="question")
    assert gsm8k.tasks[0] == Task(
        "g-1", [{"role": "user", "content": "1+1?"}], None, {"question": "1+1?", "answer": "#### 2"}
    )

    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as file:
        file.write(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}) + "\n")
    humaneval = PromptsData(
        str(tmp_path / "h.jsonl.gz"), id_field="task_id", template="Write:\n{prompt}", system="Be brief."
    )
    assert humaneval.tasks[0].idx == "HumanEval/0"
    assert [message["content"] for message in humaneval.tasks[0].messages or []] == ["Be brief.", "Write:\ndef f():\n"]

    (tmp_path / "m.json").write_text(json.dumps([{"prompt": "$x$ {y}?", "id": "a/1.json"}, {"prompt": "z", "id": 7}]))
    math = PromptsData(str(tmp_path / "m.json"), id_field="id", template="{prompt} \\boxed{}")
    assert [task.idx for task in math.tasks] == ["a/1.json", "7"]
    assert (math.tasks[0].messages or [{}])[0]["content"] == "$x$ {y}? \\boxed{}"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"a": 1}\n', {}, r"data.path line 1: expected the field 'prompt', received fields a"),
        (
            '{"prompt": 1}\n',
            {},
            r"data.path line 1: expected 'prompt' to be a text, a list of turns, or a chat, received int '1'",
        ),
        ('{"prompt": {"messages": [{}]}}\n', {}, r"'prompt' to be a text, .* name one inside it: prompt.messages"),
        ('{"prompt": " "}\n', {}, r"data.path line 1: .* an empty text"),
        ('{"prompt": "x"}\n\n{"prompt"\n', {}, r"data.path line 3: expected valid JSON"),
        (
            '{"prompt": "x", "id": "1"}\n{"prompt": "y", "id": 1}\n',
            {"id_field": "id"},
            r"line 2: .* already at .* line 1",
        ),
        ('{"prompt": "x"}\n', {"template": "nothing"}, r"data.template"),
        ('{"prompt": "x"}\n', {"chat": False, "system": "s"}, r"data.system"),
        ('{"prompt": "\\ud800"}\xff', {}, r"data.path line 1|data.path: expected UTF-8"),
        ('{"prompt": "x", "n": ' + "1" * 5000 + "}\n", {}, r"data.path line 1: .* 4300 digits"),
        ('{"prompt": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}\n", {}, r"data.path line 1: .* levels deep"),
    ],
)
def test_bad_prompts(tmp_path: Path, content: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        _ = PromptsData(str(tmp_path / "x.jsonl"), **options).tasks


def test_byte_order_mark_is_no_part_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "x"}).encode() + b"\n")
    assert PromptsData(str(tmp_path / "x.jsonl"), chat=False).tasks[0].prompt == "x"
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        file.write((tmp_path / "x.jsonl").read_bytes())
    assert PromptsData(str(tmp_path / "x.jsonl.gz"), chat=False).tasks[0].prompt == "x"


def test_damaged_gzip_is_told(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b'{"prompt": "x"}\n' * 1000))
    whole[20] ^= 255  # inside the compressed data: zlib, not gzip, complains
    (tmp_path / "x.jsonl.gz").write_bytes(whole)
    with pytest.raises(InputError, match=r"^data\.path: expected a readable file"):
        _ = PromptsData(str(tmp_path / "x.jsonl.gz")).tasks


def test_datasets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that `datasets` loads stands for a Hub id."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "test.jsonl", [{"question": f"q{i}", "key": i} for i in range(5)])
    options: dict[str, Any] = {"field": "question", "id_field": "key"}
    assert [task.idx for task in HubData(str(folder), **options).tasks] == list("01234")
    assert [task.idx for task in HubData(str(folder), streaming=True, limit=2, **options).tasks] == ["0", "1"]
    write(folder / "train.jsonl", [row("c", "1"), row("c", "2", "B")])
    (folder / "test.jsonl").unlink()
    contexts = HubData(str(folder), split="train", format="contexts", category="B")
    assert [task.messages for task in contexts.tasks] == [[{"role": "user", "content": "q 2"}]]
    with pytest.raises(InputError, match="split 'nope'"):
        _ = HubData(str(folder), split="nope", **options).tasks


class FakeTokenizer:
    """Words as tokens; special tokens only where they are asked for."""

    chat_template = "x"

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert options["add_generation_prompt"]
        assert not options["tokenize"]
        think = "think" if options["enable_thinking"] else "answer"
        return " ".join(message["content"] for message in messages) + " " + think

    def __call__(self, text: str, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [len(word) for word in text.split()]}


def test_chat_template_writes_its_own_special_tokens() -> None:
    chat, raw = Task("t", [{"role": "user", "content": "a bb"}], None, {}), Task("t", None, "a bb", {})
    assert prompt_ids(FakeTokenizer(), chat, enable_thinking=False).tolist() == [1, 2, 6]
    assert prompt_ids(FakeTokenizer(), chat, enable_thinking=True).tolist() == [1, 2, 5]
    assert prompt_ids(FakeTokenizer(), raw, enable_thinking=False).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="with a tokenizer, received none, for task 't'"):
        prompt_ids(None, raw, enable_thinking=False)
    with pytest.raises(InputError, match="task t: expected Unicode text"):
        prompt_ids(FakeTokenizer(), Task("t", None, "a\ud800", {}), enable_thinking=False)


class Rows(ContextsData):
    """Tasks of rows as a `datasets` id may give them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("unused")
        self.rows = rows

    def read(self) -> list[Task]:
        return parse_rows(Row(f"data.path row {i}", i, value) for i, value in enumerate(self.rows, 1))


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 2), b"\x89PNG", {"image": {1, 2}}])
def test_rows_that_json_cannot_hold_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^data\.path row 2: expected a value that JSON can hold in 'extra'"):
        _ = Rows([row("c", "1"), row("c", "2", extra=value)]).tasks
    prompts = PromptsData("x.jsonl", field="q")
    with pytest.raises(InputError, match=r"^data\.path row 1: .* in 'extra'"):
        prompts.parse([Row("data.path row 1", 1, {"q": "why", "extra": value})])
    # What an earlier answer left is dropped, so it need not be JSON.
    assert Rows([row("c", "1", score=value)]).tasks[0].idx == "1"


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_named(content: str, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "prompts.txt", "array.json", "context.txt"):
        path = tmp_path / name
        path.write_text(content)
        read: dict[str, Any] = {
            "rows.jsonl": ContextsData(str(path)).read,
            "context.txt": lambda path=path: FileContext(str(path)).prompts(None),
        }
        with pytest.raises(InputError, match=rf"^data\.path: expected a.* received the empty file {path}\."):
            read.get(name, PromptsData(str(path)).read)()
    (tmp_path / "array.json").write_text("[]")
    with pytest.raises(InputError, match=rf"^data\.path: .*{tmp_path / 'array.json'}"):
        _ = PromptsData(str(tmp_path / "array.json")).tasks


def test_the_commit_of_a_data_set_is_known_and_no_other_passes_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as `datasets` leaves it behind, read offline."""
    import datasets

    commit, other, cache = "a" * 40, "b" * 40, tmp_path / "cache"
    source = write(tmp_path / "rows.jsonl", [row("c", "t")])
    made = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(cache))
    folder = Path(made.cache_files[0]["filename"]).parent
    home = cache / "org___contexts" / "default" / "0.0.0" / commit
    home.parent.mkdir(parents=True)
    folder.rename(home)
    (home / "json-train.arrow").rename(home / "contexts-train.arrow")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        data = ContextsData("org/contexts", revision=revision)
        assert [task.idx for task in data.tasks] == ["t"]
        assert data.data_commit == commit
    with pytest.raises(InputError, match=rf"^data\.revision: expected the cached commit {commit}.*{other}"):
        _ = ContextsData("org/contexts", revision=other).tasks
    local = tmp_path / "local"
    local.mkdir()
    write(local / "train.jsonl", [row("c", "t")])
    data = HubData(str(local), split="train", format="contexts")
    assert len(data.tasks) == 1
    assert data.data_commit is None
