"""`dgd fit|validate|test|predict`: checks that need no model, then Lightning; its complaints as one-line errors.

Arms in the form of before version 0.2 are refused, and what is wrong with one names it.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

from jsonargparse import ArgumentError

from dgd_lightning.commands.bootstrap import bootstrap
from dgd_lightning.commands.errors import as_written, from_parser_message, in_one_line, mistake_behind
from dgd_lightning.commands.given import Given, given
from dgd_lightning.commands.help import text as help_text
from dgd_lightning.commands.main import ended_by_sigterm
from dgd_lightning.commands.mistakes import check_given
from dgd_lightning.errors import InputError
from dgd_lightning.old_rows import upgraded_arm

STARTS = re.compile(r"-c$|--(config|model|print_config)\b|--.*help(=|$)|-h$")  # one of these is needed, to run anything
EXAMPLES = {"predict": "quickstart", "fit": "ttt/lab", "test": "diagnostic/lab"}


def main(argv: Sequence[str]) -> int:
    """Run a LightningCLI subcommand. Importing Lightning takes seconds, so it happens here, not at the top."""
    if (shown := help_text(argv)) is not None:
        print(shown)
        return 0
    if not any(map(STARTS.match, argv[1:])):
        hint = f"use e.g. `dgd {argv[0]} --config {EXAMPLES.get(argv[0], 'FILE.yaml')}`; `dgd configs` lists more"
        raise InputError("--config", expected="a configuration", received="none", hint=hint)
    found = given(argv)
    check_arms_form(found)
    check_given(argv[0], found)
    with bootstrap():
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from dgd_lightning.commands.lightning import ProjectCLI, import_plugins

        import_plugins()
    try:
        with ended_by_sigterm(argv[0]) if argv[0] in ("predict", "test") else nullcontext():
            ProjectCLI(args=list(argv))
    except ArgumentError as error:
        raise with_arm(from_parser_message(str(error)), found) from error
    except MisconfigurationException as error:
        device = "gpu" in str(error).lower() or "accelerator" in str(error).lower()
        raise InputError(
            "trainer.accelerator" if device else "configuration",
            expected="a device that this machine has" if device else "a combination that Lightning accepts",
            received=f"a configuration of which it says: {error}",
            hint="add --trainer.accelerator cpu, or auto" if device else "change the named argument",
        ) from error
    except Exception as error:
        if (mistake := mistake_behind(error)) is None:
            raise
        raise with_arm(as_written(mistake), found) from error
    return 0


def check_arms_form(found: Sequence[Given]) -> None:
    """Refuses arms, of config files and ``--model.arms``, that have the old form or a method that is no class.

    What can't be read is left to the parser.
    """
    for arm in _arms(found):
        if not isinstance(arm, dict) or not arm.keys() & {"name", "method"}:
            hint = "write {name: plain, method: Speculative}"
            raise InputError("model.arms", expected="a name and a method per arm", received=repr(arm), hint=hint)
        argument = f"model.arms[{arm.get('name')}].method"
        method = arm.get("method", "")
        if not isinstance(method, str | dict):
            hint = "write Speculative, or {class_path: Guided, init_args: {beta: 0.3}}"
            raise InputError(argument, expected="a method's class", received=method, hint=hint)
        if (new := upgraded_arm(arm)) is None:
            continue
        beside = ", ".join(key for key in arm if key not in new)
        old = f"{arm.get('method', 'nothing')}{f' and {beside} beside it' if beside else ''}"
        raise InputError(
            argument,
            expected="a method's class, with its settings in init_args",
            received=f"{old} (the form of before 0.2)",
            hint=f"write {in_one_line(new)}",
        )


def with_arm(error: InputError, found: Sequence[Given]) -> InputError:
    """The error under ``model.arms[NAME].FIELD``, where an arm holds what was refused; else as it is."""
    field = error.argument.removeprefix("model.arms.")
    for arm in _arms(found):
        for path, value in _settings(arm):
            here = f".{path}".endswith(f".{field}") or field == f"{path}.class_path"
            kind = value.get("class_path", "") if isinstance(value, dict) else value
            same = error.received in (str(value), repr(value)) or error.received.startswith(f"{value} (")
            same |= error.received.startswith(f"{str(kind).rpartition('.')[2]}(")  # an object that was made of it
            refused = same and (field != error.argument or "method." in path)
            if here and (refused or (field != error.argument and "unknown key" in error.received)):
                return error.named(f"model.arms[{arm.get('name')}].{path}")
    parent, _, leaf = field.rpartition(".")
    for arm in _arms(found) if error.received == "nothing" else ():
        given = dict(_settings(arm))
        kind = given.get(f"{parent}.class_path", given.get(parent))
        if leaf in _fields(str(kind)) and field not in given:
            return error.named(f"model.arms[{arm.get('name')}].{field}")
    return error


def _fields(kind: str) -> list[str]:
    """Settings of a method or a readout, by its short name or class path."""
    from dgd_lightning.decode.readouts.base import Readout  # with torch, which is imported by now
    from dgd_lightning.methods.base import Method

    kinds: list[Any] = [*Method.__subclasses__(), *Readout.__subclasses__()]
    named = [one for one in kinds if one.__name__ == kind.rpartition(".")[2] and is_dataclass(one)]
    return [one.name for found in named for one in fields(found)]


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All settings below a value with their dotted keys, those of a class path without ``init_args``."""
    yield path, value
    if isinstance(value, dict):
        for key, one in value.items():
            inner = "class_path" in value and key == "init_args"
            yield from _settings(one, path if inner else f"{path}.{key}".lstrip("."))


def _arms(found: Sequence[Given]) -> Iterator[Any]:
    """The arms that the command line and its files name: mappings, unless somebody wrote something else."""
    for one in found:
        model = one.values.get("model")
        if isinstance(model, dict) and str(model.get("class_path", "Decoding")).rpartition(".")[2] == "Decoding":
            inner = model.get("init_args")
            holder = inner if isinstance(inner, dict) else model
            for arms in (holder.get("arms"), holder.get("arms+")):
                yield from arms if isinstance(arms, list) else [] if arms is None else [arms]
