"""A tiny random pair with a byte-level chat tokenizer on disk, and task files, for runs of the `dgd` command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quick_parser
import torch
import yaml
from cli_tools import SHORT, VOCAB, Config, Run, TinyPair, byte_tokenizer, chat_row, write_jsonl
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tiny import hf_model, make_draft

from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.target.model import Target


@pytest.fixture(scope="session", autouse=True)
def _quick_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        quick_parser.patch(patches)
        # Pictures are drawn, but their parts are not moved out of each other's way: half of the time of drawing.
        patches.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)
        yield


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A random fp64 pair in two folders: in fp64 no answer hangs on the order of sums. Four layers: forwards are what
    most of a run's time goes to."""
    folder = tmp_path_factory.mktemp("pair")
    model = hf_model(vocab_size=VOCAB, max_position_embeddings=512, dtype=torch.float64)
    model.save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    draft = make_draft(Target(model), block_size=4, layer_ids=(1, 3))
    save_draft(draft, folder / "draft")
    return TinyPair(folder / "target", folder / "draft")


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """Six tasks of four contexts; the first context's tasks do not stand side by side."""
    pairs = [(0, 0), (1, 0), (0, 1), (2, 0), (3, 0), (3, 1)]
    return write_jsonl(tmp_path / "contexts.jsonl", [chat_row(*pair) for pair in pairs])


@pytest.fixture
def config(tmp_path: Path, tiny_pair: TinyPair, contexts: Path) -> Config:
    """Writes a predict YAML; keyword arguments replace init_args of model and data, and trainer settings."""

    def write(
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        data_class: str = "ContextsData",
        **top: Any,
    ) -> Path:
        arms = [
            {"name": "ar", "method": "Autoregressive"},
            {"name": "dflash", "method": "Speculative"},
            {"name": "warm", "method": "Speculative", "temperature": 0.8},
        ]
        settings = {
            "model": {
                "class_path": "Decoding",
                "init_args": {
                    "target": str(tiny_pair.target),
                    "draft": str(tiny_pair.draft),
                    "arms": arms,
                    "max_new_tokens": SHORT,
                    "warmup": False,  # a fifth of so short a run; some tests of each room leave it on
                    **(model or {}),
                },
            },
            "data": {"class_path": data_class, "init_args": data or {"path": str(contexts), "batch_size": 2}},
            "trainer": {"accelerator": "cpu", "devices": 1, **(trainer or {})},
            "logs_dir": str(tmp_path / "logs"),
            **top,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture
def dgd(capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs the command in this process."""
    from dgd_lightning.cli import main

    def run(*arguments: str | Path) -> Run:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Run(code, *capfd.readouterr())

    return run
