"""`dgd sweep`: many runs of `dgd predict` that differ in a few settings, one process each, chosen by Optuna.

A sweep lives in `logs/<name>/`: Optuna's journal, a run folder per trial, `trials.csv`, a curve per setting and
`best.yaml`, a configuration that runs. The same command goes on where a killed sweep stopped: finished trials stay,
started ones are run again (and continue their own rows). A folder belongs to one question, and to one process at a
time.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from dgd_lightning.checks import check_integer
from dgd_lightning.commands.errors import parsed
from dgd_lightning.errors import InputError
from dgd_lightning.report.sweep_views import curve, leaders
from dgd_lightning.seeds import mixed_seed

JOURNAL, LOCK, TRIALS, BEST = "journal.log", "sweep.lock", "trials.csv", "best.yaml"
QUESTION = "question"  # the study's attribute that tells what it is about
Objective = Literal["tau_gain", "tau_gain_median", "tau"]


class Setting(NamedTuple):
    """One searched setting: a list of values, or a range."""

    key: str  # ``model.ttt.lr``
    values: list[Any] | None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    @property
    def varies(self) -> bool:
        """Whether trials can differ in it."""
        return self.values is None or len(self.values) > 1


def main(argv: Sequence[str]) -> int:
    """Run `dgd sweep --config FILE.yaml [--key value …]`.

    Args:
        argv: with the subcommand's name first.

    Raises:
        InputError: a setting that can't work, a folder that is another sweep's, or no trial that ended well.
    """
    options = parse_options(list(argv)[1:])
    settings = [read_setting(key, value) for key, value in options.search.items()]
    root = Path(options.logs_dir) / options.name
    with alone(root):
        Sweep(options, settings, root).run()
    return 0


def parse_options(argv: list[str]) -> Namespace:
    """The command's options, checked as far as no trial is needed for it.

    Args:
        argv: without the subcommand's name.

    Raises:
        InputError: an unknown or unparsable option, a missing or impossible one, or an arm that the base does not have.
    """
    parser = ArgumentParser(prog="dgd sweep", exit_on_error=False, description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the keys below")
    parser.add_argument("--name", type=str, default="sweep", help="the sweep goes to LOGS_DIR/NAME")
    parser.add_argument("--logs_dir", type=str, default="logs")
    parser.add_argument("--base", type=str, help="configuration of `dgd predict` that every trial starts from")
    parser.add_argument("--arm", type=str, help="the arm whose τ counts")
    parser.add_argument("--against", type=str | None, default=None, help="the arm it is compared with, for gains")
    parser.add_argument("--objective", type=Objective, default="tau_gain_median")
    parser.add_argument("--search", type=dict, help="settings: key: [values] or {low, high, log, integer}")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--sampler", type=Literal["tpe", "random", "grid"], default="tpe")
    parser.add_argument("--parallel", type=int, default=1, help="trials at a time")
    parser.add_argument("--devices", type=list[int] | None, default=None, help="GPUs that the trials share, in turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, argv)
    for key in ("base", "arm", "search"):
        if not options[key]:
            raise InputError(key, expected="a value", received="nothing", hint="see configs/sweeps/ttt.yaml")
    for key in ("trials", "parallel"):
        check_integer(key, options[key])
    if options.objective != "tau" and options.against is None:
        raise InputError("against", expected="an arm, for a gain", received="null", hint="name it, or use tau")
    if not Path(options.base).is_file():
        raise InputError("base", expected="an existing file", received=options.base, hint="check the path")
    if "model.arms" not in options.search:
        check_arm_names(options)
    return options


def check_arm_names(options: Namespace) -> None:
    """Raises:
    InputError: the base names no arms, or ``arm`` or ``against`` is none of them.
    """
    try:
        config = yaml.safe_load(Path(options.base).read_text(encoding="utf-8"))
        names = [arm["name"] for arm in config["model"]["init_args"]["arms"]]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            "base",
            expected="a YAML file of `dgd predict` with model.init_args.arms",
            received=f"{options.base} ({type(error).__name__}: {error})",
            hint="see configs/ttt/predict_lab.yaml",
        ) from error
    for argument in ("arm", "against"):
        if options[argument] is not None and options[argument] not in names:
            raise InputError(
                argument,
                expected=f"an arm of {options.base}: {', '.join(map(str, names))}",
                received=options[argument],
                hint="use one of them",
            )


def read_setting(key: str, value: Any) -> Setting:
    """A searched setting as the YAML gives it.

    Args:
        key: dotted, such as ``model.ttt.lr``.
        value: a list of values, or ``{low, high}`` with ``log`` and ``integer`` where wanted.

    Raises:
        InputError: the value is neither, or a range that holds nothing.
    """
    if isinstance(value, list) and value:
        return Setting(key, value)
    if isinstance(value, dict) and {"low", "high"} <= value.keys() <= {"low", "high", "log", "integer"}:
        low, high = float(value["low"]), float(value["high"])
        if low < high and (low > 0 or not value.get("log")):
            return Setting(key, None, low, high, bool(value.get("log")), bool(value.get("integer")))
    raise InputError(
        f"search.{key}",
        expected="a list of values, or {low: …, high: …} with low < high (and above 0 with log: true)",
        received=value,
        hint="for example [4, 8, 16] or {low: 1.0e-4, high: 1.0e-2, log: true}",
    )


def trial_command(base: str, chosen: dict[str, Any]) -> list[str]:
    """The arguments of `dgd` that run a base configuration with other settings, by dotted key."""
    command = ["predict", "--config", base]
    for key, value in chosen.items():
        # strings bare: a quoted one would be another value than the one that is meant
        command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return command


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds the sweep's folder for this process; the lock goes with the process, however it ends.

    Raises:
        InputError: another sweep holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "name",
                expected="a sweep that no other process runs",
                received=f"{root}, which one runs now",
                hint="wait for it, or use another --name",
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def question(options: Namespace) -> str:
    """Hash of all that decides what a trial's settings and its value mean: trials of one study share it."""
    asked = {name: options[name] for name in ("search", "arm", "against", "objective", "sampler")}
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode() + b"\0" + Path(options.base).read_bytes()).hexdigest()[:16]


