"""What YAML may name, read from sources: the package's classes, and what each of them and Lightning's Trainer take.

Nothing is imported, so this takes a fifth of a second where torch and Lightning take seconds, and there is no second
list that could be out of date. What the sources do not say for sure is None: only the whole parser knows it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import docstring_parser

PACKAGE = Path(__file__).parents[1]
BARE = ("ABC", "Protocol", "Callback", "LightningModule", "LightningDataModule")  # bases that take nothing
_CLASS = re.compile(r"^class (\w+)(?:\(([^)]*)\))?:", re.M)


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


def _ancestors(name: str) -> Iterator[str]:
    for base in (_classes().get(name) or (None, []))[1]:
        yield base
        yield from _ancestors(base) if ours(base) else ["Callback"] * (base in lightning_callbacks())


def ours(name: str) -> bool:
    """Whether the package has one class of this name."""
    return _classes().get(name) is not None


def below(kind: str) -> list[str]:
    """The package's classes on a class, which may be Lightning's."""
    return sorted(name for name in _classes() if kind in _ancestors(name))


def in_lightning(name: str) -> bool:
    """Whether Lightning has a class of this name anywhere, or may have one: its sources are not there."""
    root = _lightning()
    wanted = re.compile(rf"^\s*class {re.escape(name)}\b", re.M)
    return root is None or any(wanted.search(path.read_text(encoding="utf-8")) for path in root.rglob("*.py"))


@cache
def lightning_callbacks() -> list[str]:
    """Names of Lightning's callbacks."""
    root = _lightning()
    text = "" if root is None else (root / "callbacks" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'"(\w+)",', text)


def concrete(name: str) -> bool:
    """Whether a class of the package is for use in YAML: nothing is left for others to write, and it is no base."""
    written: set[str] = set()
    for one in filter(ours, (name, *_ancestors(name))):
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
    init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
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
    """The package's classes that an annotation names."""
    return [name for name in re.findall(r"\w+", kind) if ours(name)]


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


def _passed_on(init: ast.FunctionDef, bases: list[str]) -> Parameters | None:
    """What an ``__init__`` takes as ``**more`` and hands to another class, less what it gives that class itself."""
    if init.args.kwarg is None:
        return {}
    more = init.args.kwarg.arg
    calls = [one for one in ast.walk(init) if isinstance(one, ast.Call)]
    calls = [one for one in calls if any(word.arg is None and ast.unparse(word.value) == more for word in one.keywords)]
    if len(calls) != 1:
        return None
    receiver = ast.unparse(calls[0].func)
    taken = parameters(bases[0] if receiver == "super().__init__" else receiver)
    given = {word.arg for word in calls[0].keywords}
    rest = list((taken or {}).items())[len(calls[0].args) :]
    return None if taken is None else {name: one for name, one in rest if name not in given}
