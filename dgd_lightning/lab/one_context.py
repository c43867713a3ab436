"""`LabOneContext`: one held-out context of the lab for a test-time training fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.one_context import OneContext, task_prompts
from dgd_lightning.data.rows import Row
from dgd_lightning.data.tasks import context_of
from dgd_lightning.errors import InputError
from dgd_lightning.lab.rows import ALL_FAMILIES, eval_rows


class LabOneContext(OneContext):
    """One context of the lab's evaluation set.

    Args:
        family: ``star_chart`` and ``ledger`` are the shifted domain, which the bundled draft has never seen.
        number: which one of the family, from 0.
        seed: 0 is the bundled evaluation set.
    """

    def __init__(self, family: str = "star_chart", number: int = 0, seed: int = 0) -> None:
        super().__init__()
        if family not in ALL_FAMILIES or number < 0:
            raise InputError(
                "data.family, data.number",
                expected=f"a family of the lab ({', '.join(ALL_FAMILIES)}) and a number from 0",
                received=f"{family}, {number}",
                hint="use a name from the list",
            )
        self.family, self.number, self.seed = family, number, seed

    def prompts(self, tokenizer: Any) -> tuple[str, list[Tensor]]:
        """See `OneContext.prompts`."""
        rows = eval_rows(self.number + 1, families=(self.family,), seed=self.seed)
        tasks = parse_rows(Row("lab", number, row) for number, row in enumerate(rows, 1))
        last = context_of(tasks[-1])
        return last, task_prompts(tokenizer, [task for task in tasks if context_of(task) == last])
