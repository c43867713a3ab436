"""`dgd sweep`: many runs of `dgd predict` that differ in a few settings, one process each, chosen by Optuna.

A sweep lives in `logs/<name>/`: Optuna's journal, a run folder per trial, `trials.csv`, a curve per setting and
`best.yaml`, a configuration that runs. The same command goes on where a killed sweep stopped: finished trials stay,
started ones are run again (and continue their own rows).
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from dgd_lightning.errors import InputError

JOURNAL, TRIALS, BEST = "journal.log", "trials.csv", "best.yaml"
Objective = Literal["tau_gain", "tau_gain_median", "tau"]


class Setting(NamedTuple):
    """One searched setting: a list of values, or a range."""

    key: str  # ``model.ttt.lr``
    values: list[Any] | None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False


def main(argv: Sequence[str]) -> int:
    """Run `dgd sweep --config FILE.yaml [--key value …]`.

    Args:
        argv: with the subcommand's name first.

    Raises:
        InputError: a setting that can't work, or no trial that ended well.
    """
    options = parse_options(list(argv)[1:])
    settings = [read_setting(key, value) for key, value in options.search.items()]
    root = Path(options.logs_dir) / options.name
    Sweep(options, settings, root).run()
    return 0


def parse_options(argv: list[str]) -> Namespace:
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
    from jsonargparse import ArgumentError

    from dgd_lightning.cli_errors import from_parser_message

    try:
        options = parser.parse_args(argv)
    except ArgumentError as error:
        raise from_parser_message(str(error)) from error
    for key in ("base", "arm", "search"):
        if not options[key]:
            raise InputError(key, expected="a value", received="nothing", mend="see configs/sweeps/ttt.yaml")
    for key in ("trials", "parallel"):
        if options[key] < 1:
            raise InputError(key, expected="at least 1", received=options[key], mend="use 1 or more")
    if options.objective != "tau" and options.against is None:
        raise InputError("against", expected="an arm, for a gain", received="null", mend="name it, or use tau")
    if not Path(options.base).is_file():
        raise InputError("base", expected="an existing file", received=options.base, mend="check the path")
    return options


def read_setting(key: str, value: Any) -> Setting:
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
        mend="for example [4, 8, 16] or {low: 1.0e-4, high: 1.0e-2, log: true}",
    )


class Sweep:
    """A study and how it is run.

    Args:
        options: the command's.
        settings: what is searched.
        root: the sweep's folder.
    """

    def __init__(self, options: Namespace, settings: list[Setting], root: Path) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise InputError(
                "sweep", expected="optuna", received="no such package", mend='pip install -e ".[sweep]"'
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.options, self.settings, self.root, self.optuna = options, settings, root, optuna
        root.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(root / JOURNAL)))
        self.study = optuna.create_study(
            study_name=options.name,
            storage=storage,
            sampler=self._sampler(),
            direction="maximize",
            load_if_exists=True,
        )
        self.lock, self.console = threading.Lock(), Console()
        self.devices: Queue[int | None] = Queue()
        for number in range(options.parallel):
            self.devices.put(options.devices[number % len(options.devices)] if options.devices else None)

    def _sampler(self) -> Any:
        samplers, seed = self.optuna.samplers, self.options.seed
        return samplers.TPESampler(seed=seed) if self.options.sampler == "tpe" else samplers.RandomSampler(seed)

    def _cells(self) -> list[dict[str, int]]:
        """All cells of the grid, as Optuna knows them: an index per setting."""
        if any(setting.values is None for setting in self.settings):
            raise InputError(
                "sampler", expected="lists of values for a grid", received="a range", mend="use tpe or random"
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
            for future in [pool.submit(self._trial) for _ in range(max(0, left))]:
                future.result()
        if not self._finished():
            raise InputError(
                "base",
                expected="a configuration that runs",
                received=f"no trial that ended well; the last one's words are in {self.root}/trial_*.log",
                mend=f"try it alone: dgd predict --config {self.options.base}",
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
        with self.lock:  # samplers are no friends of threads
            trial = self.study.ask()
            chosen = self._suggest(trial)
            folder = trial.user_attrs.get("folder") or f"trial_{trial.number:03d}"
            trial.set_user_attr("folder", folder)
            trial.set_user_attr("settings", json.dumps(chosen))
        device = self.devices.get()
        try:
            code = self._predict(folder, chosen, device)
            value = self._value(folder) if code == 0 else None
        finally:
            self.devices.put(device)
        with self.lock:
            state = self.optuna.trial.TrialState
            if value is None or value != value:
                self.study.tell(trial, state=state.FAIL)
            else:
                self.study.tell(trial, value)
            shown = "failed" if value is None else f"{self.options.objective} {value:+.4f}"
            self.console.print(f"{folder}: {shown}  {chosen}")

    def _predict(self, folder: str, chosen: dict[str, Any], device: int | None) -> int:
        """Runs a trial's command; its output goes to a file beside its run folder."""
        command = [sys.executable, "-m", "dgd_lightning.cli", "predict", "--config", self.options.base]
        for key, value in chosen.items():
            command += [f"--{key}", json.dumps(value)]
        command += ["--name", folder, "--logs_dir", str(self.root)]
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        with (self.root / f"{folder}.log").open("w") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode

    def _value(self, folder: str) -> float:
        from callbacks.adapt_metrics import collect, gain_of

        versions = (self.root / folder).glob("version_*")
        counts, _ = collect(max(versions, key=lambda path: int(path.name[8:])))
        arm, against = self.options.arm, self.options.against or self.options.arm
        for name in (arm, against):
            if name not in counts:
                raise InputError(
                    "arm, against", expected=f"arms of the base: {', '.join(counts)}", received=name, mend="use these"
                )
        gain = gain_of(counts, against, arm)
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
        (self.root / BEST).write_text(head + yaml.safe_dump(config, sort_keys=False))
        pictures = [curve(rows, setting, self.options.objective, self.root) for setting in self.settings]
        table = Table(title=f"Sweep: the best of {len(rows)} trials", title_justify="left")
        for column in rows[0]:
            table.add_column(column)
        for row in sorted(rows, key=lambda one: -one[self.options.objective])[:10]:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        self.console.print(table)
        print(f"trials:   {self.root / TRIALS}")
        print(f"curves:   {', '.join(map(str, pictures))}")
        print(f"best:     dgd predict --config {self.root / BEST}")


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key as the command line would: below a class path, settings stand in ``init_args``."""
    *path, last = key.split(".")
    place = config
    for part in path:
        place = place.setdefault(part, {})
        if "class_path" in place:
            place = place.setdefault("init_args", {})
    place[last] = value


def curve(rows: list[dict[str, Any]], setting: Setting, objective: str, folder: Path) -> Path:
    """Draw the objective over one setting, all trials as dots and the best at each value as a line.

    Args:
        rows: of the finished trials.
        setting: along the x axis.
        objective: the column along the y axis.
        folder: where the picture goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [row[setting.key] for row in rows]
    scores = [row[objective] for row in rows]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    labels = [str(value) for value in (setting.values or [])]
    places = values if numeric else [labels.index(str(value)) for value in values]
    axes.scatter(places, scores, color="tab:gray", s=18, label="trials")
    tops = {place: max(s for p, s in zip(places, scores, strict=True) if p == place) for place in places}
    axes.plot(sorted(tops), [tops[place] for place in sorted(tops)], color="tab:blue", label="best")
    if numeric and (setting.log or (min(values) > 0 and max(values) >= 20 * min(values))):
        axes.set_xscale("log")
    if not numeric:
        axes.set_xticks(range(len(labels)), labels, rotation=20)
    axes.set(xlabel=setting.key, ylabel=objective)
    axes.legend()
    path = folder / f"curve_{setting.key.rpartition('.')[2]}.png"
    figure.savefig(path, dpi=120)
    return path
