"""The configurations that come with the package, by name: `--config NAME` is a local file, or else one of them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from dgd_lightning.errors import InputError

FOLDER = Path(__file__).parents[1] / "configs"
NAME = re.compile(r"[\w./+-]+")  # a file's name, or a packaged configuration's: no YAML text, which is allowed too


@cache
def packaged() -> dict[str, Path]:
    """The package's configurations by name: the path below ``configs/`` without its suffix."""
    files = sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.relative_to(FOLDER).parts), path))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in files}


def about(path: Path) -> str:
    """The first line of a configuration, which says what it is."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def find(name: str, argument: str) -> Path:
    """The file of a name: a packaged configuration, with or without its suffix.

    Raises:
        InputError: there is none of that name.
    """
    known = packaged()
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    last = stem.rpartition("/")[2]
    near = [one for one in known if one.rpartition("/")[2] == last]
    near = near or difflib.get_close_matches(stem, known, n=3) or difflib.get_close_matches(last, known, n=1)
    raise InputError(
        argument,
        expected="a file, or a name that `dgd configs` lists",
        received=repr(name),
        hint=f"did you mean {' or '.join(near)}?" if near else "check the path, or see `dgd configs`",
    )


def with_paths(argv: Sequence[str]) -> list[str]:
    """The same arguments with a path where ``--config`` names a packaged configuration; a local file goes first.

    Raises:
        InputError: it names neither.
    """
    arguments = list(argv)
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            arguments[place] = f"--config={config_path(argument.removeprefix('--config='))}"
        elif place and arguments[place - 1] in ("-c", "--config"):
            arguments[place] = config_path(argument)
    return arguments


def config_path(given: str, argument: str = "--config") -> str:
    """What a user gave, or the path of the packaged configuration that it names.

    Raises:
        InputError: it is the name of neither.
    """
    if given == "-" or (os.path.exists(given) and not os.path.isdir(given)) or not NAME.fullmatch(given):
        return given
    return str(find(given, argument))
