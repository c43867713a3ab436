"""The mistakes in what is given that are certain before torch is imported.

Those are keys that a class of ours or the Trainer does not take, names of classes that are nowhere, values of another
type, values that a class of ours refuses by itself, and files that are not there. Anything else, such as arguments of
classes of one's own, is left to the parser of the whole.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentError

from dgd_lightning.checks import check_folder_name
from dgd_lightning.commands import catalogue
from dgd_lightning.commands.errors import from_parser_message, in_one_line, no_value, unknown_key
from dgd_lightning.commands.given import Given, class_of, merged
from dgd_lightning.errors import InputError
from dgd_lightning.row_files import ENDS, end_of
from dgd_lightning.target.folder import local_folder

TOP = {  # types of the keys of a configuration
    "config": "Any",
    "model": "LightningModule | None",
    "data": "LightningDataModule | None",
    "trainer": "dict",
    "seed_everything": "bool | int | None",
    "name": "str | None",
    "logs_dir": "str",
    "check": "bool",
    "verbose": "bool",
}
HUB_DATA = "HubData"  # its path is an id, which may look like anything
_SCALAR = re.compile(r"true|false|yes|no|on|off|[-+.\d].*", re.I)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class Mistake(NamedTuple):
    """What seems wrong."""

    error: InputError
    name: bool  # of a class: wrong unless a module of one's own defines it


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
        if one.option is not None and one.empty and not re.search(r"--(check|verbose|print_\w+)$|help", one.option):
            raise no_value(one.option)
    final = merged(found)
    trainer = final["trainer"] if isinstance(final.get("trainer"), dict) else {}
    if str(devices := trainer.get("devices")) in ("0", "[]"):
        expected, hint = "how many, at least 1, a list of their numbers, or auto", "use 1"
        raise InputError("trainer.devices", expected=expected, received=devices, hint=hint)
    if isinstance(name := final.get("name"), str) and trainer.get("logger") is None:  # else it names no folder
        check_folder_name("name", name)
    if not any("print_config" in one.values or "help" in str(one.option) or one.unread for one in found):
        for part in ("model", "data"):
            value = final.get(part, {} if part == "model" else None)
            if isinstance(value, dict) and "class_path" not in value:
                raise InputError(part, expected="a class", received="nothing", hint=f"set {part}.class_path")
            _check_whole(value, TOP[part], part)
        model = final["model"]
        check_subcommand(subcommand, _kinds(model["class_path"] if isinstance(model, dict) else model))
    _check_files(final)


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
    if trainer is None or method is None or "help" in str(one.option):
        return
    top = TOP | {name: parameter.kind for name, parameter in method.items()}
    for key, value in one.values.items():
        if key not in top and key != "print_config":
            yield Mistake(_unknown(one, key, "", "this subcommand", top), False)
        elif key == "trainer" and isinstance(value, dict):
            for name, setting in value.items():
                plain = str(name).removesuffix("+")
                if plain in trainer:
                    yield from _value(setting, trainer[plain].kind, f"trainer.{plain}", append=name != plain)
                else:
                    yield Mistake(_unknown(one, name, key, "Trainer", trainer), False)
        elif key in ("model", "data") and isinstance(value, dict):
            kind, own = class_of(key, found)
            if kind is None and key == "model":
                kind, own = {"predict": "Decoding", "test": "Diagnostic"}.get(subcommand), found
            if one in own:  # else of a class that another comes after, or none is named
                yield from _arguments(value, catalogue.classes_in(top[key]), key, kind)
        elif not (key == "trainer" and isinstance(value, str)):  # a file of its own
            yield from _value(value, top.get(key, "Any"), key)


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


def _value(value: Any, kind: str, path: str, *, append: bool = False) -> Iterator[Mistake]:
    """Mistakes in a value of an annotation, or of one more entry of a list that it is."""
    classes = catalogue.classes_in(kind)
    several, plain = (re.search(rf"\b({names})\b", kind) for names in ("list|Iterable|Sequence", "str|Any|Literal"))
    if value is None:
        return
    if classes and several and isinstance(value, list):
        for number, one in enumerate(value):
            name = one.get("name", number) if isinstance(one, dict) else number
            yield from _value(one, kind.replace(several[0], "", 1), f"{path}[{name}]")
    elif classes and isinstance(value, str) and not plain and not _SCALAR.fullmatch(value):
        yield from wrong_name(value, classes, path)
    elif classes and isinstance(value, dict):
        yield from _arguments(value, classes, path)
    elif classes and not plain and not re.search(r"\b(bool|int|float)\b", kind):
        kinds, hint = " or ".join(dict.fromkeys(classes)), f"see `--{_option(path)}.help`"
        yield Mistake(InputError(path, expected=f"a {kinds}", received=value, hint=hint), False)
    elif not classes or not isinstance(value, str):
        try:
            _adapted(value, kind, path, append=append)
        except InputError as error:
            yield Mistake(error, False)


def _adapted(value: Any, kind: str, path: str, *, append: bool = False) -> Any:
    """A plain value as its argument takes it; null, and a text that looks like more than one, as they are."""
    if value is None or (isinstance(value, list | dict) and re.search(r"\bstr\b", kind)):
        return value
    try:
        return catalogue.adapted(value, kind, append=append)
    except ArgumentError as error:
        raise from_parser_message(str(error)).named(path) from error


def _arguments(value: dict[Any, Any], classes: Sequence[str], path: str, named: str | None = None) -> Iterator[Mistake]:
    """Mistakes in a class with its arguments, or in the settings of the only class that goes there.

    ``named``: the class, where it is not named in the value.
    """
    name, inner = value.get("class_path", named), value.get("init_args") or {}
    beside = {key: one for key, one in value.items() if key not in ("class_path", "init_args", "dict_kwargs")}
    if name is not None:
        yield from wrong_name(name, classes, f"{path}.class_path" if "class_path" in value else path)
    if beside and "class_path" in value:
        whole = {"class_path": value["class_path"], "init_args": beside | (inner if isinstance(inner, dict) else {})}
        expected, hint = "a class, with its arguments in init_args", f"write {in_one_line(whole)}"
        received = f"{', '.join(map(str, beside))} beside class_path"
        yield Mistake(InputError(path, expected=expected, received=received, hint=hint), False)
    elif not isinstance(inner, dict):
        expected, hint = "keys with their values", "write init_args: {key: value}"
        yield Mistake(InputError(f"{path}.init_args", expected=expected, received=inner, hint=hint), False)
    else:
        owner = _owner(value if named is None else {"class_path": named}, classes)
        known = catalogue.parameters(owner) if owner is not None else None
        for key, one in (beside | inner).items():
            if known is None:
                return
            plain = str(key).removesuffix("+")
            if plain in known:
                yield from _value(one, known[plain].kind, f"{path}.{plain}", append=plain != key)
            else:
                yield Mistake(unknown_key(f"{path}.{plain}", plain, str(owner), list(known)), False)


def _owner(value: Mapping[str, Any], classes: Sequence[str]) -> str | None:
    """The package's class whose arguments these are."""
    if "class_path" in value:
        return _own(value["class_path"])
    return next((kind for kind in classes if catalogue.ours(kind) and not catalogue.below(kind)), None)


