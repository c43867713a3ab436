"""Helpers of the command's tests: a byte-level tokenizer, task rows, what a run left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgd_lightning.run_folder import TIMINGS, read_predictions

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '<e>' }}{% endfor %}{{ '<s>assistant:' }}"
)
VOCAB = 288
SHORT = 8  # tokens of an answer, where a test does not say otherwise
SHORT_FIT = {  # holds nothing out
    "steps": 6,
    "lr": 0.05,
    "rank": 2,
    "anchors_per_step": 8,
    "labels": "context",
    "validation_texts": 0,
    "holdout": 0,
}


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
    """Folders of a pair on disk."""

    target: Path
    draft: Path


Config = Callable[..., Path]
Dgd = Callable[..., Run]


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


def answered_rows(number: int = 8) -> list[dict[str, Any]]:
    """Rows as `dgd predict` writes them, of random tokens."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(0, 280, (length,), generator=generator).tolist()  # noqa: E731
    return [
        {"idx": str(i), "model_output": "text", "dgd": {"prompt_ids": draw(6), "output_ids": draw(20 + i)}}
        for i in range(number)
    ]


def write_training(
    tmp_path: Path,
    pair: TinyPair,
    rows: list[Any] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> Path:
    """A YAML for `dgd fit` of a one-layer draft; keyword arguments add to init_args and trainer settings."""
    path = write_jsonl(tmp_path / "answers.jsonl", answered_rows() if rows is None else rows)
    sizes = {"num_layers": 1, "block_size": 4, "num_anchors": 4, "val_max_new_tokens": 4}
    settings = {
        "name": "train",
        "logs_dir": str(tmp_path / "logs"),
        "model": {
            "class_path": "DraftTraining",
            "init_args": {"target": str(pair.target), "dtype": "float32", **sizes, **(model or {})},
        },
        "data": {
            "class_path": "ResponsesData",
            "init_args": {
                "path": str(path), "target": str(pair.target), "batch_size": 2, "val_share": 0.25, **(data or {})
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, **(trainer or {})},
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "train.yaml"


def ranks_of(number: int) -> list[str]:
    """Options for a run on so many processes."""
    return ["--trainer.devices", str(number)] + (["--trainer.strategy", "ddp"] if number > 1 else [])


def check_error(run: Run, argument: str, *words: str, began: bool = False) -> None:
    """The run ended with exit code 2 and one line that names the argument and holds the words.

    One that ``began`` may have told before how it goes.
    """
    assert run.code == 2
    lines = [line for line in run.err.splitlines() if not (began and line.startswith("INFO: "))]
    assert len(lines) == 1, run.err
    assert lines[0].startswith(f"dgd: error: {argument}: expected "), lines[0]
    assert ", received " in lines[0]
    assert ". Hint: " in lines[0]
    for word in words:
        assert word in lines[0]


def predictions(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run folder without their wall times, which no two runs share."""
    rows = list(read_predictions(folder))
    for row in rows:
        for name in TIMINGS:
            row["dgd"].pop(name, None)
    return rows
