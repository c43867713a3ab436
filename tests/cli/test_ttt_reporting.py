"""What test-time training tells people: its progress in predict, how a fit ended, and where its parts lie."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Config, Dgd, TinyPair, chat_row, check_error, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ttt_runs import FIT, fit_yaml, text_file
from torch import Tensor

from dgd_lightning.ttt.problem import AdaptProblem

ARMS = [{"name": "adapted", "method": "Speculative", "ttt": True}]
LINES = {"callbacks": [{"class_path": "DecodeProgress", "init_args": {"line_every": 0}}]}


@pytest.mark.parametrize("validation_texts", [0, 2])
def test_progress_shows_adaptation(validation_texts: int, config: Config, dgd: Dgd, tmp_path: Path) -> None:
    model = {"arms": ARMS, "ttt": {**FIT, "validation_texts": validation_texts, "validation_tokens": 16}}
    path = write_jsonl(tmp_path / "two.jsonl", [chat_row(2, 0), chat_row(3, 0), chat_row(3, 1)])
    run = dgd("predict", "--config", config(model, {"path": str(path), "clbench": False}, LINES))
    assert run.code == 0, run.err
    told = [line.split("; ", 1)[1] for line in run.out.splitlines() if "adapting to c3" in line]
    written = told.count("adapting to c3… the target writes validation texts")  # told of every text, for they take long
    assert written >= validation_texts
    assert bool(written) == bool(validation_texts)
    phases = ["the target reads it", *["the target writes validation texts"] * written, "the draft learns"]
    assert told[: len(phases)] == [f"adapting to c3… {phase}" for phase in phases]
    steps = told[len(phases) :]
    assert 0 < len(steps) <= FIT["steps"]  # it may stop early
    assert steps == [f"adapting to c3… step {step}/{FIT['steps']}" for step in range(1, len(steps) + 1)]


def end_of_fit(dgd: Dgd, path: Path, tmp_path: Path) -> tuple[list[str], float]:
    """The lines that a fit ends with, from the context's on, and the kept step in TensorBoard."""
    run = dgd("fit", "--config", path)
    assert run.code == 0, run.err
    folder = tmp_path / "logs" / "fit" / "version_0"
    lines = run.out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("context guide: ")) :]
    own = folder / "adapters" / "guide"
    saved = (own / "adapter_model.safetensors").exists()
    assert lines[-3:] == [
        f"adapter:    {own}" if saved else f"trace:      {own / 'trace.json'}",
        f"run folder: {folder}",
        f"curves:     tensorboard --logdir {folder.parent}",
    ]
    events = EventAccumulator(str(folder))
    events.Reload()
    (kept,) = events.Scalars("ttt/kept_step")
    assert kept.step == int(lines[0].rpartition(", ")[2].split()[0])  # "… 6 steps in 0.1 s"
    return lines[:-3], kept.value


@pytest.mark.parametrize(
    ("ttt", "kept", "words"),
    [
        ({}, 6, ["kept the weights of step 6"]),
        ({"lr": 0.0, "patience": 1}, 0, [
            "stopped early, after step 2 of 6: 1 scores in a row were no better",
            "kept nothing, the draft stays as it was: no step lowered the loss on the context’s end",
        ]),
        ({"validation_texts": 2, "validation_tokens": 16, "min_gain": 9.0}, 0, [
            "kept nothing, the draft stays as it was: on the validation texts", "900%",
        ]),
    ],
)  # fmt: skip
def test_a_fit_ends_with_what_it_kept_and_where_it_is(
    ttt: dict[str, Any],
    kept: int,
    words: list[str],
    dgd: Dgd,
    tiny_pair: TinyPair,
    tmp_path: Path,
) -> None:
    path = fit_yaml(tmp_path, tiny_pair, {"path": str(text_file(tmp_path))}, ttt={**FIT, **ttt})
    lines, step = end_of_fit(dgd, path, tmp_path)
    assert step == kept
    folder = tmp_path / "logs" / "fit" / "version_0" / "adapters" / "guide"
    assert json.loads((folder / "trace.json").read_text())["best_step"] == kept
    assert (len(list(folder.iterdir())) > 1) == (kept > 0)  # what changes nothing is not saved as an adapter
    assert all(any(word in line for line in lines) for word in words), lines


