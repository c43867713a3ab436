"""A room imports only rooms above it, files import each other in no loop, and none is too long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dgd_lightning

PACKAGE = Path(dgd_lightning.__file__).parent
# From top to bottom: a file or a folder each. What a room may import stands above it.
ROOMS = """
    errors checks seeds files jsonl row_files distributions types old_rows clbench run_folder grader
    target draft pair decode methods metrics ttt data lab modules scoring analysis report callbacks commands cli lm_eval
""".split()
PURE = ROOMS[: ROOMS.index("target")]
LONGEST = 500  # lines of a file


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every file of the package but for `__init__.py`, which names what is public, by the name it is imported by."""
    found = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    found += [path for link in package.iterdir() if link.is_symlink() for path in link.rglob("*.py")]
    return {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): path
        for path in found
        if path.name != "__init__.py"
    }


MODULES = modules()


def imports(text: str, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports: at its top, for types alone, or late."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for name in node.names:
                if found := {str(node.module), f"{node.module}.{name.name}"} & known.keys():
                    yield from found
                elif node.module == PACKAGE.name:  # the public names load any room
                    assert name.name == "__version__", f"{name.name} by way of the package's public names"
                elif str(node.module).startswith(f"{PACKAGE.name}."):  # what a room's `__init__.py` hands on
                    yield f"{node.module}.__init__"


def room(module: str) -> str:
    return module.split(".")[1]


GRAPH = {module: set(imports(path.read_text(), MODULES)) for module, path in MODULES.items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]


def loop(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other round and round; none where there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_file_is_in_a_room() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)
    assert len(MODULES) > 100  # the folders behind links among them
    assert "dgd_lightning.callbacks.progress" in MODULES


def test_rooms_import_rooms_above_them() -> None:
    assert upward(GRAPH) == []


def test_no_files_import_each_other_in_a_loop() -> None:
    assert loop(GRAPH) == []


def test_metrics_need_no_model() -> None:
    needed = {room(other) for module, others in GRAPH.items() if room(module) == "metrics" for other in others}
    assert needed - {"metrics"} <= set(PURE)


@pytest.mark.parametrize("at", ["import dgd_lightning.b", "def f():\n    from dgd_lightning import b",
                                "if TYPE_CHECKING:\n    from dgd_lightning.b import x"])  # fmt: skip
def test_imports_are_found_wherever_they_stand(at: str) -> None:
    assert list(imports(at, {"dgd_lightning.b": Path()})) == ["dgd_lightning.b"]
    assert list(imports("from dgd_lightning.callbacks import X", {})) == ["dgd_lightning.callbacks.__init__"]
    with pytest.raises(AssertionError, match="Pair by way of"):
        list(imports("from dgd_lightning import Pair", {}))
    assert upward({"dgd_lightning.types": {"dgd_lightning.pair"}}) == ["dgd_lightning.types imports dgd_lightning.pair"]
    assert len(loop({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == 4  # the first once more, at the end


def test_files_are_short_and_none_is_taken_for_a_test() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in lengths.items() if lines > LONGEST} == {}
    assert [module for module, path in MODULES.items() if path.name.startswith("test_")] == []


def test_what_may_be_left_out_is_null_on_a_command_line() -> None:
    """No hint says "leave it out" without how that is said there; lm-eval's options are not ours."""
    bare = re.compile(r"leave (it|one of (them|the two)) out(?! \(on a command line: )")
    found = [
        (name, node.value)
        for name, path in MODULES.items()
        if not name.endswith(".lm_eval")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and bare.search(node.value)
    ]
    assert not found
