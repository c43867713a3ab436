"""LightningCLI with the project's defaults: plain errors, versioned run folders, predictions that resume."""

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dgd_lightning.callbacks import (
    AdaptMetrics,
    DecodeMetrics,
    DecodeProgress,
    DiagnosticReport,
    DivergenceMetrics,
    FitInterrupted,
    FitProgress,
    PowerMetrics,
    PredictionWriter,
    Provenance,
)
from dgd_lightning.checks import check_folder_name, check_integer
from dgd_lightning.commands.given import OPTIONS
from dgd_lightning.commands.mistakes import check_checkpoint, check_subcommand
from dgd_lightning.commands.reading import replacing
from dgd_lightning.data import TaskData
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.modules.arms import described
from dgd_lightning.modules.decoding import Decoding
from dgd_lightning.modules.diagnostic import Diagnostic
from dgd_lightning.modules.training import require_writable
from dgd_lightning.run_folder import (
    PROVENANCE,
    choose_version,
    config_hash,
    discard_start,
    next_version,
    unfinished_version,
)

ROOMS = ("data", "decode.readouts", "decode", "methods", "modules", "lab", "callbacks")
PLUGIN_PACKAGES = tuple(f"dgd_lightning.{room}" for room in ROOMS)


def import_plugins() -> None:
    """Imports what YAML may name: only imported classes resolve by their short names."""
    for package in PLUGIN_PACKAGES:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{info.name}")


class RunLogger(TensorBoardLogger):
    """TensorBoard in ``LOGS_DIR/NAME/version_N``, a folder that rank 0 chooses when it is first asked for it.

    A ``version`` that is given is gone on with; else one of the configuration hash ``wanted`` may be, or it is new.
    """

    def __init__(self, logs_dir: Path, name: str, version: int | None) -> None:
        super().__init__(logs_dir, name=name, version=version, default_hp_metric=False)
        self.wanted: str | None = None
        self.by_word: str | None = None  # the hash that it had while ``dtype: auto`` was hashed as this word
        self.made = False  # whether this run made the folder

    @property
    def version(self) -> int | str:
        """Its number. Only rank 0's choice matters: the other ranks ask it for the folder."""
        if self._version is None:
            first = _is_first_rank()
            self._version = choose_version(Path(self.root_dir), self.wanted, self.by_word) if first else 0
            # a version that is continued has named its configuration
            self.made = first and not Path(self.log_dir, PROVENANCE).exists()
        return self._version


