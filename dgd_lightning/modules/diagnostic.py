"""`Diagnostic`: how target, draft, controls and layers place every gold token, given what precedes it (`dgd test`)."""

from contextlib import nullcontext
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.data.chat import gold_ids
from dgd_lightning.data.tasks import TaskData, context_of
from dgd_lightning.decode.call import check_prompt
from dgd_lightning.decode.nested import plain
from dgd_lightning.decode.readouts.ablated_draft import AblatedDraft
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.draft import DraftReadout, DraftSlots
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.replay import replay
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.diagnosis import ADAPTED, DRAFT, RANDOM, SHUFFLED, TARGET
from dgd_lightning.metrics.gold import confidence, gold_log_probability, gold_rank
from dgd_lightning.modules.adaptation import Adapted, context_adapter, contexts_to_adapt
from dgd_lightning.modules.pair_source import PairSource, check_rows_run
from dgd_lightning.modules.prompts import prompt_of
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.types import Task

ROW = "diagnostic"  # a task has one row
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
        enable_thinking: passed to the chat template.
        too_long: a prompt that does not fit the target with its answer: ``error``, or ``skip``.
        chunk: answer tokens read at a time; fewer take less memory.
        seed: of the controls' shuffles and random features.
        pair: see `PairSource`.
    """

    def __init__(
        self,
        target: str,
        draft: str | None,
        *,
        layers: list[int] | None = None,
        slots: bool = True,
        readouts: dict[str, Readout] | None = None,
        answer_field: str | None = None,
        confidence_edges: list[float] | None = None,
        ttt: TTTConfig | None = None,
        save_adapters: bool = False,
        accept_clbench_license: bool = False,
        enable_thinking: bool = False,
        too_long: Literal["error", "skip"] = "error",
        chunk: int = 64,
        seed: int = 0,
        **pair: Any,
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
        self.edges = list(EDGES) if confidence_edges is None else confidence_edges
        if not self.edges or self.edges != sorted(set(self.edges)) or not 0 < self.edges[0] <= self.edges[-1] < 1:
            raise InputError(
                "model.confidence_edges",
                expected="numbers within 0 … 1, ascending",
                received=self.edges,
                hint=f"use for example {list(EDGES)}",
            )
        self.source = PairSource(target, draft, device_map=None, **pair)
        self.layers, self.slots, self.readouts = layers, slots, readouts or {}
        self.answer_field, self.too_long, self.enable_thinking = answer_field, too_long, enable_thinking
        self.ttt, self.save_adapters, self.accept_clbench_license = ttt, save_adapters, accept_clbench_license
        self.chunk, self.seed = chunk, seed
        self.done: set[tuple[str, str]] = set()  # (idx, row name) of rows that a resumed run has already

    row_names = (ROW,)

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the model that can change a row, to be hashed."""
        source, readouts = self.source, {name: plain(readout) for name, readout in self.readouts.items()}
        prompts = [source.dtype_name(self._trainer), source.attn_implementation, self.enable_thinking, self.too_long]
        settings = [self.layers, self.slots, readouts, self.answer_field, *prompts, self.seed]
        return {**source.fingerprint(), "settings": settings, "ttt": self.ttt and self.ttt.fingerprint()}

    def setup(self, stage: str) -> None:
        """Loads the pair onto this rank's device and lists the readers, where the trainer suits a diagnostic."""
        check_rows_run(self.trainer, stage, "test")
        self.contexts: dict[str, list[Task]] = {}  # where they are adapted to
        if self.ttt is not None:
            data, inference = getattr(self.trainer, "datamodule", None), self.trainer.test_loop.inference_mode
            self.contexts = contexts_to_adapt(data, accepted=self.accept_clbench_license, inference_mode=inference)
        if not hasattr(self, "pair"):
            self.pair = self.source.load(self.trainer)  # a plain attribute: Lightning neither moves nor saves it
            self.readers = readers_of(self.pair, self.layers, self.readouts, self.seed)
            self.adapt = context_adapter(self, self.pair)

    def on_test_start(self) -> None:
        """Finds tasks without a gold answer, and texts that are too long, before hours are spent on the others."""
        data = getattr(self.trainer, "datamodule", None)
        for task in data.tasks if isinstance(data, TaskData) else ():
            prompt, answer = self.text(task)
            if self.too_long == "error" and (excess := self._excess(prompt, answer)):
                raise InputError(
                    f"task {task.idx}",
                    expected=f"a prompt and an answer of at most {self.pair.target.max_positions} tokens",
                    received=f"{len(prompt)} + {len(answer)}, {excess} more",
                    hint="set model.too_long to skip, or use a target with a longer context",
                )

    def test_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """Rows of a group, one per task; none where a resumed run has them all."""
        return [] if all((task.idx, ROW) in self.done for task in batch) else list(map(self.row, batch))

    def text(self, task: Task) -> tuple[Tensor, Tensor]:
        """Prompt [S] and gold answer [T]."""
        prompt = prompt_of(self.pair, task, enable_thinking=self.enable_thinking)
        answer = gold_ids(self.pair.tokenizer, task, self.answer_field)
        return prompt, check_prompt(f"task {task.idx}", answer, self.pair.target.vocab_size)

    def row(self, task: Task) -> dict[str, Any]:
        """The task's row."""
        (prompt, answer), context = self.text(task), context_of(task)
        row = {"idx": task.idx, "metadata": task.row.get("metadata")}
        head = {"arm": ROW, "context": context, "prompt_tokens": len(prompt)}
        if excess := self._excess(prompt, answer):
            return {**row, "dgd": {**head, "skipped": f"{excess} tokens more than fit the target"}}
        adapted = None
        if self.adapt is not None:
            adapted = self.adapt(context, lambda: [self.text(member)[0] for member in self.contexts[context]])
        found = self._read(prompt, answer, adapted, f"task {task.idx}")
        return {**row, "dgd": {**head, "ttt": adapted and adapted.record, "answer_ids": answer.tolist(), **found}}

    def _read(self, prompt: Tensor, answer: Tensor, adapted: Adapted | None, name: str) -> dict[str, Any]:
        """The target's confidence at every answer token, and every reader's rank and log-probability of it."""
        pair, nothing = self.pair, [None] * len(answer)
        size = pair.require_draft().config.block_size if self.slots else 2  # slots below it; slot 1 is the draft itself
        readouts: list[Readout | DraftSlots] = [*self.readers.values(), *([DraftSlots()] if size > 2 else [])]
        found: dict[str, dict[str, Any]] = {}  # None where a reader gives no number

        def note(name: str, first: int, logits: Tensor, tokens: Tensor) -> None:
            """Logits [Q, V] of the tokens [Q] from number ``first`` on; whole ranks, which most are, as integers."""
            own = found.setdefault(name, {"rank": [*nothing], "log_probability": [*nothing]})
            ranks, at = gold_rank(logits, tokens).tolist(), slice(first, first + len(tokens))
            own["rank"][at] = [int(one) if one == int(one) else one for one in ranks]
            own["log_probability"][at] = gold_log_probability(logits, tokens).tolist()

        sure: list[float] = []
        for part in replay(pair, prompt, [answer], readouts, chunk=self.chunk, name=name):
            sure += confidence(part.target).tolist()
            for name, logits in zip([TARGET, *self.readers], [part.target, *part.readouts], strict=False):
                note(name, part.first, logits, part.tokens)
            for slot in range(2, size):  # of the block anchored before token i, slot j predicts token i + j − 1
                first = part.first + slot - 1
                tokens = answer[first : first + len(part.tokens)].to(part.target.device)
                note(f"slot {slot}", first, part.readouts[-1][: len(tokens), slot - 1], tokens)
        if adapted is not None:
            with pair.adapter(adapted.adapter) if adapted.adapter is not None else nullcontext():
                for part in replay(pair, prompt, [answer], [DraftReadout()], chunk=self.chunk, name=name):
                    note(ADAPTED, part.first, part.readouts[0], part.tokens)
        return {"confidence": sure, "readers": found}

    def _excess(self, prompt: Tensor, answer: Tensor) -> int:
        return max(0, len(prompt) + len(answer) - self.pair.target.max_positions)


def readers_of(pair: Pair, layers: list[int] | None, readouts: dict[str, Readout], seed: int) -> dict[str, Readout]:
    """Every reader but the target, the draft's later slots and the adapted draft, by name; see `Diagnostic`."""
    count = pair.target.num_layers
    for layer in layers or ():
        check_integer("model.layers", layer, least=0, most=count - 1, hint="name layers that the target has")
    readers: dict[str, Readout] = {
        DRAFT: DraftReadout(),
        SHUFFLED: DraftReadout(features="shuffled", seed=seed),
        RANDOM: DraftReadout(features="random", seed=seed),
    }
    readers |= {f"layer {layer}": LogitLens(layer) for layer in (range(count - 1) if layers is None else layers)}
    taken = {TARGET, ADAPTED, *readers, *(f"slot {slot}" for slot in range(1, pair.require_draft().config.block_size))}
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
