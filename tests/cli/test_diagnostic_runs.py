"""`dgd test` of a diagnostic: rows against plain transformers, the printed table and verdict, resuming, mistakes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_tools import Config, Dgd, TinyPair, chat_row, check_error, ranks_of, write_jsonl, write_training
from fork_server import launch

from dgd_lightning import load_pair, run_folder
from dgd_lightning.callbacks import diagnostic_report
from dgd_lightning.data.tasks import Task
from dgd_lightning.modules.diagnostic import Diagnostic

CLOSE = 1e-6  # fp64 log-probabilities of random readers
FIT = {"steps": 4, "lr": 0.05, "rank": 2, "anchors_per_step": 8, "validation_texts": 0, "holdout": 0.0}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are what most tests here are about: no pictures, but where the report is looked at."""
    if request.node.name != "test_the_lab_s_table_and_verdict":
        monkeypatch.setattr(diagnostic_report, "figures", lambda found: {})


def question(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} + {number}? " + "a" * number, "answer": f"It is {2 * number}, of course."}


def written(tmp_path: Path, pair: TinyPair, rows: list[Any] | None = None, **changes: Any) -> Path:
    """A YAML for `dgd test` on questions with answers; ``model``, ``data`` and ``trainer`` add to the settings."""
    path = write_jsonl(tmp_path / "sums.jsonl", [question(n) for n in range(1, 7)] if rows is None else rows)
    settings = {
        "model": {
            "class_path": changes.get("model_class", "Diagnostic"),
            "init_args": {"target": str(pair.target), "draft": str(pair.draft), **changes.get("model", {})},
        },
        "data": {
            "class_path": changes.get("data_class", "PromptsData"),
            "init_args": changes.get("data", {"path": str(path), "field": "question", "batch_size": 2}),
        },
        "trainer": {"accelerator": "cpu", "devices": 1, **changes.get("trainer", {})},
        "logs_dir": str(tmp_path / "logs"),
    }
    (tmp_path / "check.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "check.yaml"


def folder_of(tmp_path: Path, version: int = 0, logs: str = "logs") -> Path:
    return tmp_path / logs / "check" / f"version_{version}"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(run_folder.read_predictions(folder, run_folder.DIAGNOSTIC))


def test_rows_say_what_transformers_says(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    readouts = {"no 1": {"class_path": "AblatedDraft", "init_args": {"ablate": [1], "by": "zero"}}}
    run = dgd("test", "--config", written(tmp_path, tiny_pair, model={"layers": [0, 3], "readouts": readouts}))
    assert (run.code, run.err) == (0, "")
    rows = rows_of(folder_of(tmp_path))
    assert [row["idx"] for row in rows] == [f"sums-{n}" for n in range(1, 7)]
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    model = pair.target.model
    for number, row in enumerate(rows, 1):
        record = row["dgd"]
        assert pair.tokenizer.decode(record["answer_ids"]) == question(number)["answer"]
        readers = record["readers"]
        assert list(readers) == ["target", "draft", "shuffled features", "random features", "layer 0", "layer 3",
                                 "no 1", "slot 2", "slot 3"]  # fmt: skip
        prompt = pair.tokenizer(f"<s>user:{question(number)['question']}<e><s>assistant:")["input_ids"]
        assert record["prompt_tokens"] == len(prompt)
        answer = record["answer_ids"]
        with torch.no_grad():
            output = model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
        early = model.get_output_embeddings()(model.get_decoder().norm(output.hidden_states[1]))
        for name, logits in (("target", output.logits), ("layer 0", early), ("layer 3", output.logits)):
            distribution = logits[0, len(prompt) - 1 : -1].softmax(-1)
            own = distribution.gather(1, torch.tensor(answer)[:, None])
            assert readers[name]["rank"] == (1 + (distribution > own).sum(1)).tolist()
            assert torch.tensor(readers[name]["log_probability"]) == pytest.approx(own[:, 0].log(), abs=CLOSE)
        distribution = output.logits[0, len(prompt) - 1 : -1].softmax(-1)
        assert record["confidence"] == pytest.approx(distribution.amax(1).tolist(), abs=CLOSE)
        assert readers["slot 3"]["rank"][:2] == [None, None]
        assert all(rank >= 1 for rank in readers["slot 3"]["rank"][2:])
        assert readers["draft"] != readers["no 1"]
    assert sorted(path.name for path in folder_of(tmp_path).iterdir() if "tfevents" not in path.name) == [
        "DONE", "config.yaml", "diagnostic.jsonl", "diagnostic.txt", "diagnostic_summary.json", "hparams.yaml",
        "plots", "provenance.json",
    ]  # fmt: skip


def test_the_lab_s_table_and_verdict(dgd: Dgd, tmp_path: Path) -> None:
    run = dgd("test", "--config", CONFIGS / "diagnostic" / "lab.yaml", "--logs_dir", tmp_path / "logs",
              "--data.contexts_per_family", "2", "--data.families", "[natural_history, dictation, series]",
              "--trainer.accelerator", "cpu", "--verbose")  # fmt: skip
    assert (run.code, run.err) == (0, "")
    assert "6 contexts" in run.out
    lines = {line.split("│")[1].strip(): line for line in run.out.splitlines() if line.startswith("│")}
    assert {"target", "draft (slot 1)", "random features", "shuffled features", "slot 7", "layer 4"} <= lines.keys()
    for words in ("RANK DECIDES", "these tokens decide", "All answer tokens", "does not decide"):
        assert words in run.out
    assert "NO-GO: " in run.out  # the bundled pair's target has learnt its contexts
    folder = tmp_path / "logs" / "diagnostic-lab" / "version_0"
    assert (folder / "diagnostic.txt").read_text().strip().splitlines()[0] in run.out
    told = json.loads((folder / "diagnostic_summary.json").read_text())
    cells = told["buckets"]["all tokens"]
    assert cells["target"]["placement"]["top_1"] > cells["draft"]["placement"]["top_1"] > 0.5
    assert cells["draft"]["control"]["net"]["low"] > 0 > cells["random features"]["rank"]["net"]["high"]
    pictures = sorted(path.name for path in (folder / "plots").iterdir())
    assert pictures == ["confidence.png", "depth.png", "ranks.png", "slots.png"]
    assert all((folder / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "diagnostic/depth" in b"".join(p.read_bytes() for p in folder.glob("*tfevents*")).decode(errors="replace")


def test_an_adapted_draft_is_read_beside_the_draft(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pair)
    assert dgd("test", "--config", path).code == 0
    run = dgd("test", "--config", written(tmp_path, tiny_pair, model={"ttt": FIT, "save_adapters": True}))
    assert (run.code, run.err) == (0, "")
    assert "draft + TTT" in run.out
    assert "adapters kept for 6 of them" in run.out
    assert "adapted draft" in run.out
    for plain, row in zip(rows_of(folder_of(tmp_path, 0)), rows_of(folder_of(tmp_path, 1)), strict=True):
        assert row["dgd"]["ttt"]["kept"]
        readers = row["dgd"]["readers"]
        adapted = readers.pop("draft + TTT")
        assert readers == plain["dgd"]["readers"]  # an adapter leaves nothing behind
        assert adapted["rank"] != readers["draft"]["rank"]
        assert None not in adapted["rank"]
    assert len(list((folder_of(tmp_path, 1) / "adapters").iterdir())) == 6


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning hears no second Ctrl-C while it ends a run, and the process none ever after; here it goes on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_interrupted_diagnostic_continues(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    """After Ctrl-C in the middle of a group. That a killed process leaves as much is tested in predict: one writer."""
    path = written(tmp_path, tiny_pair, [question(n) for n in range(1, 13)])
    folder = folder_of(tmp_path)
    shard = run_folder.shard(folder, 0, run_folder.DIAGNOSTIC)
    row_of = Diagnostic.row

    def interrupted(self: Diagnostic, task: Task) -> dict[str, Any]:
        if task.idx == "sums-6":
            raise KeyboardInterrupt
        return row_of(self, task)

    monkeypatch.setattr(Diagnostic, "row", interrupted)
    run = dgd("test", "--config", path)
    assert run.code == 130
    assert "dgd: interrupted; the same command continues" in run.err
    kept = [row for _, row in run_folder.read_rows(shard)]
    assert len(kept) == 4
    with shard.open("a") as file:  # as if the kill had come in the middle of a write
        file.write('{"idx": "sums-11", "dg')

    read: list[str] = []
    monkeypatch.setattr(Diagnostic, "row", lambda self, task: (read.append(task.idx), row_of(self, task))[1])
    run = dgd("test", "--config", path)
    assert (run.code, run.err) == (0, "")
    assert f"continuing {folder}: 4 of 12 rows are there" in run.out
    assert read == [f"sums-{n}" for n in range(5, 13)]
    assert (folder / "DONE").exists()
    assert not folder_of(tmp_path, 1).exists()

    assert dgd("test", "--config", path, "--logs_dir", tmp_path / "whole").code == 0
    assert rows_of(folder) == rows_of(folder_of(tmp_path, logs="whole"))
    texts = [(at / "diagnostic.txt").read_text() for at in (folder, folder_of(tmp_path, logs="whole"))]
    assert texts[0] == texts[1]


def test_a_draft_of_other_layers_is_trained_and_diagnosed(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    made: dict[str, Any] = {"target_layer_ids": [2], "export_dir": str(tmp_path / "deep")}
    run = dgd("fit", "--config", write_training(tmp_path, tiny_pair, model=made))
    assert run.code == 0, run.err
    draft = load_pair(tiny_pair.target, tmp_path / "deep", device="cpu").draft
    assert draft is not None
    assert draft.config.target_layer_ids == (2,)
    assert draft.fc.weight.shape == (32, 32)
    readouts = {"none": {"class_path": "AblatedDraft", "init_args": {"ablate": [2]}}}
    run = dgd(
        "test", "--config", written(tmp_path, tiny_pair, model={"draft": str(tmp_path / "deep"), "readouts": readouts})
    )
    assert run.code == 0, run.err
    last = max((tmp_path / "logs").rglob("diagnostic.txt"), key=lambda path: path.stat().st_mtime)
    assert "Further readers against the draft as it is" in last.read_text()
    assert "Further readers" not in run.out  # nobody asked for all tables
    for layers in ([], [3, 6], [-1]):
        run = dgd("fit", "--config", write_training(tmp_path, tiny_pair, model={**made, "target_layer_ids": layers}))
        check_error(run, "model.target_layer_ids", "0…3", f"received {layers}")


@pytest.mark.slow
def test_two_ranks_equal_one(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pair)
    two = launch("test", "--config", path, *ranks_of(2), "--logs_dir", tmp_path / "two")
    assert dgd("test", "--config", path).code == 0
    out, err = two.communicate(timeout=300)
    assert two.returncode == 0, out + err
    assert rows_of(folder_of(tmp_path, logs="two")) == rows_of(folder_of(tmp_path))
    assert out.count("run folder:") == 1


def test_too_long_answers(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    rows = [question(1), {"question": "Long?", "answer": "x" * 600}]  # of 512 positions
    check_error(dgd("test", "--config", written(tmp_path, tiny_pair, rows)), "task sums-2", "at most 512 tokens")
    assert not folder_of(tmp_path).exists()
    run = dgd("test", "--config", written(tmp_path, tiny_pair, rows, model={"too_long": "skip"}))
    assert run.code == 0
    assert "1 gold answer of 1 context," in run.out
    assert "1 task skipped, too long" in run.out
    assert "more than fit" in rows_of(folder_of(tmp_path))[1]["dgd"]["skipped"]
    run = dgd("test", "--config", written(tmp_path, tiny_pair, rows[1:], model={"too_long": "skip"}))
    assert run.code == 0
    assert "no answer fits the target: 1 tasks were skipped" in run.out


ABLATED = {"class_path": "AblatedDraft", "init_args": {"ablate": [2]}}


@pytest.mark.parametrize(
    ("model", "argument", "words"),
    [
        ({"draft": None}, "model.draft", ("a draft",)),
        ({"layers": [0, 6]}, "model.layers", ("from 0 to 3", "received 6")),
        ({"layers": [-1]}, "model.layers", ("from 0 to 3",)),
        ({"layers": ["deep"]}, "model.layers", ("deep",)),
        ({"layers": "all"}, "model.layers", ("all",)),
        ({"confidence_edges": [0.9, 0.5]}, "model.confidence_edges", ("ascending",)),
        ({"confidence_edges": [50.0]}, "model.confidence_edges", ("0 … 1",)),
        ({"chunk": 0}, "model.chunk", ("at least 1",)),
        ({"answer_field": "response"}, "task sums-1", ("'response'", "fields question, answer")),
        ({"readouts": {"no 2": ABLATED}}, "readout.ablate", ("(1, 3)", "[2]")),
        ({"readouts": {"layer 1": ABLATED}}, "model.readouts", ("rename",)),
        ({"readouts": {"x": {"class_path": "LogitLens", "init_args": {"layer": 77}}}}, "readout.layer", ("0…3",)),
        ({"ttt": {"steps": -1}}, "model.ttt.steps", ("0",)),
    ],
)
def test_mistakes_are_one_line(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, model: dict[str, Any], argument: str, words: tuple[str, ...]
) -> None:
    run = dgd("test", "--config", written(tmp_path, tiny_pair, model=model))
    check_error(run, argument, *words)
    assert not folder_of(tmp_path).exists()  # a start that fails leaves no version behind


def test_clbench_rows_have_no_answer_and_are_not_adapted_to(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = {"path": str(write_jsonl(tmp_path / "bench.jsonl", [chat_row(1, 0), chat_row(1, 1)]))}
    where = {"data": data, "data_class": "ContextsData"}
    check_error(dgd("test", "--config", written(tmp_path, tiny_pair, **where)), "task t1-0", "rubrics, and no gold")
    answered = {"path": str(write_jsonl(tmp_path / "bench.jsonl", [chat_row(1, 0, answer="yes")]))}
    where["data"] = answered
    assert dgd("test", "--config", written(tmp_path, tiny_pair, **where)).code == 0  # reading is no adapting
    run = dgd("test", "--config", written(tmp_path, tiny_pair, **where, model={"ttt": FIT}))
    check_error(run, "model.ttt", "CL-bench's licence is evaluation only")
    accepted = {"ttt": FIT, "accept_clbench_license": True}
    assert dgd("test", "--config", written(tmp_path, tiny_pair, **where, model=accepted)).code == 0


def test_modules_and_commands_that_do_not_go_together(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, config: Config
) -> None:
    check_error(dgd("predict", "--config", written(tmp_path, tiny_pair)), "subcommand", "dgd test")
    check_error(dgd("validate", "--config", written(tmp_path, tiny_pair)), "subcommand", "dgd test")
    for command in ("test", "fit", "validate"):
        check_error(dgd(command, "--config", config()), "subcommand", "dgd predict")
    (tmp_path / "guide.txt").write_text("The heron haunts the marsh.")
    where = {"data_class": "FileContext", "data": {"path": str(tmp_path / "guide.txt")}}
    check_error(dgd("test", "--config", written(tmp_path, tiny_pair, **where)), "data", "TaskData")
    path = written(tmp_path, tiny_pair, trainer={"logger": False})
    check_error(dgd("test", "--config", path), "trainer.logger", "rows")
    path = written(tmp_path, tiny_pair, trainer={"inference_mode": True}, model={"ttt": FIT})
    check_error(dgd("test", "--config", path), "trainer.inference_mode", "gradients")
    path = written(tmp_path, tiny_pair, trainer={"precision": "bf16-mixed"})
    check_error(dgd("test", "--config", path), "trainer.precision", "model.dtype")
