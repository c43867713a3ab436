"""What a process does before it imports Lightning: environment, garbage collection, and remarks that it leaves out."""

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Lightning's remarks about which a user can do nothing here.
QUIET_WARNINGS = (
    "does not have many workers",
    "LightningCLI's args parameter",
    "predict returned None",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Experiment logs directory .* exists and is not empty",
    "Checkpoint directory .* exists and is not empty",
    "not resumable",  # our orders depend on the step alone
    "smaller than the logging interval",
    "DistributedSampler",
    "You are using a CUDA device.*Tensor Cores",
    "No seed found",
    r"module\(s\) in eval mode at the start of training",  # a frozen pair with LoRA layers in it
    "Your `IterableDataset` has `__len__` defined",
    "destroy_process_group",
)
QUIET_LOG = (
    "Tip",
    "GPU available",
    "TPU available",
    "HPU available",
    "LOCAL_RANK",
    "Seed set to",
    "Missing logger folder",
    "Initializing distributed",
    "distributed_backend=",
    "All distributed processes registered",
    "Starting with ",
    "Using bfloat16",
    "Using 16bit",
    "Running in `fast_dev_run`",
    "-----",
)
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
    "lightning.pytorch.accelerators.cuda",
    "lightning_utilities.core.rank_zero",
)


@contextmanager
def bootstrap() -> Iterator[None]:
    """Around the imports of Lightning and of the project's modules.

    What the block imports is kept out of garbage collection, now, in every later one, and at the end: it makes most of
    a million objects, hardly any of them garbage, and looking through them takes seconds in all.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make small models many times slower when anything else wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    collects = "lightning" not in sys.modules and gc.isenabled()  # where it is imported, what is new is another's
    if collects:
        gc.disable()
    try:
        yield
        _hush()
    finally:
        if collects:
            gc.freeze()
            gc.enable()
            atexit.register(_thaw)


def _thaw() -> None:
    """Extension modules complain of what is left at the end; there Python collects once whatever is set here."""
    gc.disable()
    gc.unfreeze()


def _quiet(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not any(part in record.getMessage() for part in QUIET_LOG)


def _hush() -> None:
    """Drops the messages listed above; everything else still comes through."""
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_quiet)
    if not sys.stderr.isatty():  # a log file wants no bars, and an error is one line
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
