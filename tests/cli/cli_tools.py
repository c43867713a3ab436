"""Helpers of the command's tests: a byte-level tokenizer, task rows, what a run left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from callbacks.run_folder import TIMINGS, read_predictions

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


def predictions(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run folder without their wall times, which no two runs share."""
    rows = list(read_predictions(folder))
    for row in rows:
        for name in TIMINGS:
            row["dgd"].pop(name, None)
    return rows
