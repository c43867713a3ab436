"""`dgd SUBCOMMAND …`: which file runs a subcommand, exit codes, and what is printed where one fails."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from dgd_lightning import __version__
from dgd_lightning.checks import check_choice
from dgd_lightning.commands.configs import with_paths
from dgd_lightning.commands.errors import mistake_behind

USAGE = """usage: dgd SUBCOMMAND [--config FILE.yaml] [--key value ...]

Draft-guided decoding of language models.

subcommands:
  predict    decode tasks with a target and its draft; write predictions, metrics and a table
  fit        train a draft or a miniature target
  validate   run the validation loop of a training module
  test       read gold answers with target, draft, controls and layers: a go/no-go table and verdict;
             or run the test loop of a training module
  sweep      search settings of a predict run with Optuna, one process a trial
  show       the answers of a run, task by task
  score      grade the answers of finished runs: by program, by math-verify, in a sandbox, or by a judge
  report     one page about graded runs: solve rates, what arms changed, a verdict
  card       a model card for a draft, with τ and speed-up of a run
  configs    list the configurations that come with the package; copy one to change it

Every value of a YAML file can be overridden: dgd predict --config quickstart --data.limit 8
Start with:                                  dgd predict --config quickstart
What a subcommand takes:                     dgd predict --help   (Lightning's own options: --help.trainer)
What a class takes:                          dgd predict --model.help Decoding   (or --data.help, --model.ttt.help …)
"""

# Subcommand -> the file of this room whose `main` runs it with the whole argument list. Imported when asked for:
# Lightning takes seconds, and `dgd score` needs none of it.
COMMANDS = dict.fromkeys(("fit", "validate", "test", "predict"), "run")
COMMANDS |= {name: name for name in ("sweep", "show", "score", "report", "card", "configs")}
LAUNCHED_RANK_WAITS = 5.0  # seconds
CONTINUED = ("predict", "test", "score", "sweep")  # what was done of them is kept
TERMINATED = 128 + signal.SIGTERM
END_SECONDS = 5.0  # from SIGTERM to an end without ceremony


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one `dgd` command.

    It gives 0 on success, 2 on a user's mistake (one line on stderr), 130 after Ctrl-C, 143 after SIGTERM, 141 where
    nobody reads what is printed any more.
    """
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():
            raise
        return 128 + signal.SIGPIPE
    return code


def _unread() -> bool:
    """Whether nobody reads what is printed any more, as behind `| head`; then it goes nowhere from here on."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    unread = any(event & select.POLLERR for _, event in poll.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return unread


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"dgd-lightning {__version__}")
        return 0
    try:
        check_choice("subcommand", argv[0], COMMANDS, hint="see `dgd --help`")
        return import_module(f"dgd_lightning.commands.{COMMANDS[argv[0]]}").main(with_paths(argv))
    except KeyboardInterrupt:
        print(ended("interrupted", argv[0]), file=sys.stderr)
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
            print(ended("interrupted", argv[0]), file=sys.stderr)
            return 130
        if stop.code == TERMINATED or type(stop).__name__ == "SIGTERMException":
            print(ended("terminated", argv[0]), file=sys.stderr)
            return TERMINATED
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if (mistake := mistake_behind(error)) is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":  # all ranks meet most mistakes: rank 0 ends the others first
            time.sleep(LAUNCHED_RANK_WAITS)
        print(f"dgd: error: {mistake}", file=sys.stderr)
        return 2


def ended(how: str, subcommand: str) -> str:
    """What is said of a command that a signal has ended."""
    what = "an unfinished diagnostic" if subcommand == "test" else "it"
    return f"dgd: {how}{f'; the same command continues {what}' if subcommand in CONTINUED else ''}"


@contextmanager
def ended_by_sigterm(subcommand: str) -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does. (Lightning notes it, and looks at the note in fits alone.)

    Python drops what a handler raises amid a destructor or a callback of the collector, so a process that is still in
    the block some seconds later is left as it is: rows are on the disk as soon as they are made.
    """
    timers: list[threading.Timer] = []

    def leave() -> None:
        print(ended("terminated", subcommand), file=sys.stderr, flush=True)
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
