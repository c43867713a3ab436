"""Files that appear whole: written beside their place, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(folder: Path, *names: str) -> Iterator[Path]:
    """A scratch folder for the block; at its end files move into ``folder``, so that a reader sees old or new ones.

    Where the block raises, nothing moves.

    Args:
        folder: made if missing.
        names: files that the block writes into the scratch folder; each replaces its namesake, in this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        yield Path(scratch)
        for name in names:
            os.replace(Path(scratch, name), folder / name)
