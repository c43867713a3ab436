"""The `dgd` command: fit, validate, test and predict, each a LightningCLI run described by one YAML file."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

from dgd_lightning.errors import InputError

USAGE = """usage: dgd SUBCOMMAND [--config FILE.yaml] [--key value ...]

Draft-guided decoding of language models.

subcommands:
  predict    decode tasks with a target and its draft; write predictions, metrics and a table
  fit        train a draft or a miniature target
  validate   run the validation loop of a training module
  test       read gold answers with target, draft, controls and layers: a go/no-go table and verdict;
             or run the test loop of a training module
  sweep      search settings of a predict run with Optuna, one process a trial
  score      grade the answers of finished runs: by program, by math-verify, in a sandbox, or by a judge
  report     one page about graded runs: solve rates, what arms changed, a verdict

Every value of a YAML file can be overridden: dgd predict --config configs/quickstart.yaml --data.limit 8
Start with:                                  dgd predict --config configs/quickstart.yaml
All keys of one subcommand:                  dgd predict --help
All keys of one class:                       dgd predict --model.help Decoding   (or --data.help ContextsData)
"""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR}
INTERRUPTED = "dgd: interrupted; the same command continues an unfinished predict, score or diagnostic run"
TERMINATED = 128 + signal.SIGTERM
END_SECONDS = 5.0  # from SIGTERM to an end without ceremony
LAUNCHED_RANK_WAITS = 5.0  # seconds

# Lightning's remarks that tell a user nothing he could act on here.
_QUIET_WARNINGS = (
    r".*does not have many workers.*",
    r".*LightningCLI's args parameter.*",
    r".*predict returned None.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*not resumable.*",  # our orders depend on the step alone
    r".*smaller than the logging interval.*",
    r".*DistributedSampler.*",
    r".*You are using a CUDA device.*Tensor Cores.*",
    r".*No seed found.*",
    r".*module\(s\) in eval mode at the start of training.*",  # a frozen pair with LoRA layers in it
    r".*Your `IterableDataset` has `__len__` defined.*",
    r".*destroy_process_group.*",
)
_QUIET_LOG = (
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


_TALKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
    "lightning.pytorch.accelerators.cuda",
    "lightning_utilities.core.rank_zero",
)


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in _QUIET_LOG) or record.levelno > logging.INFO


def _hush() -> None:
    """Drops the messages listed above; everything else still comes through."""
    for message in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    quiet = _Quiet()
    for name in _TALKERS:
        logging.getLogger(name).addFilter(quiet)
    if not sys.stderr.isatty():  # a log file wants no bars, and an error is one line
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does. (Lightning notes it, and looks at the note in fits alone.)

    Python drops what a handler raises amid a destructor or a callback of the collector, so a process that is still in
    the block some seconds later is left as it is: rows are on the disk as soon as they are made.
    """
    timers: list[threading.Timer] = []

    def leave() -> None:
        print(INTERRUPTED.replace("interrupted", "terminated"), file=sys.stderr, flush=True)
        os._exit(TERMINATED)

    def end(*_: object) -> None:
        timers.append(threading.Timer(END_SECONDS, leave))
        timers[-1].daemon = True
        timers[-1].start()
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for timer in timers:
            timer.cancel()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps what the block imports out of garbage collection: now, in every later one, and at the end.

    It makes most of a million objects, hardly any of them garbage, and looking through them takes seconds in all.
    """
    if "lightning" in sys.modules or not gc.isenabled():  # imported already: what is new here is another's
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_thaw)


def _thaw() -> None:
    """Extension modules complain of what is left at the end; there Python collects once whatever is set here."""
    gc.disable()
    gc.unfreeze()


def _check_config_files(argv: Sequence[str]) -> None:
    """Meets a config file that is missing or no YAML in the way that the whole parser would, seconds earlier."""
    from jsonargparse import ArgumentError, ArgumentParser

    from dgd_lightning.cli_errors import from_file_message

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    for before, argument in pairwise(argv):
        given = argument if before in ("-c", "--config") else argument.partition("--config=")[2]
        if not given or given == "-" or (os.path.exists(given) and not os.path.isfile(given)):  # a pipe is read once
            continue
        try:
            parser.parse_args(["--config", given])
        except ArgumentError as error:  # most files: this parser knows none of their keys
            if (mistake := from_file_message(str(error))) is not None:
                raise mistake from error


def _lightning(argv: Sequence[str]) -> int:
    """fit, validate, test, predict. Importing Lightning takes seconds, so it happens here, not at the top."""
    _check_config_files(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make small models many times slower when anything else wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with _uncollected():
        from jsonargparse import ArgumentError
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from dgd_lightning.cli_errors import as_written, from_parser_message
        from dgd_lightning.cli_lightning import ProjectCLI, import_plugins

        _hush()
        import_plugins()
    try:
        with _ended_by_sigterm() if argv[0] in ("predict", "test") else nullcontext():
            ProjectCLI(args=list(argv))
    except ArgumentError as error:
        raise from_parser_message(str(error)) from error
    except MisconfigurationException as error:
        if "gpu" in str(error).lower() or "accelerator" in str(error).lower():
            raise InputError(
                "trainer.accelerator",
                expected="a device that this machine has",
                received=error,
                hint="add --trainer.accelerator cpu, or auto",
            ) from error
        raise InputError(
            "configuration",
            expected="a combination that Lightning accepts",
            received=error,
            hint="change the named argument",
        ) from error
    except Exception as error:
        if (mistake := _cause(error) or _file_mistake(error)) is None:
            raise
        raise as_written(mistake) from error
    return 0


def _sweep(argv: Sequence[str]) -> int:
    from dgd_lightning.sweep import main as sweep

    return sweep(argv)


def _score(argv: Sequence[str]) -> int:
    from dgd_lightning.score import main as score

    return score(argv)


def _report(argv: Sequence[str]) -> int:
    from dgd_lightning.report_command import main as report

    return report(argv)


# Subcommand -> what runs it with the whole argument list; commands without a model register their own function.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "fit": _lightning,
    "validate": _lightning,
    "test": _lightning,
    "predict": _lightning,
    "sweep": _sweep,
    "score": _score,
    "report": _report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one `dgd` command.

    Args:
        argv: the arguments after the program's name; those of the process where None.

    Returns:
        0 on success, 2 on a user's mistake (told on stderr in one line), 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"dgd-lightning {version('dgd-lightning')}")
        return 0
    try:
        command = COMMANDS.get(argv[0])
        if command is None:
            raise InputError(
                "subcommand", expected=f"one of {', '.join(COMMANDS)}", received=argv[0], hint="see `dgd --help`"
            )
        return command(argv)
    except InputError as error:
        _tell(error)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
            print(INTERRUPTED, file=sys.stderr)
            return 130
        if stop.code == TERMINATED or type(stop).__name__ == "SIGTERMException":
            print(INTERRUPTED.replace("interrupted", "terminated"), file=sys.stderr)
            return TERMINATED
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if (mistake := _cause(error) or _file_mistake(error)) is None:
            raise
        _tell(mistake)
        return 2


def _cause(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def _file_mistake(error: BaseException | None) -> InputError | None:
    """What to tell where the system refuses a file, wherever it was met: what was written before is whole."""
    while error is not None and not (isinstance(error, OSError) and error.errno in REFUSED):
        error = error.__cause__  # not its context: an error of ours amid the handling of another is no user's
    if not isinstance(error, OSError):
        return None
    full = error.errno in FULL
    return InputError(
        str(error.filename or "disk"),
        expected="room to write" if full else "a file that may be read, and a folder that may be written",
        received=error.strerror,
        hint=f"{'make room' if full else 'see to its permissions'}, then give the same command again",
    )


def _tell(error: InputError) -> None:
    """One line on stderr. All ranks meet most mistakes at once, and then rank 0 ends the others before they speak."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LAUNCHED_RANK_WAITS)
    print(f"dgd: error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
