"""`dgd sweep`: many runs of `dgd predict` that differ in a few settings, one process each, chosen by Optuna.

A sweep lives in `logs/<name>/`: Optuna's journal, a run folder per trial, `trials.csv`, a curve per setting and
`best.yaml`, a configuration that runs. The same command goes on where a killed sweep stopped: finished trials stay,
started ones are run again (and continue their own rows). A folder belongs to one question, and to one process at a
time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace

from dgd_lightning.checks import check_folder_name, check_integer
from dgd_lightning.commands.configs import config_path
from dgd_lightning.commands.errors import command_parser, parsed
from dgd_lightning.commands.trials import Setting, Sweep, alone
from dgd_lightning.errors import InputError

Objective = Literal["tau_gain", "tau_gain_median", "tau"]


def main(argv: Sequence[str]) -> int:
    """Run `dgd sweep --config FILE.yaml [--key value …]`."""
    options = parse_options(list(argv)[1:])
    settings = [read_setting(key, value) for key, value in options.search.items()]
    root = Path(options.logs_dir) / options.name
    with alone(root):
        Sweep(options, settings, root).run()
    return 0


def parse_options(argv: list[str]) -> Namespace:
    """The command's options, given without its name; checked as far as no trial is needed for it."""
    parser = command_parser("sweep", __doc__)
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
            raise InputError(key, expected="a value", received="nothing", hint="see `dgd configs sweeps/ttt`")
    check_folder_name("name", options.name)
    for key in ("trials", "parallel"):
        check_integer(key, options[key])
    if options.objective != "tau" and options.against is None:
        raise InputError("against", expected="an arm, for a gain", received="null", hint="name it, or use tau")
    options.base = config_path(options.base, "base")
    if not Path(options.base).is_file():
        raise InputError("base", expected="an existing file", received=options.base, hint="check the path")
    if "model.arms" not in options.search:
        check_arm_names(options)
    return options


def check_arm_names(options: Namespace) -> None:
    """Raises InputError where the base names no arms, or ``arm`` or ``against`` is none of them."""
    try:
        config = yaml.safe_load(Path(options.base).read_text(encoding="utf-8"))
        names = [arm["name"] for arm in config["model"]["init_args"]["arms"]]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            "base",
            expected="a YAML file of `dgd predict` with model.init_args.arms",
            received=f"{options.base} ({type(error).__name__}: {error})",
            hint="see `dgd configs ttt/predict_lab`",
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
    """A searched setting as the YAML gives it: values, or ``{low, high}`` with ``log`` and ``integer`` where wanted."""
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
