"""Makes one `InputError` (argument, expected, received, hint) of jsonargparse's and the system's complaints."""

import difflib
import errno
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from dgd_lightning.commands.reading import replacing
from dgd_lightning.errors import InputError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR}
_KEY = re.compile(r'^\s*Parser key "([^"]+)":', re.M)
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN = re.compile(
    r"[Oo]ption '(?P<option>[^']+)' is not accepted|Key '(?P<key>[^']+)' is not expected"
    r"|(Group '(?P<group>[^']+)' )?does not accept option '(?P<inner>[^']+)'"
)
_UNRECOGNISED = re.compile(r"unrecognized arguments: (?P<all>--(?P<key>[^\s=]+).*)")
_SWITCHED = re.compile(r"true|false|yes|no|null", re.I)  # what follows on a switch as its value
_LITERAL = re.compile(r"Literal\[([^\]]*)\]")
_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_UNION = re.compile(r"Subtypes: \[([^\n]+)\]\n(?:(?!Subtypes: ).)*?Given value: ([^\n]*)", re.S)  # the innermost


def command_parser(name: str, about: str | None, *, config: bool = True) -> ArgumentParser:
    """A subcommand's parser, whose mistakes `parsed` reports; with ``config`` a YAML file may hold its options."""
    parser = ArgumentParser(prog=f"dgd {name}", exit_on_error=False, description=about)
    if config:
        parser.add_argument("--config", action="config", help="YAML file with the keys below")
    return parser


def add_switch(parser: ArgumentParser, option: str, about: str) -> None:
    """An option that needs no value: ``--option``, ``--option true``, ``option: true`` in YAML."""
    parser.add_argument(option, type=bool, nargs="?", const=True, default=False, help=about)