def _option(path: str) -> str:
    return re.sub(r"\[.*?\]|\.class_path$", "", path)


def wrong_name(name: Any, classes: Sequence[str], path: str) -> Iterator[Mistake]:
    """The mistake in a name that no class of these kinds has, or in a class path that leads nowhere."""
    expected, hint = (
        "a class that can be imported",
        "check class_path, and that the folder of its file is on PYTHONPATH",
    )
    if not isinstance(name, str):
        yield Mistake(InputError(path, expected=expected, received=name, hint="write its name"), False)
        return
    if os.path.exists(name) or name.endswith((".yaml", ".yml", ".json")):  # a file of its own
        return
    if "." in name:
        if (missing := _missing(name)) is not None:
            hint = "check class_path, and that the folder of its file is on PYTHONPATH"
            yield Mistake(InputError(path, expected=expected, received=f"{name} ({missing})", hint=hint), False)
        return
    names = {one for kind in classes for one in (*catalogue.below(kind), *catalogue.in_lightning_by(kind))}
    own = [kind for kind in classes if catalogue.ours(kind)]
    if name in own:
        return
    if not names and own:  # settings, of which there is one kind
        expected, hint = f"settings of {own[0]}, in a mapping", f"see `--{_option(path)}.help`"
        yield Mistake(InputError(path, expected=expected, received=name, hint=hint), False)
    elif name not in names and (own or catalogue.ours(name) or not catalogue.in_lightning(name)):
        close = difflib.get_close_matches(name, sorted(names), n=1)
        fitting = ", ".join(sorted(one for one in names if catalogue.ours(one) and catalogue.concrete(one)))
        expected = "another kind of class" if catalogue.ours(name) and not close else expected
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {fitting or ', '.join(names)}, or a class path"
        yield Mistake(InputError(path, expected=expected, received=name, hint=hint), True)


