"""`GoldReader`: rank and probability that a pair's readers give every token of a gold answer. It knows no Lightning."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.data.chat import gold_ids, prompt_ids
from dgd_lightning.data.tasks import context_of
from dgd_lightning.decode.readouts.ablated_draft import AblatedDraft
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.readouts.draft_slots import DraftSlots
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.replay import replay
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.diagnosis import ADAPTED, DRAFT, RANDOM, SHUFFLED, TARGET
from dgd_lightning.metrics.gold import confidence, gold_log_probability, gold_rank
from dgd_lightning.modules.adaptation import Adapted, ContextAdapter
from dgd_lightning.pair import Pair
from dgd_lightning.types import Task

ROW = "diagnostic"  # a task has one row


def readers_of(pair: Pair, layers: list[int] | None, readouts: dict[str, Readout], seed: int) -> dict[str, Readout]:
    """Every reader but the target, the draft's later slots and the adapted draft, by name.

    Args:
        pair: with a draft.
        layers: of the target; None: all but the last.
        readouts: a user's own, by name.
        seed: of the controls.

    Raises:
        InputError: a layer that the target lacks, a name that is taken, or a readout that does not suit the pair.
    """
    count = pair.target.num_layers
    for layer in layers or ():
        check_integer("model.layers", layer, least=0, most=count - 1, hint="name layers that the target has")
    readers: dict[str, Readout] = {
        DRAFT: DraftReadout(),
        SHUFFLED: DraftReadout(features="shuffled", seed=seed),
        RANDOM: DraftReadout(features="random", seed=seed),
    }
    readers |= {f"layer {layer}": LogitLens(layer) for layer in (range(count - 1) if layers is None else layers)}
    taken = {TARGET, ADAPTED, *readers, *map(slot_name, range(1, block_size(pair)))}
    for name, readout in readouts.items():
        if name in taken:
            raise InputError(
                "model.readouts",
                expected="names of their own",
                received=f"{name!r}, which the diagnostic uses itself",
                hint="rename it",
            )
        if isinstance(readout, AblatedDraft):  # checked before the first text is read
            readout.check(pair)
    return readers | readouts


class GoldReader:
    """Reads tasks' gold answers and makes their rows.

    Args:
        pair: with a draft.
        readers: from :func:`readers_of`.
        contexts: all tasks by context, where contexts are adapted to.
        adapt: makes a context's adapter; None adapts nothing.
        slots: read the draft's slots 2 … K − 1 too.
        chunk: answer tokens read at a time.
        answer_field: see `chat.gold_answer`.
        enable_thinking: passed to the chat template.
    """

    def __init__(
        self,
        pair: Pair,
        readers: dict[str, Readout],
        contexts: dict[str, list[Task]],
        adapt: ContextAdapter | None,
        *,
        slots: bool,
        chunk: int,
        answer_field: str | None,
        enable_thinking: bool,
    ) -> None:
        self.pair, self.readers, self.contexts, self.adapt = pair, readers, contexts, adapt
        self.size = block_size(pair) if slots else 2  # slots below it are read; slot 1 is the draft itself
        self.chunk, self.answer_field, self.enable_thinking = chunk, answer_field, enable_thinking

    def check(self, task: Task, *, fits: bool) -> None:
        """Raises:
        InputError: the task has no gold answer or, where ``fits`` is asked for, does not fit the target.
        """
        prompt, answer = self.text(task)
        if fits and (excess := self._excess(prompt, answer)):
            raise InputError(
                f"task {task.idx}",
                expected=f"a prompt and an answer of at most {self.pair.target.max_positions} tokens",
                received=f"{len(prompt)} + {len(answer)}, {excess} more",
                hint="set model.too_long to skip, or use a target with a longer context",
            )

    def text(self, task: Task) -> tuple[Tensor, Tensor]:
        """Prompt [S] and gold answer [T]."""
        prompt = prompt_ids(self.pair.tokenizer, task, enable_thinking=self.enable_thinking)
        return prompt, gold_ids(self.pair.tokenizer, task, self.answer_field)

    def row(self, task: Task) -> dict[str, Any]:
        """The task's row."""
        prompt, answer = self.text(task)
        row = {"idx": task.idx, "metadata": task.row.get("metadata")}
        head = {"arm": ROW, "context": context_of(task), "prompt_tokens": len(prompt)}
        if excess := self._excess(prompt, answer):
            return {**row, "dgd": {**head, "skipped": f"{excess} tokens more than fit the target"}}
        adapted = self._adapted(context_of(task))
        found = self._read(prompt, answer, adapted)
        return {**row, "dgd": {**head, "ttt": adapted and adapted.record, "answer_ids": answer.tolist(), **found}}

    def _adapted(self, context: str) -> Adapted | None:
        """The adapter of a context; its tasks follow each other, so it is made once."""
        if self.adapt is None:
            return None
        return self.adapt(context, lambda: [self.text(member)[0] for member in self.contexts[context]])

    def _read(self, prompt: Tensor, answer: Tensor, adapted: Adapted | None) -> dict[str, Any]:
        """The target's confidence at every answer token, and every reader's rank and log-probability of it."""
        pair, count, size = self.pair, len(answer), self.size
        readouts: list[Readout | DraftSlots] = [*self.readers.values(), *([DraftSlots()] if size > 2 else [])]
        names = [TARGET, *self.readers, *map(slot_name, range(2, size))]
        notes = {name: Notes(count) for name in names}
        sure: list[float] = []
        for part in replay(pair, prompt, answer, readouts, chunk=self.chunk):
            sure += confidence(part.target).tolist()
            for name, logits in zip([TARGET, *self.readers], [part.target, *part.readouts], strict=False):
                notes[name].take(part.first, logits, part.tokens)
            for slot in range(2, size):  # of the block anchored before token i, slot j predicts token i + j − 1
                first = part.first + slot - 1
                tokens = answer[first : first + len(part.tokens)].to(part.target.device)
                notes[slot_name(slot)].take(first, part.readouts[-1][: len(tokens), slot - 1], tokens)
        if adapted is not None:
            result = adapted.result
            notes[ADAPTED] = Notes(count)
            with pair.adapter(result.adapter) if result is not None and result.kept else nullcontext():
                for part in replay(pair, prompt, answer, [DraftReadout()], chunk=self.chunk):
                    notes[ADAPTED].take(part.first, part.readouts[0], part.tokens)
        return {"confidence": sure, "readers": {name: note.record() for name, note in notes.items()}}

    def _excess(self, prompt: Tensor, answer: Tensor) -> int:
        return max(0, len(prompt) + len(answer) - self.pair.target.max_positions)


class Notes:
    """One reader's numbers for an answer of T tokens; None where it gives none."""

    def __init__(self, count: int) -> None:
        self.rank: list[float | None] = [None] * count
        self.log_probability: list[float | None] = [None] * count

    def take(self, first: int, logits: Tensor, tokens: Tensor) -> None:
        """Logits [Q, V] of the tokens [Q] from number ``first`` on."""
        self.rank[first : first + len(tokens)] = gold_rank(logits, tokens).tolist()
        self.log_probability[first : first + len(tokens)] = gold_log_probability(logits, tokens).tolist()

    def record(self) -> dict[str, Any]:
        """Whole ranks as integers, which most are."""
        rank = [int(one) if one is not None and one == int(one) else one for one in self.rank]
        return {"rank": rank, "log_probability": self.log_probability}


def block_size(pair: Pair) -> int:
    """K of the pair's draft."""
    assert pair.draft is not None
    return pair.draft.config.block_size


def slot_name(slot: int) -> str:
    """The name of a slot's line; slot 1 is the draft itself."""
    return f"slot {slot}"
