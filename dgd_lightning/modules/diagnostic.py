"""`Diagnostic`: how target, draft, controls and layers place every gold token, given what precedes it (`dgd test`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule

from dgd_lightning.checks import check_integer
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.decode.nested import plain
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.errors import InputError
from dgd_lightning.modules.adaptation import ADAPTERS, ContextAdapter, contexts_to_adapt
from dgd_lightning.modules.gold_reader import ROW, GoldReader, readers_of
from dgd_lightning.modules.pair_source import PairSettings, PairSource, check_rows_run
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.types import Task

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
        self.reader: GoldReader | None = None  # a plain attribute: Lightning neither moves nor saves the pair
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
        contexts: dict[str, list[Task]] = {}
        if self.ttt is not None:
            data, inference = getattr(self.trainer, "datamodule", None), self.trainer.test_loop.inference_mode
            contexts = contexts_to_adapt(data, accepted=self.accept_clbench_license, inference_mode=inference)
        if self.reader is not None:
            return
        pair = self.source.load(self.trainer)
        readers = readers_of(pair, self.layers, self.readouts, self.seed)
        log_dir = self.trainer.log_dir  # a collective: every rank asks
        adapt = None
        if self.ttt is not None:
            folder = Path(log_dir, ADAPTERS) if self.save_adapters and log_dir is not None else None
            adapt = ContextAdapter(pair, self.ttt, folder, enable_thinking=self.enable_thinking)
        self.reader = GoldReader(
            pair,
            readers,
            contexts,
            adapt,
            slots=self.slots,
            chunk=self.chunk,
            answer_field=self.answer_field,
            enable_thinking=self.enable_thinking,
        )

    def on_test_start(self) -> None:
        """Finds tasks without a gold answer, and texts that are too long, before hours are spent on the others."""
        data = getattr(self.trainer, "datamodule", None)
        for task in data.tasks if isinstance(data, TaskData) else ():
            self._ready().check(task, fits=self.too_long == "error")

    def test_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """Rows of a group, one per task; none where a resumed run has them all."""
        if all((task.idx, ROW) in self.done for task in batch):
            return []
        return [self._ready().row(task) for task in batch]

    def _ready(self) -> GoldReader:
        assert self.reader is not None, "setup loads the pair"
        return self.reader


def _edges(edges: list[float]) -> list[float]:
    if not edges or edges != sorted(set(edges)) or not 0 < edges[0] <= edges[-1] < 1:
        raise InputError(
            "model.confidence_edges",
            expected="numbers within 0 … 1, ascending",
            received=edges,
            hint=f"use for example {list(EDGES)}",
        )
    return edges
