"""What a command line and its files give, and what all of it comes to; read without torch.

Words that are no option's are refused here, and files that are missing or no YAML.
"""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader

from dgd_lightning.commands.configs import packaged
from dgd_lightning.commands.errors import bad_file, no_value
from dgd_lightning.commands.reading import refuse_repeated_keys
from dgd_lightning.errors import InputError

OPTIONS = {  # ours, beside Lightning's; what `--help` says of them
    "name": "the run goes to LOGS_DIR/NAME/version_N; default: the config file's name",
    "logs_dir": "folder of all runs; default: logs",
    "check": "show what all of this comes to, and end: no weights are loaded, and nothing is written",
    "verbose": "print all tables, which else go to summary.txt in the run folder",
}
TOP = ("config", "model", "data", "trainer", "seed_everything", *OPTIONS)
FLAGS = ("--check", "--verbose")
CONFIG = ("-c", "--config")
_VALUE = re.compile(r"(?!-)|-$|-\.?\d|.* ")  # what argparse takes as an option's value


class Given(NamedTuple):
    """A config file, or an option as a file would have it."""

    values: dict[str, Any]
    option: str | None  # ``--data.limit``; None: a file
    empty: bool = False  # an option without a value

    @property
    def unread(self) -> bool:
        """Whether it is a pipe, which can be read once: by the parser."""
        return self.empty and self.option is None


def given(argv: Sequence[str]) -> list[Given]:
    """All that the arguments behind the subcommand give, in their order; what can be read once is left to the parser.

    Raises:
        InputError: a config file is missing, or no YAML that maps keys to values; a word is no option's.
    """
    found, words = [], list(argv[1:])
    while words:
        option, equals, text = words.pop(0).partition("=")
        if not option.startswith("--") and option not in CONFIG:
            raise _stray(option + equals + text, argv[0])
        follows = bool(words) and not equals and _VALUE.match(words[0]) is not None
        if option in FLAGS and (equals or follows):
            received = text if equals else words[0]
            raise InputError(option, expected="no value", received=received, hint=f"write {option} alone")
        value = words.pop(0) if follows else text if equals else None
        if option not in CONFIG:
            keys = option[2:].split(".")
            found.append(Given(_nested(keys, None if value is None else _yaml(value)), option, value is None))
        elif not value:
            raise no_value("--config")
        else:
            values = _config(value)
            found.append(Given(values or {}, None, values is None))
    return found


def _stray(word: str, subcommand: str) -> InputError:
    name = word.lstrip("-").partition("=")[0]
    hint = f"see `dgd {subcommand} --help`"
    if name.removesuffix(".yaml") in packaged() or os.path.isfile(word):
        hint = f"write --config {word}"
    elif name.partition(".")[0] in TOP:
        hint = f"write --{name}"
    return InputError("command line", expected="options, which begin with --", received=word, hint=hint)


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if keys[1:] else value}


def _yaml(text: str) -> Any:
    """What a text comes to where it is a list or a mapping; a plain one is what its argument makes of it."""
    with contextlib.suppress(yaml.YAMLError, ValueError):
        found = get_loader("yaml")(text)
        return text if isinstance(found, str | int | float) or not text.strip() else found
    return text


def _config(source: str) -> Any:
    """What a config file holds, or the YAML text in its place; None for a pipe, which can be read once."""
    if source == "-" or (os.path.exists(source) and not os.path.isfile(source)):
        return None
    try:
        text = Path(source).read_text(encoding="utf-8") if os.path.isfile(source) else source
        refuse_repeated_keys(text)
        found = get_loader("yaml")(text)
    except OSError as error:
        raise InputError("--config", expected="a readable file", received=error, hint="check the path") from error
    except (yaml.YAMLError, ValueError) as error:
        raise bad_file(f"Problem parsing config: {error}") or error from error
    if isinstance(found, str) and not os.path.isfile(source):
        raise InputError("--config", expected="a readable file", received=source, hint="check the path")
    if not isinstance(found, dict):
        received = f"{source}, an empty file" if found is None else f"{source}, a {type(found).__name__}"
        raise InputError("--config", expected="keys with their values", received=received, hint="see `dgd configs`")
    return found


def merged(found: Sequence[Given]) -> dict[str, Any]:
    """What the parser makes of all that is given, with a class's ``init_args`` beside its ``class_path``."""
    final: Any = {}
    for one in found:
        final = _over(final, _flat(one.values))
    return dict(final)


def _flat(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_flat, value))
    if not isinstance(value, dict):
        return value
    inner = value.get("init_args")
    beside = {key: one for key, one in value.items() if key != "init_args"}
    return {str(key): _flat(one) for key, one in (beside | (inner if isinstance(inner, dict) else {})).items()}


def _over(old: Any, new: Any) -> Any:
    """What comes to be where a value follows on another: see `dgd_lightning.commands.reading`."""
    if isinstance(new, str) and isinstance(old, dict) and "class_path" in old:
        new = {"class_path": new}
    if not isinstance(new, dict):
        return new
    if isinstance(old, list) and old:
        return [*old[:-1], _over(old[-1], new)]
    old = {"class_path": old} if isinstance(old, str) else old if isinstance(old, dict) else {}
    other = _last(new.get("class_path", "")) not in ("", _last(old.get("class_path", "")))
    final = {} if other else dict(old)
    for key, value in new.items():
        name, before = key.removesuffix("+"), final.get(key.removesuffix("+"))
        if key != name:
            value = [*(before if isinstance(before, list) else []), *(value if isinstance(value, list) else [value])]
        final[name] = value if key != name else _over(before, value)
    return final


def _last(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]


def class_of(part: str, found: Sequence[Given]) -> tuple[str | None, Sequence[Given]]:
    """The class of ``model`` or ``data``, and what is given for it: from where it is named, unless another was before.

    Settings that an earlier class had and this one lacks are dropped by the parser.
    """
    parts = [one.values.get(part) for one in found]
    names = [one.get("class_path") if isinstance(one, dict) else one for one in parts]
    named = [place for place, name in enumerate(names) if isinstance(name, str)]
    if not named:
        return None, ()
    kind = names[named[-1]]
    others = [place for place in named if names[place] != kind]
    return kind, found[next(place for place in named if not others or place > others[-1]) :]
