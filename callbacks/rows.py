"""What callbacks of a predict run share: its folder, its rows, TensorBoard's writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dgd_lightning import run_folder
from dgd_lightning.callbacks.prediction_writer import written_before, written_folder


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
        self.folder = written_before(trainer, self)
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