@pytest.mark.parametrize(("first", "hint"), [(3, "lower model.ttt.lr"), (0, "weights are damaged")])
def test_a_fit_whose_loss_is_no_number_fails_and_exports_nothing(
    first: int, hint: str, dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, out = AdaptProblem.loss, tmp_path / "out"

    def broken(self: AdaptProblem, step: int, **knobs: Any) -> Tensor:
        return loss(self, step, **knobs) * (float("nan") if step == first else 1.0)

    monkeypatch.setattr(AdaptProblem, "loss", broken)
    data = {"path": str(text_file(tmp_path))}
    run = dgd("fit", "--config", fit_yaml(tmp_path, tiny_pair, data, ttt=FIT, export_dir=str(out)))
    check_error(run, "model.ttt", f"received the loss of step {first + 1} was nan", f"Hint: {hint}", began=True)
    assert not out.exists()
    assert not list(tmp_path.glob("logs/**/adapter_model.safetensors"))


def test_nothing_is_exported_where_nothing_is_kept(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    data, out = {"path": str(text_file(tmp_path))}, tmp_path / "out"
    run = dgd("fit", "--config", fit_yaml(tmp_path, tiny_pair, data, ttt={**FIT, "lr": 0.0}, export_dir=str(out)))
    assert run.code == 0, run.err
    assert "kept nothing" in run.out
    assert "adapter:" not in run.out
    assert not out.exists()


def test_no_adapter_of_a_killed_start_is_left_beside_another_trace(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    path = fit_yaml(tmp_path, tiny_pair, {"path": str(text_file(tmp_path))}, ttt={**FIT, "lr": 0.0})
    assert dgd("fit", "--config", path).code == 0
    version = tmp_path / "logs" / "fit" / "version_0"
    (version / "DONE").unlink(missing_ok=True)
    stale = version / "adapters" / "guide" / "adapter_model.safetensors"
    stale.write_bytes(b"of another fit")
    assert dgd("fit", "--config", path).code == 0
    folders = sorted((tmp_path / "logs" / "fit").glob("version_*"))
    assert not (folders[-1] / "adapters" / "guide" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("command", ["fit", "predict"])
@pytest.mark.parametrize(
    ("arguments", "argument", "words"),
    [
        (["--model.ttt.rank", "0"], "model.ttt.rank", ("an integer of at least 1", "use e.g. 1")),
        (["--model.ttt.stepz", "3"], "model.ttt.stepz", ("a key of TTTConfig", "did you mean 'steps'?")),
        (["--model.ttt.labels", "answers"], "model.ttt.labels", ("expected one of context, target, received answers",)),
        (["--trainer.devicez", "1"], "--trainer.devicez", ("did you mean 'trainer.devices'?",)),
        ({"stepz": 3}, "model.ttt.stepz", ("a key of TTTConfig", "did you mean 'steps'?")),
        ({"loss": "nll"}, "model.ttt.loss", ("expected one of auto, ce, kl, argmax, received nll",)),
    ],
    ids=str,
)
def test_mistakes_go_by_the_names_that_were_written(
    command: str,
    arguments: list[str] | dict[str, Any],
    argument: str,
    words: tuple[str, ...],
    config: Config,
    dgd: Dgd,
    tiny_pair: TinyPair,
    contexts: Path,
    tmp_path: Path,
) -> None:
    ttt = FIT | (arguments if isinstance(arguments, dict) else {})
    more = arguments if isinstance(arguments, list) else []
    if command == "fit":
        path = fit_yaml(tmp_path, tiny_pair, {"path": str(text_file(tmp_path))}, ttt=ttt)
    else:
        path = config({"arms": ARMS, "ttt": ttt}, {"path": str(contexts), "clbench": False})
    check_error(dgd(command, "--config", path, *more), argument, *words)


def test_short_contexts_are_refused_or_warned_of(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    """The draft's block has 4 slots, every byte is a token."""
    text, ttt = tmp_path / "short.txt", {**FIT, "validation_texts": 2, "validation_tokens": 16}
    text.write_text("eels")
    path = fit_yaml(tmp_path, tiny_pair, {"path": str(text)}, ttt=ttt)
    check_error(dgd("fit", "--config", path), "data", "a context of at least 5 tokens: one, a block of 4", "received 4")
    told = "the context has {} tokens to train on, fewer than 4 blocks of 4"
    text.write_text("otters eat eels")
    with pytest.warns(UserWarning, match=told.format(15)):
        assert dgd("fit", "--config", path).code == 0
    text.write_text("otters eat eels and mice")
    with pytest.warns(UserWarning, match=told.format(15)):  # without validation texts its end is held out
        assert (
            dgd(
                "fit", "--config", fit_yaml(tmp_path, tiny_pair, {"path": str(text)}, ttt=FIT | {"holdout": 0.375})
            ).code
            == 0
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the context has")
        assert dgd("fit", "--config", fit_yaml(tmp_path, tiny_pair, {"path": str(text)}, ttt=ttt)).code == 0
