"""What a command line and its files give, and the mistakes in it that are certain before torch is imported.

Those are files that are missing or no YAML, keys that a class of ours or the Trainer does not take, and names without a
dot that no class has. Anything else, such as values and classes of one's own, is left to the parser of the whole.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dgd_lightning.commands import catalogue
from dgd_lightning.commands.configs import config_places
from dgd_lightning.commands.errors import bad_file, unknown_key
from dgd_lightning.errors import InputError
from dgd_lightning.target.folder import local_folder

OPTIONS = {  # ours, beside Lightning's; what `--help` says of them
    "name": "the run goes to LOGS_DIR/NAME/version_N; default: the config file's name",
    "logs_dir": "folder of all runs; default: logs",
    "check": "show what all of this comes to, and end: no weights are loaded, and nothing is written",
    "verbose": "print all tables, which else go to summary.txt in the run folder",
}
TOP = ("config", "model", "data", "trainer", "seed_everything", *OPTIONS)
DATA_FILES = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".gz")
HUB_DATA = "HubData"  # its path is an id, which may look like anything
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class Given(NamedTuple):
    """A config file, or an option as a file would have it."""

    values: dict[str, Any]
    option: str | None  # ``--data.limit``; None: a file


class Mistake(NamedTuple):
    """What seems wrong."""

    error: InputError
    name: bool  # of a class: wrong unless a module of one's own defines it


def given(argv: Sequence[str]) -> list[Given]:
    """All that the arguments behind the subcommand give, in their order; what can't be read is left out.

    Raises:
        InputError: a config file is missing, or no YAML.
    """
    found, configs = [], config_places(argv)
    for place, argument in enumerate(argv):
        if place in configs:
            found.append(Given(_config(configs[place]), None))
        elif argument.startswith("--"):
            option, _, text = argument.partition("=")
            following = argv[place + 1] if place + 1 < len(argv) and "=" not in argument else text
            value: Any = None if following.startswith("--") else _yaml(following)
            for key in reversed(option[2:].rstrip("+").split(".")):
                value = {key: value}
            found.append(Given(value, option))
    return [one for one in found if isinstance(one.values, dict)]


def _yaml(text: str) -> Any:
    with contextlib.suppress(yaml.YAMLError, ValueError):
        return yaml.safe_load(text)


def _config(source: str) -> Any:
    """What a config file holds, or the YAML text in its place; None for a pipe, which can be read once."""
    if source in ("", "-") or (os.path.exists(source) and not os.path.isfile(source)):
        return None
    try:
        found = yaml.safe_load(Path(source).read_text(encoding="utf-8") if os.path.isfile(source) else source)
    except OSError as error:
        raise InputError("--config", expected="a readable file", received=error, hint="check the path") from error
    except (yaml.YAMLError, ValueError) as error:
        raise bad_file(f"Problem parsing config: {error}") or error from error
    if isinstance(found, str) and not os.path.isfile(source):
        raise InputError("--config", expected="a readable file", received=source, hint="check the path")
    return found


def check_given(subcommand: str, found: Sequence[Given]) -> None:
    """Refuses what is certainly wrong; see the top of this file.

    Raises:
        InputError: with the nearest name, where there is one.
    """
    own_modules = any(map(_imports_own, found))
    for one in found:
        for mistake in _look(one, subcommand, found):
            if not (mistake.name and own_modules):  # whose classes go by short names too
                raise mistake.error
    _check_files(found)


def _imports_own(value: Any) -> bool:
    """Whether a class path in it makes the parser import somebody else's module."""
    if isinstance(value, Mapping | list | tuple):
        return any(map(_imports_own, value.values() if isinstance(value, Mapping) else value))
    if not isinstance(value, str) or not _DOTTED.fullmatch(value):
        return False
    root = value.partition(".")[0]
    with contextlib.suppress(ImportError, ValueError):
        return root not in ("dgd_lightning", "lightning", "torch") and find_spec(root) is not None
    return True


def _look(one: Given, subcommand: str, found: Sequence[Given]) -> Iterator[Mistake]:
    trainer, method = catalogue.trainer_parameters(), catalogue.trainer_parameters(subcommand)
    for key, value in one.values.items():
        if trainer is None or method is None or not isinstance(key, str) or "help" in str(one.option):
            continue
        if key not in (*TOP, *method, "print_config"):
            yield Mistake(_unknown(one, key, "", "this subcommand", (*TOP, *method)), False)
        elif key == "trainer" and isinstance(value, dict):
            for name, setting in value.items():
                if name not in trainer:
                    yield Mistake(_unknown(one, name, key, "Trainer", trainer), False)
                elif name == "callbacks":
                    yield from _value(setting, ["Callback"], "trainer.callbacks")
        elif key in ("model", "data"):
            kind, own = class_of(key, found)
            if isinstance(value, dict):
                if one not in own:  # also where no class is named
                    continue
                value = {**value, "class_path": kind}
            yield from _value(value, ["LightningModule" if key == "model" else "LightningDataModule"], key)


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