def _missing(class_path: str) -> str | None:
    """What of a class path is not there; None where only an import can tell. Lightning and torch are not imported."""
    root, *rest = class_path.split(".")
    if root in ("dgd_lightning", "lightning", "torch"):
        own = root == "dgd_lightning" and not catalogue.ours(rest[-1])
        theirs = class_path.startswith("lightning.pytorch.") and not catalogue.in_lightning(rest[-1])
        return f"{root} has no class {rest[-1]!r}" if own or theirs else None
    with contextlib.suppress(Exception):  # of a module of the user's own
        spec = find_spec(root)
        if spec is None:
            return f"No module named {root!r}"
        text = Path(str(spec.origin)).read_text(encoding="utf-8")
        inside = [Path(place, rest[0]) for place in spec.submodule_search_locations or ()]
        there = any(next(path.parent.glob(f"{path.name}*"), None) for path in inside)
        dynamic = re.search(
            rf"\b({re.escape(rest[0])}|__getattr__|sys\.modules)\b|(globals|setattr|exec)\(|import \*", text
        )
        return None if there or dynamic else f"module {root!r} has no attribute {rest[0]!r}"
    return None


def _check_whole(value: Any, kind: str, path: str) -> None:
    """Refuses a class, and those in it, that lacks an argument or refuses one; nothing more is given than this."""
    classes = catalogue.classes_in(kind)
    if isinstance(value, list):
        for number, one in enumerate(value if classes else ()):
            _check_whole(one, kind, f"{path}[{one.get('name', number) if isinstance(one, dict) else number}]")
        return
    value = {"class_path": value} if isinstance(value, str) and classes else value
    owner = _owner(value, classes) if isinstance(value, dict) else None
    known = catalogue.parameters(owner) if owner is not None else None
    if owner is None or known is None:
        return
    for name, parameter in known.items():
        if parameter.default is None and name not in value and "dict_kwargs" not in value:
            hint = "set it in the YAML or on the command line"
            raise InputError(f"{path}.{name}", expected="a value", received="nothing", hint=hint)
    plain = {name: one for name, one in value.items() if name in known and not catalogue.classes_in(known[name].kind)}
    typed = {name: _adapted(one, known[name].kind, f"{path}.{name}") for name, one in plain.items()}
    if (error := catalogue.refusal(owner, typed)) is not None:
        raise error.named(f"{path}.{error.argument.rpartition('.')[2]}")
    for name in value.keys() & known.keys() - plain.keys():
        _check_whole(value[name], known[name].kind, f"{path}.{name}")


def _check_files(final: Mapping[str, Any]) -> None:
    """Refuses files that are not there: of the data, of a target or a draft, of a checkpoint."""
    data, model = (final[part] if isinstance(final.get(part), dict) else {} for part in ("data", "model"))
    kind, path = _own(data.get("class_path")), data.get("path")
    taken = (catalogue.parameters(kind) or {}) if kind not in (None, HUB_DATA) else {}
    missing = "path" in taken and isinstance(path, str) and not os.path.exists(path)
    if missing and (end_of(Path(path)) in ENDS or "split" not in taken):  # else perhaps an id of the Hub
        raise InputError("data.path", expected="an existing file", received=path, hint="check the path")
    for part in ("target", "draft"):
        if _own(model.get("class_path")) and isinstance(source := model.get(part), str):
            local_folder(part, source)
    check_checkpoint(final.get("ckpt_path"))


def check_subcommand(subcommand: str, kinds: Sequence[str]) -> None:
    """Refuses a model, of classes of these names, that is another subcommand's."""
    for kind, own in (("Decoding", "predict"), ("Diagnostic", "test")):
        if kind in kinds and subcommand != own:
            expected = f"{own}, for {kind}"
            raise InputError("subcommand", expected=expected, received=subcommand, hint=f"run `dgd {own}`")


def _kinds(class_path: Any) -> list[str]:
    own = _own(class_path)
    return [own, *catalogue.ancestors(own)] if own is not None else []


def check_checkpoint(path: Any) -> None:
    """Refuses a ``--ckpt_path`` that is not there; ``best`` and ``last`` never are in this run's new folder."""
    if path is not None and str(path) != "hpc" and "://" not in str(path) and not Path(str(path)).exists():
        raise InputError(
            "ckpt_path",
            expected="an existing checkpoint",
            received=path,
            hint="give the path of one, such as logs/NAME/version_N/checkpoints/last.ckpt",
        )