class Sweep:
    """A study and how it is run; two of one folder must not run at once (`alone`).

    Args:
        options: the command's.
        settings: what is searched.
        root: the sweep's folder.

    Raises:
        InputError: Optuna is not installed, or the folder holds trials of another base, search, objective or sampler.
    """

    def __init__(self, options: Namespace, settings: list[Setting], root: Path) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise InputError(
                "sweep", expected="optuna", received="no such package", hint='pip install -e ".[sweep]"'
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.options, self.settings, self.root, self.optuna = options, settings, root, optuna
        root.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(root / JOURNAL)))
        self.study = optuna.create_study(
            study_name=options.name,
            storage=storage,
            direction="maximize",
            load_if_exists=True,
        )
        self._check_question()
        self.study.sampler = self._sampler()
        self.lock, self.console = threading.Lock(), Console()
        self.broken = threading.Event()  # set by the first trial that raises: no other begins
        self.devices: Queue[int | None] = Queue()
        for number in range(options.parallel):
            self.devices.put(options.devices[number % len(options.devices)] if options.devices else None)

    def _check_question(self) -> None:
        asked, known = question(self.options), self.study.user_attrs.get(QUESTION)
        if known != asked and self.study.get_trials(deepcopy=False):
            raise InputError(
                "name",
                expected="a new folder, or one of the same base file, search, arm, against, objective and sampler",
                received=f"{self.root}, whose trials have others",
                hint="use another --name, or delete the folder",
            )
        self.study.set_user_attr(QUESTION, asked)

    def _sampler(self) -> Any:
        # A generator of its own for every start: one that began anew would draw the first trials a second time.
        seed = mixed_seed(self.options.seed, len(self.study.get_trials(deepcopy=False))) % 2**32
        samplers = self.optuna.samplers
        return samplers.TPESampler(seed=seed) if self.options.sampler == "tpe" else samplers.RandomSampler(seed)

    def _cells(self) -> list[dict[str, int]]:
        """All cells of the grid, as Optuna knows them: an index per setting."""
        if any(setting.values is None for setting in self.settings):
            raise InputError(
                "sampler", expected="lists of values for a grid", received="a range", hint="use tpe or random"
            )
        choices = [range(len(setting.values or [])) for setting in self.settings]
        keys = [setting.key for setting in self.settings]
        return [dict(zip(keys, cell, strict=True)) for cell in itertools.product(*choices)]

    def run(self) -> None:
        """Run the trials that are missing, then write what came out.

        Raises:
            InputError: no trial ended well.
        """
        cells = self._cells() if self.options.sampler == "grid" else []
        queued = self._take_up()
        done = len(self._finished())
        left = self.options.trials - done
        if cells:
            known = [trial.params for trial in self._finished()] + queued
            fresh = [cell for cell in cells if cell not in known]
            left = min(left, len(queued) + len(fresh))
            for cell in fresh[: max(0, left - len(queued))]:
                self.study.enqueue_trial(cell)
        if done:
            self.console.print(f"{done} trials are there already")
        with ThreadPoolExecutor(self.options.parallel) as pool:
            futures = [pool.submit(self._trial) for _ in range(max(0, left))]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # what waits would go wrong as well, hours later
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if not self._finished():
            raise InputError(
                "base",
                expected="a configuration that runs",
                received=f"no trial that ended well; the last one's words are in {self.root}/trial_*.log",
                hint=f"try it alone: dgd predict --config {self.options.base}",
            )
        self._write()

    def _finished(self) -> list[Any]:
        return self.study.get_trials(states=(self.optuna.trial.TrialState.COMPLETE,))

    def _take_up(self) -> list[dict[str, Any]]:
        """Trials that a killed sweep left running are queued again, with the same settings and folders.

        Returns:
            The parameters of all trials that wait in the queue.
        """
        state = self.optuna.trial.TrialState
        for trial in self.study.get_trials(states=(state.RUNNING,)):
            self.study.tell(trial.number, state=state.FAIL)
            if trial.params:
                self.study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs.get("folder")})
        waiting = self.study.get_trials(states=(state.WAITING,))
        return [trial.system_attrs["fixed_params"] for trial in waiting]

    def _suggest(self, trial: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for setting in self.settings:
            if setting.values is not None:  # by index: values may be lists, which Optuna does not store
                chosen[setting.key] = setting.values[trial.suggest_categorical(setting.key, range(len(setting.values)))]
            elif setting.integer:
                chosen[setting.key] = trial.suggest_int(
                    setting.key, int(setting.low), int(setting.high), log=setting.log
                )
            else:
                chosen[setting.key] = trial.suggest_float(setting.key, setting.low, setting.high, log=setting.log)
        return chosen

    def _trial(self) -> None:
        if self.broken.is_set():
            return
        with self.lock:  # samplers are no friends of threads
            trial = self.study.ask()
        try:
            self._measure(trial)
        except BaseException:
            self.broken.set()
            with self.lock:
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
            raise

    def _measure(self, trial: Any) -> None:
        """Chooses a trial's settings, runs it and tells what came out."""
        with self.lock:
            chosen = self._suggest(trial)
            folder = trial.user_attrs.get("folder") or f"trial_{trial.number:03d}"
            trial.set_user_attr("folder", folder)
            trial.set_user_attr("settings", json.dumps(chosen))
        device = self.devices.get()
        try:
            code = self._predict(folder, chosen, device)
            value = self._value(folder) if code == 0 else float("nan")
        finally:
            self.devices.put(device)
        failed = value != value
        with self.lock:
            if failed:
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(trial, value)
            shown = f"failed ({self._last_words(folder)})" if failed else f"{self.options.objective} {value:+.4f}"
            print(f"{folder}: {shown}  {self._varied(chosen)}", flush=True)

    def _command(self, folder: str, chosen: dict[str, Any]) -> list[str]:
        """The arguments of `dgd` for a trial."""
        return [*trial_command(self.options.base, chosen), "--name", folder, "--logs_dir", str(self.root)]

    def _predict(self, folder: str, chosen: dict[str, Any], device: int | None) -> int:
        """Runs a trial's command; its output goes to a file beside its run folder."""
        command = [sys.executable, "-m", "dgd_lightning.cli", *self._command(folder, chosen)]
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        with (self.root / f"{folder}.log").open("w") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode

    def _varied(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Without the settings that are the same in all trials."""
        return {one.key: chosen[one.key] for one in self.settings if one.varies}

    def _last_words(self, folder: str) -> str:
        """The end of what a trial said, which is where errors stand."""
        log = self.root / f"{folder}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return lines[-1] if lines else "no output"

    def _value(self, folder: str) -> float:
        """The objective of a finished trial; NaN where nothing was verified."""
        from dgd_lightning.callbacks.adapt_metrics import collect, gain_of

        versions = (self.root / folder).glob("version_*")
        version = max(versions, key=lambda path: int(path.name[8:]))
        check_rows(version)
        counts, _ = collect(version)
        gain = gain_of(counts, self.options.against or self.options.arm, self.options.arm)
        return {"tau_gain": gain.ratio.value, "tau_gain_median": gain.median.value, "tau": gain.tau}[
            self.options.objective
        ]

    def _write(self) -> None:
        """`trials.csv`, the curves, `best.yaml` and a table on the console."""
        trials = sorted(self._finished(), key=lambda trial: trial.number)
        rows = [
            {
                "trial": t.user_attrs["folder"],
                self.options.objective: t.value,
                **json.loads(t.user_attrs["settings"]),
                "seconds": t.duration.total_seconds(),
            }
            for t in trials
        ]
        with (self.root / TRIALS).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        best = max(rows, key=lambda row: row[self.options.objective])
        config = yaml.safe_load(Path(self.options.base).read_text())
        for setting in self.settings:
            _put(config, setting.key, best[setting.key])
        config["name"] = f"{self.options.name}-best"
        head = f"# The best of {len(rows)} trials: {self.options.objective} {best[self.options.objective]:+.4f}\n"
        head += "# Chosen by the data named here: what is reported should be measured on others.\n"
        (self.root / BEST).write_text(head + yaml.safe_dump(config, sort_keys=False))
        varied = [setting for setting in self.settings if setting.varies]
        pictures = [
            curve(rows, one.key, self.options.objective, self.root, listed=one.values, log=one.log) for one in varied
        ]
        self.console.print(leaders(rows, self.options.objective, [one.key for one in varied]))
        print(f"trials:   {self.root / TRIALS}")
        print(f"curves:   {', '.join(map(str, pictures))}")
        print(f"best:     dgd predict --config {self.root / BEST}")


def check_rows(folder: Path) -> None:
    """Refuse to choose settings by a run on CL-bench's rows: its licence forbids calibrating too.

    Args:
        folder: of a finished trial.

    Raises:
        InputError: the rows are CL-bench's, and nobody permitted it.
    """
    from dgd_lightning.data.licence import holds_clbench, refusal
    from dgd_lightning.run_folder import read_predictions

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    model, data = (config[part].get("init_args") or {} for part in ("model", "data"))
    if not model.get("accept_clbench_license") and holds_clbench(
        read_predictions(folder), data.get("path") or "", data.get("clbench")
    ):
        raise refusal("base")


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key as the command line would: below a class path, settings stand in ``init_args``."""
    *path, last = key.split(".")
    place = config
    for part in path:
        place = place.setdefault(part, {})
        if "class_path" in place:
            place = place.setdefault("init_args", {})
    place[last] = value
