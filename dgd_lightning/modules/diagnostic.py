"""`Diagnostic`: how target, draft, controls and layers place every gold token, given what precedes it (`dgd test`)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.data.gold import gold_ids
from dgd_lightning.data.tasks import TaskData, context_of
from dgd_lightning.decode.ablation import AblatedDraft
from dgd_lightning.decode.nested import plain
from dgd_lightning.decode.readouts import DraftReadout, LogitLens, Readout
from dgd_lightning.decode.replay import replay
from dgd_lightning.decode.slots import DraftSlots
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.gold import confidence, gold_log_probability, gold_rank
from dgd_lightning.modules.adaptation import ADAPTERS, Adapted, ContextAdapter, contexts_to_adapt
from dgd_lightning.modules.pair_source import PairSettings, PairSource, check_rows_run
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.types import Task

ROW = "diagnostic"  # a task has one row
TARGET, DRAFT, ADAPTED = "target", "draft", "draft + TTT"
SHUFFLED, RANDOM = "shuffled features", "random features"
EDGES = (0.5, 0.8, 0.95)


class Diagnostic(LightningModule):
    """Read every task's gold answer, token by token, and note how each reader places the token that comes.

    Args:
        target: folder or Hub id of the target; ``lab`` for the bundled one.
        draft: folder or Hub id of the draft; ``lab`` for the bundled one.
        layers: layers of the target that are read through its final norm and head (logit lens); None takes all but the
            last, which is the target itself; an empty list none.
        slots: read slots 2 … K − 1 of the draft too, each of the block anchored so many tokens before.
        readouts: further readers by name: any readout, such as ``AblatedDraft`` or ``DoLa``.
        answer_field: dotted path of the gold answer in the rows; None looks for ``metadata.lab.answer``, ``solution``,
            ``canonical_solution``, ``answer``.
        confidence_edges: bounds of the buckets of the target's confidence, ascending; the verdict is about the tokens
            below the first.
        ttt: adapt the draft to every context, and read with the adapted one too; None adapts nothing.
        save_adapters: keep every context's adapter in the run folder, in PEFT's format.
        accept_clbench_license: you have obtained permission to adapt to CL-bench's contexts, which its licence forbids.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` …
        attn_implementation: of the target, ``sdpa`` (default) or ``eager``.
        revision: Hub revision of the target: branch, tag or commit.
        draft_revision: Hub revision of the draft.
        enable_thinking: passed to the chat template.
        too_long: a prompt that does not fit the target with its answer: ``error``, or ``skip``.
        chunk: answer tokens read at a time; fewer take less memory.
        seed: of the controls' shuffles and random features.
        cpu_threads: threads that torch uses on a CPU; None leaves torch's choice.
    """

    def __init__(
        self,
        target: str,
        draft: str | None,
        layers: list[int] | None = None,
        slots: bool = True,
        readouts: dict[str, Readout] | None = None,
        answer_field: str | None = None,
        confidence_edges: list[float] | None = None,
        ttt: TTTConfig | None = None,
        save_adapters: bool = False,
        accept_clbench_license: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        draft_revision: str | None = None,
        enable_thinking: bool = False,
        too_long: Literal["error", "skip"] = "error",
        chunk: int = 64,
        seed: int = 0,
        cpu_threads: int | None = None,
    ) -> None:
        super().__init__()
        if draft is None:
            raise InputError(
                "model.draft",
                expected="a draft: it is what the diagnostic is about",
                received="null",
                hint="name the folder or Hub id of one",
            )
        check_integer("model.chunk", chunk)
        self.edges = _edges(list(EDGES) if confidence_edges is None else confidence_edges)
        self.source = PairSource(
            PairSettings(target, draft, dtype, attn_implementation, revision, draft_revision, None, cpu_threads)
        )
        self.layers, self.slots, self.readouts = layers, slots, readouts or {}
        self.answer_field, self.too_long, self.enable_thinking = answer_field, too_long, enable_thinking
        self.ttt, self.save_adapters, self.accept_clbench_license = ttt, save_adapters, accept_clbench_license
        self.chunk, self.seed = chunk, seed
        self.pair: Pair | None = None  # a plain attribute: Lightning neither moves nor saves it
        self.adapt: ContextAdapter | None = None
        self.contexts: dict[str, list[Task]] = {}
        self.done: set[tuple[str, str]] = set()  # (idx, row name) of rows that a resumed run has already

    row_names = (ROW,)

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the model that can change a row, to be hashed."""
        settings = [
            self.layers,
            self.slots,
            {name: plain(readout) for name, readout in self.readouts.items()},
            self.answer_field,
            self.source.settings.dtype,
            self.source.settings.attn_implementation,
            self.enable_thinking,
            self.too_long,
            self.seed,
        ]
        return {**self.source.fingerprint(), "settings": settings, "ttt": self.ttt and self.ttt.fingerprint()}

    def setup(self, stage: str) -> None:
        """Loads the pair onto this rank's device and lists the readers.

        Raises:
            InputError: the pair can't be loaded, lacks a layer that is to be read, or the trainer does not suit.
        """
        check_rows_run(self.trainer, stage, "test")
        if self.ttt is not None:
            self.contexts = contexts_to_adapt(
                getattr(self.trainer, "datamodule", None),
                accepted=self.accept_clbench_license,
                inference_mode=self.trainer.test_loop.inference_mode,
            )
        if self.pair is None:
            self.pair = self.source.load(self.trainer)
        self.readers = self._readers(self.pair)
        if self.ttt is not None:
            log_dir = self.trainer.log_dir
            folder = Path(log_dir, ADAPTERS) if self.save_adapters and log_dir is not None else None
            self.adapt = ContextAdapter(self.pair, self.ttt, folder, enable_thinking=self.enable_thinking)

    def _readers(self, pair: Pair) -> dict[str, Readout]:
        """Every reader but the target, the draft's later slots and the adapted draft, by name."""
        layers = pair.target.num_layers
        for layer in self.layers or ():
            if not 0 <= layer < layers:
                raise InputError(
                    "model.layers",
                    expected=f"layers of the target, 0…{layers - 1}",
                    received=layer,
                    hint="name layers that it has, or leave it out for all",
                )
        readers: dict[str, Readout] = {
            DRAFT: DraftReadout(),
            SHUFFLED: DraftReadout(features="shuffled", seed=self.seed),
            RANDOM: DraftReadout(features="random", seed=self.seed),
            **{
                f"layer {layer}": LogitLens(layer)
                for layer in (range(layers - 1) if self.layers is None else self.layers)
            },
        }
        taken = {TARGET, ADAPTED, *readers, *map(slot_name, range(1, self._block_size(pair)))}
        for name, readout in self.readouts.items():
            if name in taken:
                raise InputError(
                    "model.readouts",
                    expected="names of their own",
                    received=f"{name!r}, which the diagnostic uses itself",
                    hint="rename it",
                )
            if isinstance(readout, AblatedDraft):  # checked before the first text is read
                readout.check(pair)
        return readers | self.readouts

    def _block_size(self, pair: Pair) -> int:
        assert pair.draft is not None
        return pair.draft.config.block_size

    def on_test_start(self) -> None:
        """Finds tasks without a gold answer, and texts that are too long, before hours are spent on the others."""
        data = getattr(self.trainer, "datamodule", None)
        for task in data.tasks if isinstance(data, TaskData) else ():
            prompt, answer = self._text(task)
            if self.too_long == "error" and (excess := self._excess(prompt, answer)):
                raise InputError(
                    f"task {task.idx}",
                    expected=f"a prompt and an answer of at most {self._loaded().target.max_positions} tokens",
                    received=f"{len(prompt)} + {len(answer)}, {excess} more",
                    hint="set model.too_long to skip, or use a target with a longer context",
                )

    def test_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """Rows of a group, one per task; none where a resumed run has them all."""
        if all((task.idx, ROW) in self.done for task in batch):
            return []
        return [self._row(task) for task in batch]

    def _row(self, task: Task) -> dict[str, Any]:
        prompt, answer = self._text(task)
        row = {"idx": task.idx, "metadata": task.row.get("metadata")}
        head = {"arm": ROW, "context": context_of(task), "prompt_tokens": len(prompt)}
        if excess := self._excess(prompt, answer):
            return {**row, "dgd": {**head, "skipped": f"{excess} tokens more than fit the target"}}
        adapted = self._adapted(task)
        found = self._read(prompt, answer, adapted)
        ttt = adapted and adapted.record
        return {**row, "dgd": {**head, "ttt": ttt, "answer_ids": answer.tolist(), **found}}

    def _read(self, prompt: Tensor, answer: Tensor, adapted: Adapted | None) -> dict[str, Any]:
        """The target's confidence at every answer token, and every reader's rank and log-probability of it."""
        pair, count = self._loaded(), len(answer)
        size = self._block_size(pair) if self.slots else 2
        readouts: list[Readout | DraftSlots] = [*self.readers.values(), *([DraftSlots()] if size > 2 else [])]
        names = [TARGET, *self.readers, *map(slot_name, range(2, size))]
        notes = {name: Notes(count) for name in names}
        sure: list[float] = []
        for part in replay(pair, prompt, answer, readouts, chunk=self.chunk):
            sure += confidence(part.target).tolist()
            for name, logits in zip([TARGET, *self.readers], [part.target, *part.readouts], strict=False):
                notes[name].take(part.first, logits, part.tokens)
            for slot in range(2, size):  # of the block anchored before token i, slot j speaks of token i + j − 1
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

    def _adapted(self, task: Task) -> Adapted | None:
        """The adapter of the task's context; its tasks follow each other, so it is made once."""
        if self.adapt is None:
            return None
        members = self.contexts[context_of(task)]

        def prompts() -> list[Tensor]:
            return [self._text(member)[0] for member in members]

        return self.adapt(context_of(task), prompts)

    def _text(self, task: Task) -> tuple[Tensor, Tensor]:
        """Prompt [S] and gold answer [T]."""
        tokenizer = self._loaded().tokenizer
        prompt = prompt_ids(tokenizer, task, enable_thinking=self.enable_thinking)
        return prompt, gold_ids(tokenizer, task, self.answer_field)

    def _excess(self, prompt: Tensor, answer: Tensor) -> int:
        return max(0, len(prompt) + len(answer) - self._loaded().target.max_positions)

    def _loaded(self) -> Pair:
        assert self.pair is not None, "setup loads the pair"
        return self.pair


class Notes:
    """One reader's numbers for an answer of T tokens; None where it says nothing."""

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


def slot_name(slot: int) -> str:
    """The name of a slot's line; slot 1 is the draft itself."""
    return f"slot {slot}"


def _edges(edges: list[float]) -> list[float]:
    if not edges or edges != sorted(set(edges)) or not 0 < edges[0] <= edges[-1] < 1:
        raise InputError(
            "model.confidence_edges",
            expected="numbers within 0 … 1, ascending",
            received=edges,
            hint=f"use for example {list(EDGES)}",
        )
    return edges
