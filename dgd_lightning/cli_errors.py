"""Turns jsonargparse's many-line complaints into one `InputError`: argument, expected, received, mend."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re

from dgd_lightning.errors import InputError

_KEY = re.compile(r'^\s*Parser key "([^"]+)":', re.M)
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN = re.compile(
    r"[Oo]ption '([^']+)' is not accepted|does not accept option '([^']+)'|Key '([^']+)' is not expected"
)
_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_UNION = re.compile(r"Subtypes: \[(.+)\].*?Given value: ([^\n]*)", re.S)


def from_parser_message(message: str) -> InputError:
    """The one-line form of a jsonargparse message, naming the innermost argument that is wrong.

    Args:
        message: the text of jsonargparse's ``ArgumentError``.
    """
    path = ".".join(dict.fromkeys(_KEY.findall(message))) or "command line"
    for recognise in (_unknown, _required, _bad_class, _file, _choice, _type):
        if (error := recognise(message, path)) is not None:
            return error
    return InputError(path, expected="a valid value", received=_short(message, 300), mend="see `dgd SUBCOMMAND --help`")


def _short(text: object, limit: int = 120) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _parameters(class_path: str) -> list[str]:
    """Names that the class takes; empty where it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _unknown(message: str, path: str) -> InputError | None:
    if match := _UNKNOWN.search(message):
        key = next(group for group in match.groups() if group)
        classes = _CLASS.findall(message[: match.start()])
        known = _parameters(classes[-1]) if classes else []
        close = difflib.get_close_matches(key, known, n=1)
        where = f"of {classes[-1].rpartition('.')[2]}" if classes else "of this subcommand"
        mend = f"did you mean {close[0]!r}?" if close else "remove it, or see `--help`"
        if known and not close:
            mend = f"remove it, or use one of {', '.join(known)}"
        return InputError(
            key if path == "command line" else f"{path}.{key}",
            expected=f"a key {where}",
            received=f"unknown key {key!r}",
            mend=mend,
        )
    if match := re.search(r"unrecognized arguments: (.+)", message):
        return InputError(
            match[1].split()[0],
            expected="a known argument",
            received=_short(match[1]),
            mend="see `dgd SUBCOMMAND --help`",
        )
    return None


def _required(message: str, path: str) -> InputError | None:
    if match := re.search(r"the following arguments are required: (\S+)", message):
        name = match[1].rstrip(",").split(".", 1)[-1] if path == "command line" else f"{path}.{match[1].rstrip(',')}"
        return InputError(
            name, expected="a value", received="nothing", mend="set it in the YAML or on the command line"
        )
    if 'expected "subcommand"' in message:
        return InputError(
            "subcommand",
            expected="one of fit, validate, test, predict",
            received="nothing",
            mend="for example `dgd predict --config FILE.yaml`",
        )
    return None


def _bad_class(message: str, path: str) -> InputError | None:
    expected, mend = (
        "a class that can be imported",
        "check class_path; the project's own classes go by their short names",
    )
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        return InputError(f"{path}.class_path", expected=expected, received=match[1], mend=mend)
    problem = re.search(
        r"(No module named '[^']+'|module '[^']+' has no attribute '[^']+'|Import path [^\n]+)", message
    )
    if problem and (classes := _CLASS.findall(message)):
        return InputError(f"{path}.class_path", expected=expected, received=f"{classes[-1]} ({problem[1]})", mend=mend)
    if match := re.search(r"'([^']+)' is not a subclass of (\w+)", message):
        return InputError(f"{path}.class_path", expected=f"a subclass of {match[2]}", received=match[1], mend=mend)
    return None


def _file(message: str, path: str) -> InputError | None:
    if match := re.search(r"(?:File does not exist|is not readable|unable to read)[^']*'([^']+)'", message, re.I):
        return InputError(
            "--config" if path == "config" else path,
            expected="a readable file",
            received=match[1],
            mend="check the path",
        )
    if match := re.search(r"Problems? parsing config[^:]*: (.+)", message, re.S):
        return InputError("--config", expected="a YAML file", received=_short(match[1]), mend="correct the YAML")
    return None


def _choice(message: str, path: str) -> InputError | None:
    if match := re.search(r"argument (\S+): invalid choice: '([^']+)' \(choose from (.+)\)", message):
        return InputError(match[1], expected=f"one of {match[3]}", received=match[2], mend="use one of those")
    return None


def _type(message: str, path: str) -> InputError | None:
    if match := _TYPE.search(message):
        return InputError(path, expected=_type_name(match[1]), received=_short(match[2]), mend="correct the value")
    if match := _UNION.search(message):
        return InputError(path, expected=_type_name(match[1]), received=_short(match[2]), mend="correct the value")
    return None


def _type_name(text: str) -> str:
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("typing.", "").replace("NoneType", "null")
    return _short(text)
