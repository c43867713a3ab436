"""What callbacks of a run with rows share: its rows to disk and back, its folder, sums, TensorBoard's writer."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dgd_lightning import run_folder
from dgd_lightning.checks import check_number
from dgd_lightning.errors import InputError
from dgd_lightning.jsonl import JsonLines


class PredictionWriter(Callback):
    """Appends each group's rows to this rank's shard, and merges the shards into one file at the end.

    That file is `predictions.jsonl` in predict and `diagnostic.jsonl` in test. A run that was killed continues where it
    stopped: rows on disk are kept, groups that miss a row are done again. The module says which rows a task gets
    (``row_names``); its ``done`` is set to those that are there, and ``tasks_together`` to the sizes of the groups that
    did not fit the memory whole, by task, so that what is missing of them is decoded as the rest was.

    Ranks may need very different times. So no rank waits in a collective once it has no context left: it marks its
    shard as whole and ends, and rank 0 waits for the marks.

    Args:
        merge_wait: hours that rank 0 waits for the other ranks' shards after its own last context.
    """

    def __init__(self, merge_wait: float = 24.0) -> None:
        self.merge_wait = check_number("PredictionWriter.merge_wait", merge_wait, above=0, hint="use e.g. 24")
        self.folder: Path | None = None
        self.file: JsonLines | None = None
        self.have: set[run_folder.Key] = set()
        self.parent = os.getppid()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Finds the rows that are there already, which must be of this configuration."""
        if stage not in run_folder.ROWS:
            return
        self.name = run_folder.ROWS[stage]
        self.hash = run_folder.config_hash(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        log_dir = trainer.log_dir  # a collective: the same on every rank
        assert log_dir is not None
        self.folder = Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = JsonLines(run_folder.shard(self.folder, trainer.global_rank, self.name))
        run_folder.mark(self.folder, trainer.global_rank, self.name).unlink(missing_ok=True)  # of a session before
        pl_module.tasks_together = {}
        for path in run_folder.sources(self.folder, self.name):
            for _, row in run_folder.read_rows(path):
                if (found := row["dgd"].get("config_hash")) != self.hash:
                    expected, hint = f"rows of configuration {self.hash}", "use another folder or name"
                    raise InputError("logs_dir", expected=expected, received=f"{path} with rows of {found}", hint=hint)
                self.have.add(run_folder.key(row))
                if "tasks_together" in row["dgd"]:
                    pl_module.tasks_together[row["idx"]] = row["dgd"]["tasks_together"]
        pl_module.done = set(self.have)
        if self.have and trainer.is_global_zero:
            total = len(trainer.datamodule.tasks) * len(pl_module.row_names)  # type: ignore[attr-defined]
            print(f"continuing {self.folder}: {len(self.have)} of {total} rows are there", flush=True)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        """Writes the rows that are not on disk yet."""
        assert self.file is not None
        rows = [row for row in outputs if run_folder.key(row) not in self.have]
        for row in rows:
            row["dgd"]["config_hash"] = self.hash
        self.file.append(rows)
        self.have.update(map(run_folder.key, rows))
        if trainer.global_rank > 0 and os.getppid() != self.parent:
            raise SystemExit("the process that launched this rank is gone")  # else it would hold its shard for hours

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Marks this rank's shard as whole; rank 0 merges all of them, and later callbacks read the merged file."""
        assert self.folder is not None
        self._close()
        if not trainer.is_global_zero:
            run_folder.mark_whole(self.folder, trainer.global_rank, self.name)
            return
        run_folder.await_shards(self.folder, range(1, trainer.world_size), self.name, self.merge_wait * 3600)
        tasks = trainer.datamodule.tasks  # type: ignore[attr-defined]
        order = [(task.idx, name) for task in tasks for name in pl_module.row_names]
        if run_folder.merge(self.folder, order, self.name) == len(order):
            run_folder.finish(self.folder, self.name)

    on_test_batch_end, on_test_epoch_end = on_predict_batch_end, on_predict_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the shard, so that the same process may try again."""
        self._close()

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def written_folder(trainer: Trainer) -> Path | None:
    """The folder that a run's rows go to; None where nothing writes rows.

    ``trainer.log_dir`` is a collective, and once a rank has no context left it must wait for no other rank.
    """
    writers = (callback for callback in trainer.callbacks if isinstance(callback, PredictionWriter))  # type: ignore[attr-defined]
    return next((writer.folder for writer in writers), None)


class FinishedRows(Callback):
    """A callback whose work begins when a predict run's rows are merged: on rank 0, without any collective."""

    folder = Path()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `finish` on rank 0."""
        folder = written_folder(trainer)
        if trainer.is_global_zero and folder is not None:
            self.folder = folder
            self.finish(trainer, pl_module)

    def finish(self, trainer: Trainer, module: Any) -> None:
        """Reads ``self.folder`` and adds to ``module.summary``."""
        raise NotImplementedError


class RowSums(FinishedRows):
    """Sums over rows: live ones of rank 0's own rows; at the end of all rows, those of earlier sessions included.

    Args:
        samples: tasks whose rows are kept in ``sampled`` at the end.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.sampled: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Begins anew."""
        raise NotImplementedError

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        raise NotImplementedError

    def draw(self, writer: Any) -> None:
        """Adds a point to the live curves."""

    def is_sample(self, row: dict[str, Any]) -> bool:
        """Whether the row is worth showing."""
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes up the rows of an earlier session; a `PredictionWriter` must come before this callback."""
        if stage != "predict":
            return
        self.reset()
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        if not any(isinstance(other, PredictionWriter) for other in before):
            raise InputError(
                "trainer.callbacks",
                expected=f"PredictionWriter before {type(self).__name__}",
                received=", ".join(type(other).__name__ for other in before) or "nothing",
                hint="add it; the final numbers are read from its file",
            )
        self.folder = written_folder(trainer) or self.folder
        if trainer.is_global_zero:
            for row in run_folder.rows_so_far(self.folder):
                self.add(row)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        """Adds the rows that were not there in `setup`."""
        if trainer.is_global_zero and outputs:
            for row in outputs:
                if run_folder.key(row) not in pl_module.done:
                    self.add(row)
            if (writer := tensorboard(trainer)) is not None:
                self.draw(writer)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sums all rows up anew, then calls `finish`."""
        if trainer.is_global_zero:
            self.reset()
            self.sampled = []
            for row in run_folder.read_predictions(self.folder):
                self.add(row)
                if len(self.sampled) < self.samples * len(pl_module.arms) and self.is_sample(row):
                    self.sampled.append(row)
        super().on_predict_end(trainer, pl_module)


def tensorboard(trainer: Trainer) -> Any:
    """TensorBoard's writer, or None where the user chose another logger or none."""
    logger = trainer.logger
    return logger.experiment if isinstance(logger, TensorBoardLogger) else None


def add_scalars(writer: Any, values: Mapping[str, float], step: int, prefix: str = "") -> None:
    """Adds those that are numbers; NaN: there is nothing to draw."""
    for name, value in values.items():
        if value == value:
            writer.add_scalar(prefix + name, value, step)
