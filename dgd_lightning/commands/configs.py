"""The configurations that come with the package: `dgd configs` lists them; `dgd configs NAME [FILE]` copies one.

`--config NAME` of any command is a local file, or else one of them.
"""

import difflib
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from dgd_lightning.commands.errors import command_parser, parsed
from dgd_lightning.errors import InputError

FOLDER = Path(__file__).parents[1] / "configs"
NAME = re.compile(r"[\w./+-]+")  # a file's name, or a packaged configuration's: no YAML text, which is allowed too


def main(argv: Sequence[str]) -> int:
    """Run `dgd configs [NAME [FILE]]`."""
    parser = command_parser("configs", __doc__, config=False)
    parser.add_argument("name", type=str | None, nargs="?", help="as listed, such as guided/lab")
    parser.add_argument("file", type=str | None, nargs="?", help="default: NAME's last part, in this folder")
    options = parsed(parser, argv[1:])
    if options.name is None:
        width = max(map(len, packaged()))
        for name, path in packaged().items():
            text = path.read_text(encoding="utf-8")
            what = text.partition("\n")[0].removeprefix("#").strip()  # its first line says it
            print(f"{name:{width}}  {_subcommand(text):7}  {what}")
        return 0
    source = find(options.name, "name")
    text, copied = source.read_text(encoding="utf-8"), Path(options.file or source.name)
    copied = copied / source.name if copied.is_dir() else copied
    try:
        with copied.open("x", encoding="utf-8") as new:
            new.write(text)
    except OSError as error:
        raise InputError(
            "file",
            expected="a new file in a folder that can be written",
            received=f"{copied} ({error.strerror})",
            hint="name another one: nothing is overwritten",
        ) from error
    print(f"{copied}: dgd {_subcommand(text)} --config {copied}")
    return 0


def _subcommand(text: str) -> str:
    """Which one a configuration is for, as its second line says."""
    command = re.search(r"^# *dgd (\w+) --config", text, re.M)
    return command[1] if command else "predict"


@cache
def packaged() -> dict[str, Path]:
    """The package's configurations by name: the path below ``configs/`` without its suffix."""
    files = sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.relative_to(FOLDER).parts), path))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in files}


def find(name: str, argument: str) -> Path:
    """The file of a packaged configuration, named with or without its suffix."""
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
    """The same arguments with a path where ``--config`` names a packaged configuration; a local file goes first."""
    arguments = list(argv)
    for place, given in config_places(argv).items():
        arguments[place] = argv[place].removesuffix(given) + config_path(given)
    return arguments


def config_places(argv: Sequence[str]) -> dict[int, str]:
    """What ``--config`` is given, by the place of the argument that holds it."""
    found = {}
    for place, (before, argument) in enumerate(zip(("", *argv), argv, strict=False)):
        if before in ("-c", "--config") or argument.startswith("--config="):
            found[place] = argument.removeprefix("--config=")
    return found


def config_path(given: str, argument: str = "--config") -> str:
    """What a user gave, or the path of the packaged configuration that it names."""
    if given == "-" or (os.path.exists(given) and not os.path.isdir(given)) or not NAME.fullmatch(given):
        return given
    return str(find(given, argument))
