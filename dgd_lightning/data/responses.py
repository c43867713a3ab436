"""Conversations for draft training: prompts with the target's own responses."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from dgd_lightning.checks import check_integer, check_number, check_unicode
from dgd_lightning.clbench import is_clbench_row
from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.data.licence import LicensedData
from dgd_lightning.data.messages import Message, read_messages, read_question
from dgd_lightning.data.rows import field
from dgd_lightning.errors import InputError
from dgd_lightning.pair import load_tokenizer
from dgd_lightning.row_files import Row, read_rows, require_file
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.folder import bundled, fetch_folder, read_json, resolve_commit
from dgd_lightning.types import Task

ANY_VOCABULARY = 2**31  # where the target's config.json gives none
PAD_TO = 32  # lengths are rounded up to this, so that few shapes occur


class ResponseBatch(NamedTuple):
    """Conversations padded on the right with token 0, which no loss and no earlier token sees."""

    input_ids: Tensor  # [B, S]
    loss_mask: Tensor  # [B, S] bool, true at response tokens


Conversation = tuple[Tensor, Tensor]  # prompt ids [S] and response ids [T], LongTensors


def worth_training(pairs: list[Conversation]) -> list[Conversation]:
    """The pairs whose responses have two tokens and more; shorter ones teach nothing."""
    return [pair for pair in pairs if len(pair[1]) >= 2]


def pad_responses(pairs: list[Conversation]) -> ResponseBatch:
    """Join prompts and responses and pad them to one length."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    length = -(-longest // PAD_TO) * PAD_TO
    input_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    loss_mask = torch.zeros(len(pairs), length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.cat([prompt, response])
        loss_mask[row, len(prompt) : end] = True
    return ResponseBatch(input_ids, loss_mask)


def chat_and_answer(row: Row, *, answered: bool) -> tuple[list[Message], str]:
    """The chat and the answer of a row; of one whose prompt is known (``answered``) the answer alone."""
    chat = next((name for name in ("messages", "conversations") if row.value.get(name) is not None), "")
    if not chat and not (answered and "model_output" in row.value):
        known = "model_output" in row.value
        raise InputError(
            row.place,
            expected=f"{'' if known else 'an answer: '}a chat in 'messages', or in ShareGPT's 'conversations'"
            + (", or 'dgd.prompt_ids'" if known else ", that ends with it, or 'model_output' beside its question"),
            received=f"fields {', '.join(row.value)}"[:200],
            hint="use rows that dgd predict wrote, or add what is missing",
        )
    if "model_output" in row.value:
        return [] if answered else read_question(row, chat), field(row, "model_output", str, "a text")
    *asked, last = read_messages(row, chat)
    if last["role"] != "assistant" or not asked or last.keys() > {"role", "content"}:
        raise InputError(
            row.place,
            expected=f"'model_output', or a chat in {chat!r} that ends with the assistant's answer, a text alone",
            received=f"{len(asked) + 1} messages, the last with {', '.join(last)} and the role {last['role']}",
            hint="add the answer, as text alone",
        )
    return asked, last["content"]


class ResponseOrder(DistributedSampler[int]):
    """Endless random order in which batch i depends on (seed, i) alone, so that a resumed run goes on as it would have.

    Every epoch is a new permutation, cut to whole batches of all ranks; a data set smaller than that is repeated. It is
    a `DistributedSampler` so that Lightning leaves the sharding to it.

    ``trainer`` knows the rank, and how many batches (of ``batch_size`` per rank) were consumed before; None: one, none.
    """

    def __init__(self, dataset: list[Conversation], batch_size: int, seed: int, trainer: Trainer | None) -> None:
        ranks, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        super().__init__(dataset, num_replicas=ranks, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.batch_size, self.trainer = batch_size, trainer
        self.batches = max(1, len(dataset) // (batch_size * ranks))  # of one epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.trainer else 0
        for batch in count(first):
            epoch, at = divmod(batch, self.batches)
            yield from self.epoch_order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]

    def epoch_order(self, epoch: int) -> list[int]:
        """This rank's indices of one epoch."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        wanted = self.batches * self.batch_size * self.num_replicas
        return (order * -(-wanted // len(order)))[:wanted][self.rank :: self.num_replicas]


class ResponsesData(LicensedData):
    """Conversations of a predictions file: what `dgd predict` wrote when the target answered the training prompts.

    The exact tokens in ``dgd.prompt_ids`` and ``dgd.output_ids`` are used: they alone hold a template, a system message
    or a truncation. Rows from elsewhere are rendered here: a chat in ``messages``, or in ShareGPT's ``conversations``,
    with the answer in ``model_output``, or in its last message where there is no such field; earlier turns are prompt.
    Of several arms' rows for one task the first counts, or with ``arms`` those of these arms. Rows whose
    ``model_output`` is empty are left out.

    Args:
        path: predictions, or another file of rows (see `row_files`).
        target: Hub id or folder whose tokenizer and chat template encode rows without ids, or ``lab``.
        batch_size: conversations per step and device.
        max_length: longer conversations are cut on the right; those whose prompt alone is as long are left out.
        arms: names of the arms whose answers count, each as a conversation of its own; None: a task's first one.
        val_share: share of the rows (the last ones) whose prompts are decoded in validation.
        val_batch_size: prompts decoded together in validation.
        num_workers: processes that collate.
        enable_thinking: passed to the chat template, for rows without ids.
        seed: of the random order; an order depends on it, the epoch and the data alone.
        clbench: whether the rows are CL-bench's, which nothing may be trained on. None: they are, if any looks like one
            and is not the lab's, or the file is named so. Set it to false for rows of your own.
        revision: of ``target`` on the Hub: branch, tag or commit; the same as ``model.revision``.
    """

    def __init__(
        self,
        path: str,
        target: str,
        batch_size: int = 4,
        max_length: int = 3072,
        val_share: float = 0.02,
        val_batch_size: int = 4,
        num_workers: int = 0,
        enable_thinking: bool = False,
        seed: int = 0,
        clbench: bool | None = None,
        revision: str | None = None,
        arms: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.clbench, self.arms = clbench, arms
        self.suspects: list[dict[str, Any]] = []  # the first row that may be CL-bench's
        self.path, self.target, self.revision = Path(path), target, revision
        self.batch_size = check_integer("data.batch_size", batch_size)
        self.max_length = check_integer("data.max_length", max_length, least=2)
        self.val_share = check_number("data.val_share", val_share, least=0, below=1, hint="use e.g. 0.02")
        self.val_batch_size = check_integer("data.val_batch_size", val_batch_size)
        self.num_workers = check_integer("data.num_workers", num_workers, least=0)
        self.enable_thinking, self.seed = enable_thinking, seed
        self.vocab_size = ANY_VOCABULARY
        self.train_set: list[Conversation] | None = None
        self.val_prompts: list[Tensor] = []

    def fingerprint(self) -> str:
        """SHA-256 of the file and of what decides how it is read, cut, split and ordered."""
        require_file(self.path)
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        settings: tuple[Any, ...] = (self.target, self.batch_size, self.max_length, self.val_share)
        settings += (self.enable_thinking, self.seed)
        settings += () if self.arms is None else (self.arms,)
        digest.update(repr(settings).encode() + (self.commit or "").encode())
        return digest.hexdigest()

    @cached_property
    def commit(self) -> str | None:
        """The commit of ``revision`` of ``target``, looked up once, since a branch may move; None for a folder."""
        return resolve_commit("data.target", bundled(self.target, "target"), self.revision, "data.revision")

    def setup(self, stage: str) -> None:
        """Reads and encodes the file."""
        if self.train_set is not None:
            return
        folder = fetch_folder("data.target", bundled(self.target, "target"), self.commit, ("config.json",))
        self.vocab_size = read_json(folder / "config.json", "data.target").get("vocab_size") or ANY_VOCABULARY
        tokenizer = load_tokenizer(self.target, revision=self.commit)
        pairs: list[Conversation] = []
        seen: set[tuple[str, str | None]] = set()  # tasks, with ``arms`` those of each arm
        known: set[str] = set()  # arms of the rows
        too_long = 0
        for row in read_rows(self.path):
            idx = str(row.value.get("idx", row.number))
            arm: str | None = None
            if self.arms is not None:
                arm = row.value["dgd"].get("arm") if isinstance(row.value.get("dgd"), dict) else None
                known.add(str(arm))
                if arm not in self.arms:
                    continue
            if (idx, arm) in seen or row.value.get("model_output", 0) in (None, ""):
                continue
            seen.add((idx, arm))
            if not self.suspects and is_clbench_row(row.value, self.path):
                self.suspects.append(row.value)
            prompt, answer = self.encode(tokenizer, row, idx)
            if len(prompt) >= self.max_length:
                too_long += 1
                continue
            pairs.append((prompt, answer[: self.max_length - len(prompt)]))
        if missing := set(self.arms or ()) - known:
            raise InputError(
                "data.arms",
                expected=f"arms of the rows, {', '.join(sorted(known))}",
                received=", ".join(sorted(missing)),
                hint="use names of model.arms of the run that answered",
            )
        if too_long:
            rank_zero_warn(
                f"{too_long} of {too_long + len(pairs)} rows of {self.path.name} are left out: "
                f"their prompts have data.max_length = {self.max_length} tokens or more"
            )
        held_out = round(len(pairs) * self.val_share)
        self.val_prompts = [prompt for prompt, _ in pairs[len(pairs) - held_out :]]
        self.train_set = worth_training(pairs[: len(pairs) - held_out])
        if not self.train_set:
            raise InputError(
                "data.path",
                expected=f"answers of at least two tokens within max_length = {self.max_length}",
                received=f"none in the {row.number} rows of {self.path}",
                hint="decode training prompts first: dgd predict with an autoregressive arm",
            )

    def rows_used(self) -> list[dict[str, Any]]:
        """See `LicensedData.rows_used`: one is enough, and the file is read once, by `setup`."""
        return self.suspects

    def encode(self, tokenizer: Any, row: Row, idx: str) -> tuple[Tensor, Tensor]:
        """Prompt and response ids of a row, 1-D LongTensors; raises InputError where it does not have them."""
        written = {} if row.value.get("dgd") is None else field(row, "dgd", dict, "an object")
        prompt, answer = written.get("prompt_ids"), written.get("output_ids")
        messages, text = chat_and_answer(row, answered=prompt is not None)
        if prompt is None:
            task = Task(idx, messages, None, row.value)
            prompt = prompt_ids(tokenizer, task, enable_thinking=self.enable_thinking).tolist()
        if answer is None:
            if getattr(tokenizer, "eos_token_id", None) is None:
                raise InputError(
                    "data.target",
                    expected="a tokenizer with an end token, for rows without 'dgd.output_ids'",
                    received=f"{'none' if tokenizer is None else 'one without'}, for {row.place}",
                    hint="add them to the target's folder, or use rows that dgd predict wrote",
                )
            ids = tokenizer.encode(check_unicode(row.place, text), add_special_tokens=False)
            answer = [*ids, tokenizer.eos_token_id]
        prompt = self._ids(row, "prompt_ids", prompt)
        if not len(prompt):
            raise InputError(row.place, expected="a prompt of at least one token", received="none", hint="remove it")
        return prompt, self._ids(row, "output_ids", answer)

    def _ids(self, row: Row, name: str, ids: Any) -> Tensor:
        """A row's ids as a LongTensor; raises InputError where they are no ids of the target's."""
        try:
            found = torch.tensor(ids or [], dtype=None if ids else torch.long)
            if isinstance(ids, list) and found.ndim == 1 and found.dtype == torch.long:
                if not len(found) or 0 <= int(found.min()) <= int(found.max()) < self.vocab_size:
                    return found
                ids = next(i for i in ids if not 0 <= i < self.vocab_size)
        except (TypeError, ValueError, RuntimeError):  # what is no number, or too large for a tensor
            ids = repr(ids)
        raise InputError(
            row.place,
            expected=f"{name} to be a list of the target's ids, 0…{self.vocab_size - 1}",
            received=str(ids)[:80],
            hint="use rows that this target wrote",
        )

    def train_dataloader(self) -> DataLoader[ResponseBatch]:
        """Batches in an order that survives a resume."""
        assert self.train_set is not None
        order = ResponseOrder(self.train_set, self.batch_size, self.seed, self.trainer)
        workers, data = self.num_workers, self.train_set
        return DataLoader(data, self.batch_size, sampler=order, collate_fn=pad_responses, num_workers=workers)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[list[Tensor]]:
        """Lists of prompts."""
        return DataLoader(self.val_prompts, self.val_batch_size, collate_fn=list)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[list[Tensor]]:
        return self.val_dataloader()
