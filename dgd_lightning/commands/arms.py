"""Arms as configurations write them: one in the form of before version 0.2 is refused, and errors name their arm."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from dgd_lightning.errors import InputError
from dgd_lightning.old_rows import upgraded_arm

OPTION = re.compile(r"--model(\.init_args)?\.arms\+?(=(?P<value>.*))?", re.S)


def check_arms_form(argv: Sequence[str]) -> None:
    """Refuses arms, of config files and ``--model.arms``, that have the old form or a method that is no class.

    What can't be read is left to the parser.
    """
    for arm in _arms(argv):
        argument = f"model.arms[{arm.get('name')}].method"
        if not isinstance(arm.get("method", ""), str | dict):
            hint = "write Speculative, or {class_path: Guided, init_args: {beta: 0.3}}"
            raise InputError(argument, expected="a method's class", received=arm["method"], hint=hint)
        if (new := upgraded_arm(arm)) is None:
            continue
        beside = ", ".join(key for key in arm if key not in new)
        given = f"{arm.get('method', 'nothing')}{f' and {beside} beside it' if beside else ''}"
        shown = yaml.safe_dump(new, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        raise InputError(
            argument,
            expected="a method's class, with its settings in init_args",
            received=f"{given} (the form of before 0.2)",
            hint=f"write {shown}",
        )


def with_arm(error: InputError, argv: Sequence[str]) -> InputError:
    """The error under ``model.arms[NAME].FIELD``, where an arm holds what was refused; else as it is."""
    field = error.argument.removeprefix("model.arms.")
    for arm in _arms(argv):
        for path, value in _settings(arm):
            here = f".{path}".endswith(f".{field}") or field == f"{path}.class_path"
            refused = error.received in (str(value), repr(value)) and (field != error.argument or "method." in path)
            if here and (refused or (field != error.argument and "unknown key" in error.received)):
                return error.named(f"model.arms[{arm.get('name')}].{path}")
    missing = field.removeprefix("method.")
    for arm in _arms(argv) if error.received == "nothing" and missing != field else ():
        method = arm.get("method")
        name = method.get("class_path") if isinstance(method, dict) else method
        own = {path for path, _ in _settings(method)}
        if missing in _fields(str(name)) and missing not in own:
            return error.named(f"model.arms[{arm.get('name')}].{field}")
    return error


def _fields(method: str) -> list[str]:
    """Settings of a method's class, by its short name or class path."""
    from dgd_lightning.methods.base import Method  # with torch, which is imported by now

    kinds: list[Any] = [kind for kind in Method.__subclasses__() if kind.__name__ == method.rpartition(".")[2]]
    return [one.name for kind in kinds if is_dataclass(kind) for one in fields(kind)]


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All settings below a value with their dotted keys, those of a class path without ``init_args``."""
    yield path, value
    if isinstance(value, dict):
        for key, one in value.items():
            inner = "class_path" in value and key == "init_args"
            yield from _settings(one, path if inner else f"{path}.{key}".lstrip("."))


def _arms(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    for place, argument in enumerate(argv):
        before, following = argv[place - 1] if place else "", "".join(argv[place + 1 : place + 2])
        found = None
        if before in ("-c", "--config") or argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
            config = _read(path) if path.is_file() else None
            model = config.get("model") if isinstance(config, dict) else None
            found = (model.get("init_args") or model).get("arms") if isinstance(model, dict) else None
        elif match := OPTION.fullmatch(argument):
            found = _read(match["value"] if match["value"] is not None else following)
        yield from (arm for arm in (found if isinstance(found, list) else [found]) if isinstance(arm, dict))


def _read(source: Path | str) -> Any:
    try:
        return yaml.safe_load(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except (OSError, ValueError, yaml.YAMLError):
        return None
