"""`FitProgress`: plain lines of progress for fit, validate and test, for where stdout is no terminal."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dgd_lightning.callbacks.progress import RankZeroProgress


class FitProgress(RankZeroProgress):
    """Every so often one line: the step, what a bar would show, seconds per step, time left; one per validation too.

    Args:
        line_every: seconds between lines.
    """

    def __init__(self, line_every: float = 30.0) -> None:
        super().__init__(line_every)
        self.total = float("inf")  # steps of the whole fit
        self.step = 0  # when the last line was shown
        self.shown = self.evaluating = self.evaluated = 0.0
        self.paused = 0.0  # seconds of validation since the last line, which are no step's

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.total, self.step = trainer.estimated_stepping_batches, trainer.global_step
        self.shown, self.paused = time.monotonic(), 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A line, if one is due; the last step always has one."""
        now, step = time.monotonic(), trainer.global_step
        if step == self.step or (now - self.shown < self.line_every and step != self.total):
            return
        pace = (now - self.shown - self.paused) / (step - self.step)
        left = f", about {pace * (self.total - step):.0f} s left" if self.total < float("inf") else ""
        self._print(f"training: step {step}/{self.total}{self._note(trainer, pl_module)}, {pace:.2f} s/step{left}")
        self.shown, self.step, self.paused = now, step, 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluating = self.evaluated = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._evaluated("validating", batch_idx, trainer.num_val_batches[dataloader_idx])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The result, where the validation is one of a fit; else Lightning prints a table."""
        self.paused += time.monotonic() - self.evaluating
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print(f"validation at step {trainer.global_step}{self._note(trainer, pl_module)}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluated = time.monotonic()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated("testing", batch_idx, trainer.num_test_batches[dataloader_idx])

    def _evaluated(self, what: str, batch_idx: int, total: int | float) -> None:
        now = time.monotonic()
        if now - self.evaluated >= self.line_every:
            self._print(f"{what}: batch {batch_idx + 1}/{total}")
            self.evaluated = now

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> str:
        metrics = self.get_metrics(trainer, pl_module)
        return "".join(f", {name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))

    def _print(self, line: str) -> None:
        if self.enabled:
            print(line, flush=True)
