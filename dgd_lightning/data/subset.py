"""A development subset: a share of every category's contexts, the same whatever the order of the rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dgd_lightning.checks import check_number
from dgd_lightning.types import Task


@dataclass(frozen=True)
class Subset:
    """Which share of the contexts is kept.

    Contexts are ranked, within their category, by a hash of the seed and their id: no order of rows and no generator
    enters, and a larger share holds all of a smaller one.

    Args:
        share: of each category's contexts, above 0 and at most 1; rounded to whole contexts, one at least.
        seed: another seed ranks them otherwise.

    Raises:
        InputError: a share outside these bounds.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("data.subset.share", self.share, above=0, most=1, hint="use e.g. 0.1")

    def of(self, tasks: Sequence[Task], contexts: Sequence[str]) -> list[Task]:
        """The tasks of the contexts that are kept, in their order.

        Args:
            tasks: all there are; ``metadata.context_category`` is a task's category, where it has one.
            contexts: of each task.
        """
        categories: dict[str, str] = {}  # of each context; where its tasks have several, the first by name
        for task, context in zip(tasks, contexts, strict=True):
            category = str((task.row.get("metadata") or {}).get("context_category"))
            categories[context] = min(category, categories.get(context, category))
        strata: dict[str, list[str]] = {}
        for context in sorted(categories, key=self._rank):
            strata.setdefault(categories[context], []).append(context)
        kept = {
            context
            for members in strata.values()
            for context in members[: max(1, math.floor(self.share * len(members) + 0.5))]
        }
        return [task for task, context in zip(tasks, contexts, strict=True) if context in kept]

    def _rank(self, context: str) -> bytes:
        return hashlib.sha256(f"{self.seed}\0{context}".encode()).digest()
