"""LightningCLI with the project's defaults: plain errors, versioned run folders, predictions that resume."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from dgd_lightning.errors import InputError

PLUGIN_PACKAGES = ("dgd_lightning.data", "dgd_lightning.modules", "dgd_lightning.lab", "callbacks")


def import_plugins() -> None:
    """Imports the project's modules, datamodules and callbacks: only imported classes resolve by their short names."""
    for package in PLUGIN_PACKAGES:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{info.name}")


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder; a resumed run finds its own there and may overwrite it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.overwrite = True
        super().setup(trainer, pl_module, stage)


class ProjectCLI(LightningCLI):
    """`dgd fit|validate|test|predict`: model and data are given by class path (short names for the project's own)."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            args=args,
            save_config_callback=SaveConfig,
            trainer_defaults={"enable_autolog_hparams": False, "enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{**kwargs, "exit_on_error": False, "prog": "dgd"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The run goes to LOGS_DIR/NAME/version_N. Default: the config file's name.",
        )
        parser.add_argument("--logs_dir", type=str, default="logs", help="Folder of all runs.")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's own, with arguments that make no sense on a command line left out."""
        skipped = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": skipped,
            "test": skipped,
            "predict": skipped,
        }

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's stored hyperparameters do not override the YAML."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our logger where the user chose none."""
        configured = self._get(self.config_init, "trainer")
        if configured.logger is None or configured.logger is True:
            kwargs["logger"] = self._logger()
        return super().instantiate_trainer(**kwargs)

    def _logger(self) -> TensorBoardLogger:
        name = self._get(self.config, "name") or self._config_stem() or str(self.subcommand)
        logger = TensorBoardLogger(self._get(self.config, "logs_dir"), name=name, default_hp_metric=False)
        _writable(Path(logger.root_dir))
        return logger

    def _config_stem(self) -> str | None:
        files = self._get(self.config, "config") or []
        return Path(str(files[-1])).stem if files else None

    def _callbacks(self) -> list[Callback]:
        return self._get(self.config_init, "trainer").callbacks or []


def _writable(folder: Path) -> None:
    """Makes the folder and writes a file into it, so that a full run does not fail at its end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".dgd-write-test"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            "logs_dir",
            expected="a folder that can be written",
            received=f"{folder} ({error.strerror})",
            mend="choose another with --logs_dir",
        ) from error