def setting(part: str, name: str, found: Sequence[Given]) -> Any:
    """The last value that an argument of ``model`` or ``data`` is given; None where it is given none."""
    parts = [one.values.get(part) for one in found]
    values = [{**one, **(one.get("init_args") or {})}.get(name) for one in parts if isinstance(one, dict)]
    return next((value for value in reversed(values) if value is not None), None)


def _unknown(one: Given, key: Any, path: str, owner: str, known: Sequence[str] | Mapping[str, Any]) -> InputError:
    error = unknown_key(f"{path}.{key}".lstrip("."), str(key), owner, list(known), short=True)
    if one.option is None:
        return error
    hint = error.hint.replace("'", f"'{path}." if path else "'", 1)
    return InputError(one.option, expected="a known argument", received=one.option, hint=hint)


def _own(class_path: Any) -> str | None:
    """The name of a class of the package."""
    root, _, name = str(class_path).rpartition(".")
    return name if catalogue.ours(name) and (not root or root.startswith("dgd_lightning")) else None


def _value(value: Any, kinds: Sequence[str], path: str, *, text: bool = False) -> Iterator[Mistake]:
    """Mistakes in a value of these classes, or of a list of them; ``text``: a plain text may stand there as well."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            name = one.get("name", number) if isinstance(one, dict) else number
            yield from _value(one, kinds, f"{path}[{name}]", text=text)
    elif isinstance(value, str):
        yield from _name(value, [] if text else kinds, path)
    elif isinstance(value, dict):
        owner = next((kind for kind in kinds if catalogue.ours(kind) and not catalogue.below(kind)), None)
        if "class_path" in value:
            yield from _name(value["class_path"], kinds, f"{path}.class_path")
            owner = _own(value["class_path"])
        inner = value.get("init_args")
        known = catalogue.parameters(owner) if owner is not None else None
        for key, one in {**value, **(inner if isinstance(inner, dict) else {})}.items():
            if known is None or not isinstance(key, str) or key in ("class_path", "init_args", "dict_kwargs"):
                continue
            if key not in known:
                yield Mistake(unknown_key(f"{path}.{key}", key, str(owner), list(known)), False)
                continue
            kind = known[key].kind
            plain = re.search(r"\b(str|Any|Literal)\b", kind) is not None
            yield from _value(one, catalogue.classes_in(kind), f"{path}.{key}", text=plain)


def _name(name: Any, kinds: Sequence[str], path: str) -> Iterator[Mistake]:
    """The mistake in a short name that no class of these kinds has."""
    known = {name for kind in kinds for name in (kind, *catalogue.below(kind))} - {"LightningModule", "Callback"}
    if not isinstance(name, str) or "." in name or not known or name in known or os.path.exists(name):
        return
    theirs = [kind for kind in kinds if not catalogue.ours(kind)]
    known.update(catalogue.lightning_callbacks() if "Callback" in theirs else ())
    if theirs and not catalogue.ours(name) and catalogue.in_lightning(name):
        return
    close = difflib.get_close_matches(name, sorted(known), n=1)
    fitting = ", ".join(sorted(one for one in known if catalogue.ours(one) and catalogue.concrete(one)))
    expected = "another kind of class" if catalogue.ours(name) else "a class that can be imported"
    hint = f"did you mean {close[0]!r}?" if close else f"use one of {fitting}, or a class path"
    yield Mistake(InputError(path, expected=expected, received=name, hint=hint), True)


def _check_files(found: Sequence[Given]) -> None:
    """Refuses files that are not there: of the data, of a target or a draft, of a checkpoint."""
    kind, path = _own(class_of("data", found)[0]), setting("data", "path", found)
    taken = (catalogue.parameters(kind) or {}) if kind not in (None, HUB_DATA) else {}
    missing = "path" in taken and isinstance(path, str) and not os.path.exists(path)
    if missing and (Path(path).suffix.lower() in DATA_FILES or "split" not in taken):  # else perhaps an id of the Hub
        raise InputError("data.path", expected="an existing file", received=path, hint="check the path")
    for part in ("target", "draft"):
        if _own(class_of("model", found)[0]) and isinstance(source := setting("model", part, found), str):
            local_folder(part, source)
    check_checkpoint(next((one.values["ckpt_path"] for one in reversed(found) if "ckpt_path" in one.values), None))


def check_checkpoint(path: Any) -> None:
    """Refuses a ``--ckpt_path`` that is not there; ``best`` and ``last`` never are in this run's new folder."""
    if path is not None and str(path) != "hpc" and "://" not in str(path) and not Path(path).exists():
        raise InputError(
            "ckpt_path",
            expected="an existing checkpoint",
            received=path,
            hint="give the path of one, such as logs/NAME/version_N/checkpoints/last.ckpt",
        )
