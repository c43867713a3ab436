"""`LabOneContext`: one held-out context of the lab for a test-time training fit."""

from typing import Any

from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer
from dgd_lightning.data.one_context import OneContext, task_prompts
from dgd_lightning.data.tasks import context_of
from dgd_lightning.lab.contexts import lab_tasks
from dgd_lightning.lab.families import ALL_FAMILIES


class LabOneContext(OneContext):
    """One context of the lab's evaluation set.

    Args:
        family: ``star_chart`` and ``ledger`` are the shifted domain, which the bundled draft has never seen.
        number: which one of the family, from 0.
        seed: 0 is the bundled evaluation set.
    """

    def __init__(self, family: str = "star_chart", number: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.family = check_choice("data.family", family, ALL_FAMILIES)
        self.number, self.seed = check_integer("data.number", number, least=0), seed

    def prompts(self, tokenizer: Any) -> tuple[str, list[Tensor]]:
        """See `OneContext.prompts`."""
        tasks = lab_tasks(self.number + 1, families=(self.family,), seed=self.seed)
        last = context_of(tasks[-1])
        return last, task_prompts(tokenizer, [task for task in tasks if context_of(task) == last])