class FailedStart(Callback):
    """Removes the version that a run has just made when it fails on a user's mistake with nothing to keep.

    Stands before `PredictionWriter`, which still holds its shard then: no other run takes the version up meanwhile.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        logger = trainer.logger
        mistake = isinstance(exception, InputError) and trainer.global_step == 0
        if mistake and isinstance(logger, RunLogger) and logger.made:
            logger.finalize("failed")  # closes the event file, which would else appear again
            with contextlib.suppress(OSError):  # the mistake is what is reported
                discard_start(Path(logger.log_dir))


class ProjectCLI(LightningCLI):
    """`dgd fit|validate|test|predict`: model and data are given by class path (short names for the project's own)."""

    def __init__(self, args: list[str]) -> None:
        self._asked, self._given = args[0], args
        super().__init__(
            args=args,
            save_config_kwargs={"overwrite": True},  # a resumed run finds its own config.yaml in its folder
            # inference_mode: adaptation at predict time needs autograd, which inference mode rules out.
            trainer_defaults={"enable_autolog_hparams": False, "enable_model_summary": False, "inference_mode": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**{**kwargs, "exit_on_error": False, "prog": "dgd"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help=OPTIONS["name"])
        parser.add_argument("--logs_dir", type=str, default="logs", help=OPTIONS["logs_dir"])
        parser.add_argument("--check", action="store_true", help=OPTIONS["check"])
        parser.add_argument("--verbose", action="store_true", help=OPTIONS["verbose"])

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, which asks the instance
        """The one that was asked for (a parser of each costs as much again), with the arguments of the Trainer's method
        that make no sense on a command line."""
        if self._asked == "fit":
            return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}
        skipped = {"model", "dataloaders", "datamodule", "verbose"}  # --verbose is ours
        return {self._asked: skipped | ({"return_predictions"} if self._asked == "predict" else set())}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with replacing():
            super().parse_arguments(parser, args)

    def _set_seed(self) -> None:
        """Refuses a seed that NumPy can't have, before Lightning gives it to all generators."""
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool):
            check_integer("seed_everything", seed, least=0, most=2**32 - 1, optional=True)
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's stored hyperparameters do not override the YAML."""

    def instantiate_classes(self) -> None:
        """The classes; the module hears how much is to be printed, which is no setting of its own."""
        super().instantiate_classes()
        self.model.verbose = self._get(self.config, "verbose")

    def before_instantiate_classes(self) -> None:
        """Refuses a ``--ckpt_path`` that is not there."""
        check_checkpoint(self._get(self.config, "ckpt_path"))

    def predict(self, **kwargs: Any) -> None:
        """Predict without holding the rows in memory, after checks that need no launched ranks."""
        self._check_rows_run(Decoding)
        if self.trainer.is_global_zero:
            print("\n".join(described(self.model.arms)), flush=True)
        self.trainer.predict(return_predictions=False, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Test; a diagnostic after the checks of predict, since it writes rows too."""
        if self._makes_rows():
            self._check_rows_run(Diagnostic)
        self.trainer.test(**kwargs)

    def _makes_rows(self) -> bool:
        """Whether the run writes a row per task, and continues where it was killed."""
        return self.subcommand == "predict" or (self.subcommand == "test" and isinstance(self.model, Diagnostic))

    def _check_rows_run(self, kind: type[LightningModule]) -> None:
        for argument, value, wanted in (("data", self.datamodule, TaskData), ("model", self.model, kind)):
            if not isinstance(value, wanted):
                raise InputError(
                    argument,
                    expected=f"a {wanted.__name__}, such as {', '.join(_names(wanted) or [wanted.__name__])}",
                    received=type(value).__name__ if value is not None else "nothing",
                    hint=f"set {argument}.class_path",
                )
        fast_dev_run = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        for argument, refused, received, hint in (
            ("fast_dev_run", fast_dev_run, "true", "set it to false, and data.limit for a short run"),
            ("logger", not self.trainer.loggers, "false", f"{LEAVE_OUT}: rows are written into the logger's folder"),
        ):
            if refused:
                raise InputError(f"trainer.{argument}", expected="the default", received=received, hint=hint)
        self.datamodule.check_ranks(self.trainer.world_size, together=getattr(self.model, "ttt", None) is not None)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; where it fails, launched ranks are ended too: they would wait for this one for ever."""
        check_subcommand(subcommand, [kind.__name__ for kind in type(self.model).__mro__])
        if self._get(self.config, "check"):
            self._show()
            return
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            launcher = self.trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGTERM)
            raise

    def _show(self) -> None:
        """What the configuration comes to, a line each, after the checks that need no weights."""
        if self._makes_rows():
            self._check_rows_run(Decoding if self.subcommand == "predict" else Diagnostic)
        source = getattr(self.model, "source", None)
        for name, part in (("model", self.model), ("data", self.datamodule)):
            lines = [f"{name}: {type(part).__name__}"] * (part is not None)
            print("\n".join(part.resolved() if hasattr(part, "resolved") else lines))
        if source is not None and not hasattr(self.model, "resolved"):
            print(source.described(source.outline()))
        if source is not None and source.dtype == "auto" and Path(source.target).is_dir():  # else it may be a download
            print(source.why_dtype(self.trainer))
        logger = self.trainer.logger
        if isinstance(logger, RunLogger):
            root, version = Path(logger.root_dir), logger._version
            found = version if version is not None or logger.wanted is None else unfinished_version(root, logger.wanted)
            number = next_version(root) if found is None else found
            print(f"run folder: {root / f'version_{number}'} ({'new' if found is None else 'goes on'})")

    def after_fit(self) -> None:
        """Says where the run and its curves are."""
        logger = self.trainer.logger
        if self.trainer.is_global_zero and isinstance(logger, TensorBoardLogger | CSVLogger):
            print(f"run folder: {logger.log_dir}")
            if isinstance(logger, TensorBoardLogger):
                print(f"curves:     tensorboard --logdir {logger.root_dir}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our logger where the user chose none, and with the callbacks that every run has."""
        settings = self._get(self.config_init, "trainer")
        wants_bar = settings.get("enable_progress_bar") is not False
        settings["callbacks"] = self._with_defaults(settings.get("callbacks"), wants_bar)
        given = settings.get("logger")
        if given in (None, True):
            kwargs["logger"] = self._logger()
        for logger in given if isinstance(given, list) else [given]:
            _check_logger(logger)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                "trainer",
                expected="settings that Lightning accepts here",
                received=error,
                hint="change the named setting",
            ) from error
        logger, named = trainer.logger, all(hasattr(part, "fingerprint") for part in (self.model, self.datamodule))
        if isinstance(logger, RunLogger) and self._makes_rows() and named and _is_first_rank():
            logger.by_word = config_hash(self.model, self.datamodule)
            self.model.trainer = trainer  # of ``dtype: auto`` what it comes to on its device is hashed
            logger.wanted = config_hash(self.model, self.datamodule)
        return trainer

    def _with_defaults(self, configured: Callback | list[Callback] | None, wants_bar: bool) -> list[Callback]:
        """The configured callbacks after those that a run has anyway; a configured one takes its default's place."""
        given = configured if isinstance(configured, list) else [configured] if configured else []
        wants_bar = wants_bar and not any(isinstance(callback, ProgressBar) for callback in given)
        # The shard is locked before the provenance names a configuration with which another run may continue.
        kinds: list[type[Callback]] = [FailedStart, *([PredictionWriter] if self._makes_rows() else []), Provenance]
        if self.subcommand == "predict":
            kinds += [DecodeMetrics, AdaptMetrics, PowerMetrics]
            kinds += [DivergenceMetrics] if getattr(self.model, "divergence", None) is not None else []
            kinds += [DecodeProgress] if wants_bar else []
        else:
            kinds += [DiagnosticReport] if self._makes_rows() else []
            # Lightning's own bar shows nothing in a file
            kinds += [FitProgress] if wants_bar and not sys.stdout.isatty() else []
        first = [next((c for c in given if isinstance(c, kind)), None) or kind() for kind in kinds]
        if self.subcommand == "fit" and getattr(self.model, "continues", False):
            first.append(FitInterrupted(self._given))
        return first + [callback for callback in given if callback not in first]

    def _logger(self) -> RunLogger:
        files = self._get(self.config, "config") or [self.subcommand]
        name = self._get(self.config, "name")
        name = check_folder_name("name", Path(str(files[-1])).stem if name is None else name)
        logs_dir = Path(self._get(self.config, "logs_dir")).expanduser()
        if not self._get(self.config, "check"):
            require_writable(logs_dir / name, "logs_dir")
        version = None
        if self.subcommand == "fit":
            # A checkpoint names its folder; ModelCheckpoint goes on with its best one only where that is the same.
            logs_dir = logs_dir.resolve()
            version = self._resumed_version(logs_dir / name)
        return RunLogger(logs_dir, name, version)

    def _resumed_version(self, root: Path) -> int | None:
        """The version of this run that ``--ckpt_path`` lies in, or None."""
        path = Path(self._get(self.config, "ckpt_path") or "").resolve()
        folder = path.relative_to(root).parts[0] if path != root and path.is_relative_to(root) else ""
        number = folder.removeprefix("version_")
        return int(number) if folder != number and number.isdecimal() else None


def _check_logger(logger: Any) -> None:
    """Refuses a configured logger whose name, version or sub_dir leads out of its own ``save_dir``."""
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        folder, root = os.path.abspath(logger.log_dir), os.path.abspath(logger.save_dir)
        if "\0" in folder or not Path(folder).is_relative_to(root):
            expected = f"a name and a version that stay in the save_dir {root}"
            raise InputError("trainer.logger", expected=expected, received=repr(folder), hint="use plain names")


def _names(kind: type[Any]) -> list[str]:
    """Names of all classes below a kind."""
    return [name for found in kind.__subclasses__() for name in (found.__name__, *_names(found))]


def _is_first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
