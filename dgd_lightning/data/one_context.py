"""`FileContext`: the one context that a test-time training fit reads, from a text file or a file of rows."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.licence import LicensedData
from dgd_lightning.data.tasks import context_of
from dgd_lightning.errors import InputError
from dgd_lightning.row_files import kind_of, opened, read_rows, require_file
from dgd_lightning.types import Task


class Steps(IterableDataset[int]):
    """The numbers of the steps. Iterable, so that Lightning does not shard them: every rank makes every step."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


class OneContext(LicensedData):
    """Base of the data modules that hold one context, which is all that its prompts begin with."""

    def prompts(self, tokenizer: Any) -> tuple[str, list[Tensor]]:
        """The context's id and the prompts of its tasks, [S] each; a context without tasks is its own prompt.

        Raises:
            InputError: there is no such context.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of what makes the context."""
        settings = {name: value for name, value in vars(self).items() if isinstance(value, str | int | Path | None)}
        return hashlib.sha256(repr(sorted(settings.items(), key=str)).encode()).hexdigest()[:16]

    def train_dataloader(self) -> DataLoader[int]:
        """One step a batch, on every rank the same."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module  # a TestTimeTraining
        return DataLoader(Steps(module.ttt.steps * self.trainer.accumulate_grad_batches), batch_size=None)


class FileContext(OneContext):
    """One context of a file.

    Args:
        path: a text file, read as it is, or one of CL-bench-format rows (see `row_files`).
        context_id: which context of the rows (``metadata.context_id``); None takes the first one. All that the prompts
            of its tasks begin with is read.
        clbench: whether it is CL-bench's, which may never be adapted to. None: rows are, unless they come from the lab,
            and so is a text whose file is named so. Set it to false for a context of your own.
    """

    def __init__(self, path: str, context_id: str | None = None, clbench: bool | None = None) -> None:
        super().__init__()
        self.path, self.context_id, self.clbench = Path(path), context_id, clbench

    @cached_property
    def rows(self) -> bool:
        """Whether the file holds rows."""
        return kind_of(self.path) not in ("prompts", "text")

    def rows_used(self) -> Iterable[dict[str, Any]]:
        """See `LicensedData.rows_used`; a text is a row with that one field."""
        return [task.row for task in self._tasks()] if self.rows else [{"text": self._text()}]

    def fingerprint(self) -> str:
        """Hash of the file and of what is taken of it."""
        require_file(self.path)
        return hashlib.sha256(self.path.read_bytes() + repr(self.context_id).encode()).hexdigest()[:16]

    def _tasks(self) -> list[Task]:
        tasks = parse_rows(read_rows(self.path))
        wanted = self.context_id or context_of(tasks[0])
        found = [task for task in tasks if context_of(task) == wanted]
        if not found:
            known = list(dict.fromkeys(map(context_of, tasks)))
            raise InputError(
                "data.context_id",
                expected=f"one of {', '.join(known[:5])}{' …' if len(known) > 5 else ''}",
                received=wanted,
                hint="use an id that the rows have",
            )
        return found

    def prompts(self, tokenizer: Any) -> tuple[str, list[Tensor]]:
        """See `OneContext.prompts`."""
        if self.rows:
            tasks = self._tasks()
            return context_of(tasks[0]), task_prompts(tokenizer, tasks)
        text = self._text()
        if tokenizer is None:
            raise InputError(
                "model.target", expected="a folder with a tokenizer", received="none", hint="add the tokenizer's files"
            )
        return self.path.stem, [torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)]

    def _text(self) -> str:
        with opened(self.path) as file:
            text = file.read().removesuffix("\n")
        if not text.strip():
            raise InputError(
                "data.path", expected="a text", received=f"the empty file {self.path}", hint="check the file"
            )
        return text


def task_prompts(tokenizer: Any, tasks: Sequence[Task]) -> list[Tensor]:
    """The prompts [S] of a context's tasks."""
    return [prompt_ids(tokenizer, task, enable_thinking=False) for task in tasks]


def common_prefix(prompts: Sequence[Tensor]) -> Tensor:
    """The tokens [S] that all prompts begin with; a single prompt is its own prefix."""
    shortest = min(map(len, prompts))
    same = torch.stack([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts]).all(0)  # [shortest]
    return prompts[0][: int(same.long().cumprod(0).sum())]
