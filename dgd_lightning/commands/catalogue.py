"""What YAML may name, read from sources: the package's classes, and what each of them and Lightning's Trainer take.

Nothing is imported, so this takes a fifth of a second where torch and Lightning take seconds, and there is no second
list that could be out of date. What the sources do not say for sure is None: only the whole parser knows it.
"""

import ast
import builtins
import contextlib
import re
import typing
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import docstring_parser
from jsonargparse import ArgumentParser

from dgd_lightning.checks import check_choice, check_integer, check_number
from dgd_lightning.errors import InputError

PACKAGE = Path(__file__).parents[1]
BARE = ("ABC", "Protocol", "Callback", "Logger", "LightningModule", "LightningDataModule")  # bases that take nothing
CHECKS = {"check_integer": check_integer, "check_number": check_number, "check_choice": check_choice}
_CLASS = re.compile(r"^class (\w+)(?:\(([^)]*)\))?:", re.M)
_ALIAS = re.compile(r"^([A-Z][a-z]\w*) = ((?:Literal|list)\[.*)", re.M)


class Parameter(NamedTuple):
    """What a class takes under a name; annotation and default are as its source has them."""

    kind: str
    default: str | None  # None: a value is needed
    about: str


Parameters = dict[str, Parameter]


@cache
def _classes() -> dict[str, tuple[Path, list[str]] | None]:
    """File and bases of every class of the package by its name; None where two have it."""
    found: dict[str, tuple[Path, list[str]] | None] = {}
    for path in sorted({*PACKAGE.rglob("*.py"), *PACKAGE.glob("callbacks/*.py")}):  # a link, which rglob passes by
        for name, bases in _CLASS.findall(path.read_text(encoding="utf-8")):
            known = [base.partition("[")[0].rpartition(".")[2].strip() for base in bases.split(",")]
            found[name] = None if name in found else (path, known)
    return found


@cache
def _aliases() -> dict[str, str]:
    """Annotations that the package has names for; a name that stands for two is not known."""
    texts = (path.read_text(encoding="utf-8") for path in {found[0] for found in _classes().values() if found})
    found = {pair for text in texts for pair in _ALIAS.findall(text)}
    names = [name for name, _ in found]
    return {name: kind for name, kind in found if names.count(name) == 1}


class _Names(dict[str, Any]):
    """What names in an annotation stand for; `Any` for what is not known here."""

    def __missing__(self, name: str) -> Any:
        if name in _aliases():
            return eval(_aliases()[name], {}, self)
        return Any if ours(name) else getattr(builtins, name, getattr(typing, name, Any))


@cache
def _reader(kind: str) -> ArgumentParser | None:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=eval(kind, {}, _Names()))
    except Exception:  # names of another module's
        return None
    return parser


def adapted(value: Any, kind: str, *, append: bool = False) -> Any:
    """A value as an annotation has it, a text as its number: `x` is no ``int | None``. Classes are not looked at.

    Raises:
        ArgumentError: it does not fit.
    """
    parser = _reader(kind)
    return value if parser is None else parser.parse_object({f"value{'+' * append}": value}).value


def refusal(name: str, values: dict[str, Any]) -> InputError | None:
    """What a class of the package says of an argument that it checks by itself; the checks are its own, run from here.

    ``values``: the arguments that are given, numbers as numbers.
    """
    init = _functions(_node(name)).get("__init__")
    receivers = [ast.unparse(call.func) for call in (_takers(init) if init else ())]
    usual = {key: one.default for key, one in (parameters(name) or {}).items()}
    known = {key: ast.literal_eval(text) for key, text in usual.items() if text and _is_literal(text)} | values
    for node in map(_node, filter(ours, (name, *ancestors(name), *receivers))):
        checking = [one for name, one in _functions(node).items() if name in ("__init__", "__post_init__", "check")]
        for statement in (part for function in checking for part in function.body):
            calls = {ast.unparse(call.func) for call in ast.walk(statement) if isinstance(call, ast.Call)}
            if not calls & CHECKS.keys() or calls - {*CHECKS, "getattr"}:
                continue
            names = {**known, **CHECKS, "self": SimpleNamespace(**known)}
            try:
                exec(compile(ast.Module([statement], []), name, "exec"), names)
            except InputError as error:
                return error
            except Exception:  # names of its module, and arguments that have no value here
                continue
    return None


def ancestors(name: str) -> Iterator[str]:
    """Names of the classes that a class of the package is one of."""
    for base in (_classes().get(name) or (None, []))[1]:
        yield base
        yield from ancestors(base) if ours(base) else ["Callback"] * (base in in_lightning_by("Callback"))


def ours(name: str) -> bool:
    """Whether the package has one class of this name."""
    return _classes().get(name) is not None


def below(kind: str) -> list[str]:
    """The package's classes on a class, which may be Lightning's."""
    return sorted(name for name in _classes() if kind in ancestors(name))


@cache
def in_lightning(name: str) -> bool:
    """Whether Lightning has a class of this name anywhere, or may have one: its sources are not there."""
    root = _lightning()
    wanted = re.compile(rf"^\s*class {re.escape(name)}\b", re.M)
    return root is None or any(wanted.search(path.read_text(encoding="utf-8")) for path in root.rglob("*.py"))


@cache
def in_lightning_by(kind: str) -> list[str]:
    """Names of Lightning's callbacks (``Callback``) or loggers (``Logger``)."""
    root = _lightning()
    path = (root or Path()) / f"{kind.lower()}s" / "__init__.py"
    return re.findall(r'^    "(\w+)",', path.read_text(encoding="utf-8"), re.M) if root and path.is_file() else []


