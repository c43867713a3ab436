"""`FitInterrupted`: Ctrl-C and SIGTERM end a fit between two steps, with a checkpoint to go on from."""

import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

CHECKPOINT = "interrupted.ckpt"
TERMINATED = 128 + signal.SIGTERM


class FitInterrupted(Callback):
    """Notes the signal, lets the optimiser's step end, saves, and prints the command that continues.

    A second Ctrl-C ends the fit at once. Lightning itself would leave amid a step, and save nothing.

    Args:
        argv: the command's arguments; None: this process's.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        self.argv = list(sys.argv[1:] if argv is None else argv)
        self.noted: int | None = None
        self.step = 0
        self.before: dict[int, Any] = {}  # handlers by signal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, _: object) -> None:
        if self.noted is not None:
            raise self._end()
        self.noted = number
        print("dgd: ending after this step; once more: at once", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.noted is not None, all=False):
            return
        if not stepped:  # gradients are being gathered, which no checkpoint holds
            return
        if self.step >= trainer.estimated_stepping_batches:  # the last one: the fit ends by itself, with its export
            return
        checkpoint = Path(trainer.log_dir or ".", "checkpoints", CHECKPOINT)
        trainer.save_checkpoint(checkpoint)
        if trainer.is_global_zero:
            print(f"continue:   {self.command(checkpoint)}", flush=True)
        raise self._end()

    def _end(self) -> BaseException:
        return KeyboardInterrupt() if self.noted == signal.SIGINT else SystemExit(TERMINATED)

    def command(self, checkpoint: Path) -> str:
        """What continues from a checkpoint: the command that was given, which may itself have continued."""
        kept: list[str] = []
        for word in self.argv:
            if kept and kept[-1] == "--ckpt_path":
                kept.pop()
            elif not word.startswith("--ckpt_path="):
                kept.append(word)
        return shlex.join(["dgd", *kept, "--ckpt_path", str(checkpoint)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
