"""`DecodeProgress`: one bar with live τ and tokens/s, or plain lines; `FitProgress`: plain lines of other runs."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dgd_lightning.analysis.arms import ArmStats, collect
from dgd_lightning.decode.call import Progress as DecodeState

REFRESH = 0.2  # seconds between updates within a group: decoding must not wait for the console


class RankZeroProgress(ProgressBar):
    """Base of progress that rank 0 alone shows: Lightning disables it on the others."""

    def __init__(self, line_every: float) -> None:
        super().__init__()
        self.line_every, self.enabled = line_every, True  # seconds between lines

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True


class DecodeProgress(RankZeroProgress):
    """Groups done of this rank's share, time left, and per arm τ and tokens/s.

    Args:
        line_every: seconds between lines where stdout is no terminal.
    """

    def __init__(self, line_every: float = 10.0) -> None:
        super().__init__(line_every)
        self.bar: Progress | None = None
        self.stats: dict[str, ArmStats] = {}  # of this rank's rows in this session
        self.done = self.total = 0
        self.started = self.shown = 0.0
        self.fresh = 0  # groups decoded in this session, what the time left is reckoned from
        # of this group, by arm: every batch's last state, when it was prefilled, and when it was last heard of
        self.batches: dict[str, list[tuple[DecodeState, float, float]]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not self.enabled:
            return
        self.stats, self.batches, self.done, self.fresh = {}, {}, 0, 0
        self.total = int(sum(trainer.num_predict_batches))
        self.started = self.shown = time.monotonic()
        pl_module.decoder.on_progress = self._within_group
        pl_module.decoder.on_adapt = self._adapting
        if sys.stdout.isatty():
            times = TimeElapsedColumn(), TimeRemainingColumn()
            note = TextColumn("{task.fields[note]}")
            self.bar = Progress(TextColumn("decoding"), BarColumn(bar_width=30), MofNCompleteColumn(), *times, note)
            self.bar.add_task("groups", total=self.total, note="")
            self.bar.start()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        if self.enabled:
            self.batches = {}
            self.done += 1
            self.fresh += bool(outputs)
            for row in outputs:
                collect(self.stats, row)
            notes = []
            for arm in filter(lambda one: one.answered, self.stats.values()):
                speed = arm.tokens_per_second
                notes.append(f"{arm.name} τ {arm.tau.micro:.2f}" + (f" {speed:.1f} tokens/s" if speed == speed else ""))
            self._show(" | ".join(notes), last=self.done == self.total)

    def on_predict_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error has a line of its own."""
        self.on_predict_end()

    def _within_group(self, arm: str, state: DecodeState) -> None:
        now, batches = time.monotonic(), self.batches.setdefault(arm, [])
        if not batches or (not state.verifications and batches[-1][0].verifications):  # another batch begins
            batches.append((state, now, now))
        batches[-1] = (state, batches[-1][1] if state.verifications else now, now)
        tokens = sum(one.tokens for one, _, _ in batches)
        committed, seconds = tokens - sum(one.rows for one, _, _ in batches), sum(end - at for _, at, end in batches)
        verifications = sum(one.verifications for one, _, _ in batches)
        note = f"{arm}: {state.active} rows active, {tokens} tokens"
        if state.tokens == 0:
            note = f"{arm}: prefill of {state.rows} rows"
        elif verifications and seconds > 0:
            note += f", τ {committed / verifications:.2f}, {committed / seconds:.1f} tokens/s"
        if state.note:
            note += f", {state.note}"
        self._show_in_time(note, begins=state.tokens == 0)

    def _adapting(self, context: str, step: int, what: str) -> None:
        self._show_in_time(f"adapting to {context}… {what}", begins=step == 0)

    def _show_in_time(self, note: str, *, begins: bool) -> None:
        """Shows what is going on now and then; a bar shows all that begins, which may take long."""
        waited = time.monotonic() - self.shown
        if waited >= (REFRESH if self.bar else self.line_every) or (begins and self.bar is not None):
            self._show(note)

    def _show(self, note: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=note)
        elif last or now - self.shown >= self.line_every:
            elapsed = now - self.started
            rest = f", about {elapsed / self.fresh * (self.total - self.done):.0f} s left" if self.fresh else ""
            print(f"decoding: {self.done}/{self.total} groups, {elapsed:.0f} s{rest}; {note}", flush=True)
        else:
            return
        self.shown = now


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
        self.total, self.step = trainer.estimated_stepping_batches, trainer.global_step
        self.shown, self.paused = time.monotonic(), 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
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
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
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
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
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