def concrete(name: str) -> bool:
    """Whether a class of the package is for use in YAML: nothing is left for others to write, and it is no base."""
    written: set[str] = set()
    for one in filter(ours, (name, *ancestors(name))):
        for function in (part for part in _node(one).body if isinstance(part, ast.FunctionDef)):
            marks = [*function.decorator_list, *(part for part in function.body if isinstance(part, ast.Raise))]
            left = any(re.search("abstractmethod|NotImplementedError", ast.unparse(mark)) for mark in marks)
            if left and function.name not in written:
                return False
            written.add(function.name)
    path, _ = _classes()[name]  # type: ignore[misc]
    return path.parent != Path(__file__).parent and not about(name).startswith("Base of ")


def about(name: str) -> str:
    """The first paragraph of what a class of the package says of itself."""
    return _plain((ast.get_docstring(_node(name)) or "").partition("\n\n")[0])


@cache
def parameters(name: str) -> Parameters | None:
    """What a class of the package takes; None where that is not certain."""
    if not ours(name):
        return {} if name in BARE else None
    node, (_, bases) = _node(name), _classes()[name]  # type: ignore[misc]
    init = _functions(node).get("__init__")
    texts = _documented(node)
    if init is not None:
        own, passed = _arguments(init, texts), _passed_on(init, bases)
        return (
            None if passed is None or init.args.vararg else {**own, **{key: passed[key] for key in passed.keys() - own}}
        )
    inherited: Parameters = {}
    decorated = any(ast.unparse(one).startswith("dataclass") for one in node.decorator_list)
    for base in reversed([base for base in bases if base]):
        found = parameters(base)
        if found is None and not decorated:
            return None
        inherited |= found or {}
    return inherited | (_fields(node, texts) if decorated else {})


def trainer_parameters(method: str = "__init__") -> Parameters | None:
    """What Lightning's Trainer takes, or one of its methods; None where its source is not as expected."""
    tree = _trainer()
    functions = [one for one in tree.body if isinstance(one, ast.FunctionDef)] if tree is not None else []
    function = next((one for one in functions if one.name == method), None)
    return None if function is None or function.args.kwarg else _arguments(function, _documented(function))


def classes_in(kind: str) -> list[str]:
    """The package's classes that an annotation names, and Lightning's that YAML may name."""
    return [name for name in re.findall(r"\w+", kind) if ours(name) or name in BARE]


@cache
def _lightning() -> Path | None:
    spec = find_spec("lightning")  # of a package itself: nothing is imported
    roots = [Path(one) / "pytorch" for one in (spec.submodule_search_locations or [])] if spec is not None else []
    return next((root for root in roots if (root / "callbacks" / "__init__.py").is_file()), None)


@cache
def _trainer() -> ast.ClassDef | None:
    path = (_lightning() or Path()) / "trainer" / "trainer.py"
    tree = _tree(path) if path.is_file() else ast.Module([], [])
    return next((one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == "Trainer"), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _node(name: str) -> ast.ClassDef:
    tree = _tree(_classes()[name][0])  # type: ignore[index]
    return next(one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name)


def _documented(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    found = docstring_parser.parse(ast.get_docstring(node) or "").params
    return {name: _plain(one.description or "") for one in found for name in one.arg_name.split(", ")}


def _plain(text: str) -> str:
    """A docstring's text in one line, as it is read in a terminal: names without their markup."""
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", " ".join(text.split())).replace("``", "")


def _arguments(function: ast.FunctionDef, texts: dict[str, str]) -> Parameters:
    """Of a method, ``self`` apart."""
    given = function.args
    positional = [*given.posonlyargs, *given.args][1:]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    pairs = zip([*positional, *given.kwonlyargs], [*defaults, *given.defaults, *given.kw_defaults], strict=True)
    return {one.arg: _parameter(one.annotation, value, texts.get(one.arg, "")) for one, value in pairs}


def _parameter(kind: ast.expr | None, default: ast.expr | None, about: str) -> Parameter:
    return Parameter(ast.unparse(kind) if kind else "", ast.unparse(default) if default else None, about)


def _fields(node: ast.ClassDef, texts: dict[str, str]) -> Parameters:
    """Of a dataclass; those that its ``__init__`` does not take are left out."""
    found = {}
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and "ClassVar" not in ast.unparse(one.annotation):
            name, value = ast.unparse(one.target), one.value
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
                options = {word.arg: word.value for word in value.keywords}
                if "init" in options:
                    continue
                factory = options.get("default_factory")
                value = options.get("default", ast.Call(factory, [], []) if factory is not None else None)
            found[name] = _parameter(one.annotation, value, texts.get(name, ""))
    return found


def _functions(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}


def _takers(init: ast.FunctionDef) -> list[ast.Call]:
    """The calls that an ``__init__`` hands its ``**more`` to."""
    more = init.args.kwarg.arg if init.args.kwarg else None
    calls = [one for one in ast.walk(init) if isinstance(one, ast.Call) and more is not None]
    return [one for one in calls if any(word.arg is None and ast.unparse(word.value) == more for word in one.keywords)]


def _passed_on(init: ast.FunctionDef, bases: list[str]) -> Parameters | None:
    """What an ``__init__`` takes as ``**more`` and hands to another class, less what it gives that class itself."""
    if init.args.kwarg is None:
        return {}
    calls = _takers(init)
    if len(calls) != 1:
        return None
    receiver = ast.unparse(calls[0].func)
    taken = parameters(bases[0] if receiver == "super().__init__" else receiver)
    given = {word.arg for word in calls[0].keywords}
    rest = list((taken or {}).items())[len(calls[0].args) :]
    return None if taken is None else {name: one for name, one in rest if name not in given}


def _is_literal(text: str) -> bool:
    with contextlib.suppress(ValueError):
        ast.literal_eval(text)
        return True
    return False
