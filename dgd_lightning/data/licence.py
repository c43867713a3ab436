"""CL-bench's licence: evaluation only. Which rows are its, and the refusal to fit anything to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dgd_lightning.errors import InputError

CLBENCH = "CL-bench's licence is evaluation only: it forbids training, adapting and any other updating of parameters"


def is_clbench_row(row: dict[str, Any]) -> bool:
    """Whether a row may be CL-bench's: it has rubrics and a context's id, and does not come from the lab."""
    metadata = row.get("metadata")
    return isinstance(metadata, dict) and "context_id" in metadata and "rubrics" in row and "lab" not in metadata


def holds_clbench(rows: Iterable[dict[str, Any]], said: bool | None) -> bool:
    """Whether the licence holds for rows.

    Args:
        rows: as read.
        said: what the user says of them; None: one row that may be CL-bench's is enough.
    """
    return any(map(is_clbench_row, rows)) if said is None else said


def check_clbench(data: Any, accepted: bool, argument: str) -> None:
    """Refuse to fit anything to CL-bench's rows.

    Args:
        data: a datamodule; ``is_clbench`` says whether the licence holds for what it read.
        accepted: the user has obtained permission.
        argument: what asks for the fit.

    Raises:
        InputError: the rows are CL-bench's, and nobody permitted it.
    """
    if getattr(data, "is_clbench", False) and not accepted:
        raise InputError(
            argument,
            expected="rows that a model may be fitted to",
            received=f"rows in CL-bench's format. {CLBENCH}",
            hint="set data.clbench: false if the rows are your own, or model.accept_clbench_license: true if you have "
            "obtained permission",
        )
