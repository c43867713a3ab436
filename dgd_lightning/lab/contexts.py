"""The lab's evaluation contexts as a data module of predict: held-out seeds and names, CL-bench's format."""

from typing import Any

from dgd_lightning.checks import check_integer
from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.rows import Row
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.errors import InputError
from dgd_lightning.lab.families import FAMILIES
from dgd_lightning.lab.rows import check_families, check_sizes, eval_rows
from dgd_lightning.types import Task


class LabContexts(TaskData):
    """Tasks of the lab's held-out contexts.

    Args:
        contexts_per_family: contexts of each family; the first ones are the same whatever the number.
        families: families to take; None takes all that the bundled draft was trained on. ``star_chart`` and
            ``ledger`` are the shifted domain.
        sizes: smallest and largest number of facts in a context, inclusive, within what each family can write
            (`rows.LARGEST_SIZES`); None: chosen per family, so that long answers have at least 64 tokens.
        seed: 0 is the bundled evaluation set; other seeds give other held-out contexts.
        batch_size: tasks decoded together.
        **options: see `TaskData`.
    """

    def __init__(
        self,
        contexts_per_family: int = 4,
        families: list[str] | None = None,
        sizes: tuple[int, int] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.families = list(FAMILIES) if families is None else families
        check_families("data.families", self.families)
        if repeated := sorted({family for family in self.families if self.families.count(family) > 1}):
            raise InputError(
                "data.families",
                expected="each family once: its contexts would come twice, with the same ids",
                received=f"{', '.join(repeated)} more than once",
                hint="name it once, and raise data.contexts_per_family for more contexts",
            )
        if sizes is not None:
            if not 3 <= sizes[0] <= sizes[1] <= 36:
                bounds = "3 ≤ smallest ≤ largest ≤ 36"
                raise InputError("data.sizes", expected=bounds, received=list(sizes), hint="use for example [9, 12]")
            check_sizes("data.sizes", sizes, self.families)
        self.contexts_per_family = check_integer("data.contexts_per_family", contexts_per_family)
        self.sizes, self.seed = sizes, seed

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        return lab_tasks(self.contexts_per_family, families=self.families, sizes=self.sizes, seed=self.seed)


def lab_tasks(contexts_per_family: int, **settings: Any) -> list[Task]:
    """Tasks of held-out contexts, see `rows.eval_rows`."""
    rows = eval_rows(contexts_per_family, **settings)
    return parse_rows(Row(f"lab row {number}", number, row) for number, row in enumerate(rows, 1))
