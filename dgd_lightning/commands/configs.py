"""`dgd configs`: lists the configurations that come with the package; `dgd configs NAME [FILE]` copies one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from dgd_lightning.commands.errors import parsed
from dgd_lightning.commands.packaged import about, find, packaged
from dgd_lightning.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Run `dgd configs [NAME [FILE]]`.

    Args:
        argv: with the subcommand's name first.

    Raises:
        InputError: there is no such configuration, or the file can't be written or is there already.
    """
    parser = ArgumentParser(prog="dgd configs", exit_on_error=False, description=__doc__)
    parser.add_argument("name", type=str | None, nargs="?", help="as listed, such as guided/lab")
    parser.add_argument("file", type=str | None, nargs="?", help="default: NAME's last part, in this folder")
    options = parsed(parser, list(argv)[1:])
    if options.name is None:
        width = max(map(len, packaged()))
        print("\n".join(f"{name:{width}}  {about(path)}" for name, path in packaged().items()))
        return 0
    source = find(options.name, "name")
    copied = copy(source, Path(options.file or source.name))
    command = re.search(r"^# *dgd (\w+) --config", source.read_text(encoding="utf-8"), re.M)
    print(f"{copied}: dgd {command[1] if command else 'predict'} --config {copied}")
    return 0


def copy(source: Path, file: Path) -> Path:
    """Copies a configuration to a new file, or into a folder.

    Raises:
        InputError: the file is there already, or can't be written.
    """
    file = file / source.name if file.is_dir() else file
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "file",
            expected="a new file in a folder that can be written",
            received=f"{file} ({error.strerror})",
            hint="name another one: nothing is overwritten",
        ) from error
    return file
