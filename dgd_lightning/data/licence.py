"""CL-bench's and CL-bench Life's licence, evaluation only: the refusal to fit anything to their rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from dgd_lightning.clbench import is_clbench_row
from dgd_lightning.errors import InputError

CLBENCH = "CL-bench's licence is evaluation only: it forbids training, adapting, calibrating and any parameter updating"


def holds_clbench(rows: Iterable[dict[str, Any]], source: str | Path, said: bool | None) -> bool:
    """Whether the licence holds for rows: ``said`` by the user, or (None) where one of them may be CL-bench's."""
    return any(is_clbench_row(row, source) for row in rows) if said is None else said


class LicensedData(LightningDataModule):
    """Base of the data modules that read rows from elsewhere: a subclass says which, and from where (its ``path``)."""

    clbench: bool | None = None  # what the user says of the rows

    def rows_used(self) -> Iterable[dict[str, Any]]:
        """The rows that reach a model, as they were read."""
        return ()

    @property
    def is_clbench(self) -> bool:
        """Whether CL-bench's licence holds for the rows."""
        return holds_clbench(self.rows_used(), getattr(self, "path", ""), self.clbench)


def check_clbench(data: Any, accepted: bool, argument: str) -> None:
    """Refuses to fit anything to CL-bench's rows; a module that is no `LicensedData` is its author's to answer for.

    ``accepted``: the user has obtained permission; ``argument``: what asks for the fit.
    """
    if getattr(data, "is_clbench", False) and not accepted:
        raise refusal(argument)


def refusal(argument: str) -> InputError:
    """What a user reads who would fit something to CL-bench's rows."""
    return InputError(
        argument,
        expected="rows that a model may be fitted to",
        received=f"rows in CL-bench's format or from a source of its name. {CLBENCH}",
        hint="set data.clbench: false if the rows are your own, or model.accept_clbench_license: true if you have "
        "obtained permission",
    )
