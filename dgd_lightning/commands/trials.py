"""A sweep's trials: chosen by Optuna, run as processes of `dgd predict`, and taken up again after a kill."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace
from rich.console import Console

from dgd_lightning.errors import InputError
from dgd_lightning.report.sweep import BEST, TRIALS, leaders, write_sweep
from dgd_lightning.run_folder import newest_version, read_predictions
from dgd_lightning.seeds import mixed_seed

JOURNAL, LOCK = "journal.log", "sweep.lock"
QUESTION = "question"  # the study's attribute that says what it is about


class Setting(NamedTuple):
    """One searched setting: a list of values, or a range."""

    key: str  # ``model.ttt.lr``
    values: list[Any] | None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False


def trial_command(base: str, chosen: dict[str, Any]) -> list[str]:
    """The arguments of `dgd` that run a base configuration with other settings, by dotted key."""
    command = ["predict", "--config", base]
    for key, value in chosen.items():
        # strings bare: a quoted one would be another value than the one that is meant
        command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return command


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds the sweep's folder for this process; the lock goes with the process, however it ends."""
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
    """A study and how it is run; two of one folder must not run at once (`alone`)."""

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
        self.varied = [one for one in settings if one.values is None or len(one.values) > 1]  # not alike in all trials
        root.mkdir(parents=True, exist_ok=True)
        journal = optuna.storages.JournalStorage(JournalFileBackend(str(root / JOURNAL)))
        study = optuna.create_study(study_name=options.name, storage=journal, direction="maximize", load_if_exists=True)
        asked, trials = question(options), len(study.get_trials(deepcopy=False))
        if trials and study.user_attrs.get(QUESTION) != asked:
            raise InputError(
                "name",
                expected="a new folder, or one of the same base file, search, arm, against, objective and sampler",
                received=f"{self.root}, whose trials have others",
                hint="use another --name, or delete the folder",
            )
        study.set_user_attr(QUESTION, asked)
        # A generator of its own for every start: one that began anew would draw the first trials a second time.
        seed, samplers = mixed_seed(options.seed, trials) % 2**32, optuna.samplers
        study.sampler = samplers.TPESampler(seed=seed) if options.sampler == "tpe" else samplers.RandomSampler(seed)
        self.study = study
        self.lock, self.console = threading.Lock(), Console()
        self.broken = threading.Event()  # set by the first trial that raises: no other begins
        self.devices: Queue[int | None] = Queue()
        for number in range(options.parallel):
            self.devices.put(options.devices[number % len(options.devices)] if options.devices else None)

    def _cells(self) -> list[dict[str, int]]:
        """All cells of the grid, as Optuna knows them: an index per setting."""
        if any(setting.values is None for setting in self.settings):
            wanted = "lists of values for a grid"
            raise InputError("sampler", expected=wanted, received="a range", hint="use tpe or random")
        choices = [[(setting.key, at) for at in range(len(setting.values or []))] for setting in self.settings]
        return [dict(cell) for cell in itertools.product(*choices)]

    def run(self) -> None:
        """Run the trials that are missing, then write what came out."""
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
        """Queues again what a killed sweep left running, in the same folders; gives the parameters of all that wait."""
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
                low, high = int(setting.low), int(setting.high)
                chosen[setting.key] = trial.suggest_int(setting.key, low, high, log=setting.log)
            else:
                chosen[setting.key] = trial.suggest_float(setting.key, setting.low, setting.high, log=setting.log)
        return chosen

    def _trial(self) -> None:
        if self.broken.is_set():
            return
        with self.lock:  # samplers are not thread-safe
            trial = self.study.ask()
        try:
            self._measure(trial)
        except BaseException:
            self.broken.set()
            with self.lock:
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
            raise

    def _measure(self, trial: Any) -> None:
        """Chooses a trial's settings, runs it and tells Optuna what came out."""
        with self.lock:
            chosen = self._suggest(trial)
            folder = trial.user_attrs.get("folder") or f"trial_{trial.number:03d}"
            trial.set_user_attr("folder", folder)
            trial.set_user_attr("settings", json.dumps(chosen))
        device = self.devices.get()
        try:
            code = self._predict(folder, chosen, device)
            value = self._value(folder) if code == 0 else math.nan
        finally:
            self.devices.put(device)
        with self.lock:
            if math.isnan(value):
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
                shown = f"failed ({self._last_words(folder)})"
            else:
                self.study.tell(trial, value)
                shown = f"{self.options.objective} {value:+.4f}"
            varied = {one.key: chosen[one.key] for one in self.varied}
            print(f"{folder}: {shown}  {varied}", flush=True)

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

    def _last_words(self, folder: str) -> str:
        """The end of a trial's log, where an error is."""
        log = self.root / f"{folder}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return lines[-1] if lines else "no output"

    def _value(self, folder: str) -> float:
        """The objective of a finished trial; NaN where nothing was verified."""
        from dgd_lightning.analysis.adaptation import collect, gain_of

        version = newest_version(self.root / folder)
        assert version is not None  # the command has ended well
        check_rows(version)
        counts, _ = collect(read_predictions(version))
        gain = gain_of(counts, self.options.against or self.options.arm, self.options.arm).tau
        values = {"tau_gain": gain.ratio.value, "tau_gain_median": gain.median.value, "tau": gain.tau}
        return values[self.options.objective]

    def _write(self) -> None:
        """Writes what came out, and prints the best trials."""
        objective = self.options.objective
        rows = [
            {
                "trial": trial.user_attrs["folder"],
                objective: trial.value,
                **json.loads(trial.user_attrs["settings"]),
                "seconds": trial.duration.total_seconds(),
            }
            for trial in sorted(self._finished(), key=lambda trial: trial.number)
        ]
        varied = {one.key: (one.values, one.log) for one in self.varied}
        pictures = write_sweep(self.root, rows, objective, varied, Path(self.options.base))
        self.console.print(leaders(rows, objective, list(varied)))
        print(f"trials:   {self.root / TRIALS}")
        print(f"curves:   {', '.join(map(str, pictures))}")
        print(f"best:     dgd predict --config {self.root / BEST}")


def check_rows(folder: Path) -> None:
    """Refuses to choose settings by a trial on CL-bench's rows: its licence forbids calibrating too."""
    from dgd_lightning.data.licence import holds_clbench, refusal

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    model, data = (config[part].get("init_args") or {} for part in ("model", "data"))
    if model.get("accept_clbench_license"):
        return
    if holds_clbench(read_predictions(folder), data.get("path") or "", data.get("clbench")):
        raise refusal("base")
