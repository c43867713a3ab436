"""Files that appear whole: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole_files(folder: Path, *names: str) -> Iterator[Path]:
    """A scratch folder for the block; at its end files move into ``folder``, so that a reader sees old or new ones.

    The files of these names move, in this order; where the block raises, nothing moves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        yield Path(scratch)
        for name in names:
            os.replace(Path(scratch, name), folder / name)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' ``save_file``, readable for all as other files are, whose errors are the system's."""
    from safetensors import SafetensorError  # with torch, which those who only score need not wait for
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # safetensors writes for the owner alone
