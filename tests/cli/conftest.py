"""A tiny random pair with a byte-level chat tokenizer on disk, and task files, for runs of the `dgd` command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tiny import hf_model, make_draft
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.target.model import Target

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '<e>' }}{% endfor %}{{ '<s>assistant:' }}"
)
VOCAB = 288


class Run(NamedTuple):
    """What a run of the command left behind."""

    code: int
    out: str
    err: str


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, so that any text encodes."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "<e>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", chat_template=template)


class TinyPair(NamedTuple):
    target: Path
    draft: Path


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A random fp64 pair in two folders: in fp64 no answer hangs on the order of sums."""
    folder = tmp_path_factory.mktemp("pair")
    model = hf_model(vocab_size=VOCAB, max_position_embeddings=512, dtype=torch.float64)
    model.save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    draft = make_draft(Target(model), block_size=4)
    save_draft(draft, folder / "draft")
    return TinyPair(folder / "target", folder / "draft")


def chat_row(context: int, task: int, **changes: Any) -> dict[str, Any]:
    """A CL-bench-format row."""
    return {
        "messages": [
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": f"Context {context}: {'é' * context} Question {task}?"},
        ],
        "rubrics": ["It is right."],
        "metadata": {
            "task_id": f"t{context}-{task}",
            "context_id": f"c{context}",
            "context_category": "Rules" if context % 2 else "Facts",
            "sub_category": "s",
        },
        **changes,
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """Six tasks of four contexts; the first context's tasks do not stand side by side."""
    pairs = [(0, 0), (1, 0), (0, 1), (2, 0), (3, 0), (3, 1)]
    return write_jsonl(tmp_path / "contexts.jsonl", [chat_row(*pair) for pair in pairs])


Config = Callable[..., Path]


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
            {"name": "ar", "method": "autoregressive"},
            {"name": "dflash", "method": "speculative"},
            {"name": "warm", "method": "speculative", "temperature": 0.8},
        ]
        settings = {
            "model": {
                "class_path": "Decoding",
                "init_args": {
                    "target": str(tiny_pair.target),
                    "draft": str(tiny_pair.draft),
                    "arms": arms,
                    "max_new_tokens": 12,
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


def predictions(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run folder without their wall times, which no two runs share."""
    from callbacks.run_folder import TIMINGS, read_predictions

    rows = list(read_predictions(folder))
    for row in rows:
        for name in TIMINGS:
            row["dgd"].pop(name, None)
    return rows