def parsed(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """What a command's parser makes of the arguments after the command's name."""
    switches = {name for action in parser._actions if action.const is True for name in action.option_strings}
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    words = [f"{word}=true" if word in switches and not _SWITCHED.fullmatch(after) else word for word, after in pairs]
    try:
        with replacing():
            options = parser.parse_args(words)
        return parser.instantiate_classes(options)
    except ArgumentError as error:
        raise from_parser_message(str(error)) from error


def mistake_behind(error: BaseException) -> InputError | None:
    """The user's mistake that caused an error, or a file that the system refused; None where it was neither.

    jsonargparse wraps what a constructor raises. Causes alone count: an error of ours amid the handling of another is
    no user's.
    """
    refused: OSError | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        if refused is None and isinstance(cause, OSError) and cause.errno in REFUSED:
            refused = cause
        cause = cause.__cause__
    if refused is None:
        return None
    full = refused.errno in FULL  # what was written before is whole
    return InputError(
        str(refused.filename or "disk"),
        expected="room to write" if full else "a file that may be read, and a folder that may be written",
        received=refused.strerror,
        hint=f"{'make room' if full else 'see to its permissions'}, then give the same command again",
    )


def from_parser_message(message: str) -> InputError:
    """The one-line form of what jsonargparse's ``ArgumentError`` says, naming the innermost argument that is wrong."""
    path = ".".join(dict.fromkeys(_KEY.findall(message))) or "command line"
    for recognise in (_unknown, _required, _bad_class, bad_file, _value):
        if (error := recognise(message, path)) is not None:
            return error
    return InputError(path, expected="a valid value", received=_short(message, 300), hint="see `dgd SUBCOMMAND --help`")


def as_written(error: InputError) -> InputError:
    """A mistake of the module's settings under the names that YAML and command line have for them."""

    def rename(text: str) -> str:
        return re.sub(r"(?<![\w.])ttt\.(?=[a-z])", "model.ttt.", text)

    argument = "data" if error.argument == "context_ids" else rename(error.argument)
    return InputError(argument, expected=rename(error.expected), received=error.received, hint=rename(error.hint))


def in_one_line(value: Any) -> str:
    """The YAML that a user is to write."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()


def _short(text: object, limit: int = 120) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _named(class_path: str) -> Any:
    """What a class path names; None where it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _parameters(owner: Any) -> list[str]:
    """Names that a class takes; empty where it does not say."""
    try:
        return ArgumentParser().add_class_arguments(owner)
    except (ValueError, TypeError):
        return []


def _unknown(message: str, path: str) -> InputError | None:
    if match := _UNKNOWN.search(message):
        found = match.groupdict()
        key = found["option"] or found["inner"] or found["key"]
        return _unknown_key(message[: match.start()], path, [*filter(None, [found["group"]]), *key.split(".")])
    if match := _UNRECOGNISED.search(message):
        if _CLASS.search(message):
            return _unknown_key(message[: match.start()], path, match["key"].split("."))
        close: list[str] = []
        if match["key"].startswith("trainer."):
            from lightning.pytorch import Trainer  # seconds of imports, and `dgd score` needs none of it

            close = difflib.get_close_matches(match["key"].rpartition(".")[2], _parameters(Trainer), n=1)
        return InputError(
            f"--{match['key']}",
            expected="a known argument",
            received=_short(match["all"]),
            hint=f"did you mean 'trainer.{close[0]}'?" if close else "see `dgd SUBCOMMAND --help`",
        )
    return None


def _unknown_key(before: str, path: str, key: list[str]) -> InputError:
    """A key that its class does not take; ``before``: what the message says first, ``key``: relative to the path."""
    classes = _CLASS.findall(before)
    owner = _named(classes[-1]) if classes else None
    owner = owner if len(key) == 1 else None  # else of a group in it
    known = _parameters(owner) if owner is not None else []
    place = ".".join(key if path == "command line" else [path, *key])
    return unknown_key(place, key[-1], owner.__name__ if owner is not None else "this subcommand", known)


def unknown_key(place: str, key: str, owner: str, known: Sequence[str], *, short: bool = False) -> InputError:
    """What is said of a key that its owner does not take; ``short``: without all that it takes."""
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "remove it, or see `--help`"
    if known and not close and not short:
        hint = f"remove it, or use one of {', '.join(known)}"
    return InputError(place, expected=f"a key of {owner}", received=f"unknown key {key!r}", hint=hint)


def _required(message: str, path: str) -> InputError | None:
    if match := re.search(r"the following arguments are required: ([^\s,]+)", message):
        name = match[1].split(".", 1)[-1] if path == "command line" else f"{path}.{match[1]}"
        hint = "set it in the YAML or on the command line"
        return InputError(name, expected="a value", received="nothing", hint=hint)
    if 'expected "subcommand"' in message:
        return InputError(
            "subcommand",
            expected="one of fit, validate, test, predict",
            received="nothing",
            hint="for example `dgd predict --config FILE.yaml`",
        )
    return None


def _bad_class(message: str, path: str) -> InputError | None:
    expected = "a class that can be imported"
    hint = "check class_path; the project's own classes go by their short names"
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        modules = [module for key, module in sys.modules.items() if key.startswith("dgd_lightning.")]
        own = [name for module in modules for name, one in vars(module).items() if isinstance(one, type)]
        if close := difflib.get_close_matches(match[1], own, n=1):
            hint = f"did you mean {close[0]!r}?"
        if match[1] in own:
            expected, hint = "another kind of class", "see `dgd SUBCOMMAND --help` for what goes here"
        return InputError(f"{path}.class_path", expected=expected, received=match[1], hint=hint)
    problem = re.search(
        r"(No module named '[^']+'|module '[^']+' has no attribute '[^']+'|Import path [^\n]+)", message
    )
    if problem and (classes := _CLASS.findall(message)):
        if problem[1].startswith("No module"):
            hint = "check class_path, and that the folder of its file is on PYTHONPATH"
        given = problem[1].split()[2] if problem[1].startswith("Import path") else classes[-1]
        return InputError(f"{path}.class_path", expected=expected, received=f"{given} ({problem[1]})", hint=hint)
    if match := re.search(r"instantiatable class, but (\S+) is abstract", message):
        left = ", ".join(sorted(getattr(_named(match[1]), "__abstractmethods__", ())))
        expected, hint = "a class of which nothing is left to write", f"write its {left}, or name another"
        return InputError(f"{path}.class_path", expected=expected, received=match[1], hint=hint)
    if match := re.search(r"'([^']+)' is not a subclass of (\w+)", message):
        return InputError(f"{path}.class_path", expected=f"a subclass of {match[2]}", received=match[1], hint=hint)
    return None


def bad_file(message: str, path: str = "config") -> InputError | None:
    """The same of a message about a file that can't be read, or a config file that is no YAML; None for any other."""
    if match := re.search(r"(?:File does not exist|is not readable|unable to read)[^']*'([^']+)'", message, re.I):
        argument = "--config" if path == "config" else path
        return InputError(argument, expected="a readable file", received=match[1], hint="check the path")
    if match := re.search(r"Unexpected config:\s*(.*)", message, re.S):
        received = _short(match[1]) or "an empty file"
        return InputError("--config", expected="keys with their values", received=received, hint="see `dgd configs`")
    if match := re.search(r"argument (--\S+): expected one argument", message):
        return no_value(match[1])
    if match := re.search(r"Problems? parsing config[^:]*: (.+)", message, re.S):
        received, hint = _short(match[1]), "correct the YAML"
        # PyYAML names where the block begins, and last where it can't go on
        if places := re.findall(r'([^"]+?)\s+in "[^"]+", line (\d+), column (\d+)', match[1]):
            what, line, column = places[-1]
            received = f"line {line}, column {column}: {' '.join(what.strip(' :').split())}"
            hint = f"correct line {line}, or the one before it"
        return InputError("--config", expected="a YAML file", received=received, hint=hint)
    return None


def no_value(option: str) -> InputError:
    """What is said of an option that no value follows."""
    return InputError(option, expected="a value", received="nothing", hint=f"write {option} VALUE")


def _value(message: str, path: str) -> InputError | None:
    if match := re.search(r"argument (\S+): invalid choice: '([^']+)' \(choose from (.+)\)", message):
        return InputError(match[1], expected=f"one of {match[3]}", received=match[2], hint="use one of those")
    match = _TYPE.search(message)
    allowed = _LITERAL.search(match[1]) if match else None
    if (match := match or _UNION.search(message)) is None:
        return None
    close = difflib.get_close_matches(match[2], re.findall(r"'([^']+)'", allowed[1]) if allowed else [], n=1)
    hint = f"did you mean '{close[0]}'?" if close else "correct the value"
    kind = _LITERAL.sub(lambda literal: "one of " + literal[1].replace("'", ""), match[1])
    kind = re.sub(r"<class '([^']+)'>", r"\1", kind).replace("typing.", "").replace("NoneType", "null")
    kind = re.sub(r"(?:collections\.abc\.)?(?:Sequence|[Ll]ist)\[([^\[\]]+)\]", r"a list of \1", kind)
    return InputError(path, expected=_short(kind), received=_short(match[2]), hint=hint)
