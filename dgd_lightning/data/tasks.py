"""`TaskData`: what every source of tasks shares: filter, limit, grouping, fingerprint, dataloader."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from dgd_lightning.checks import check_integer, check_number
from dgd_lightning.data.licence import LicensedData
from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

Names = list[str] | str | None
MOST_UNEVEN = 1.1  # longest share of a rank where contexts stay together, over that where they need not


def context_of(task: Task) -> str:
    """The context a task belongs to: CL-bench's ``metadata.context_id``, or the task itself."""
    return str(_metadata(task).get("context_id", task.idx))


def _metadata(task: Task) -> dict[str, Any]:
    metadata = task.row.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def by_context(tasks: Iterable[Task]) -> dict[str, list[Task]]:
    """The tasks of every context, in their order."""
    contexts: dict[str, list[Task]] = {}
    for task in tasks:
        contexts.setdefault(context_of(task), []).append(task)
    return contexts


@dataclass(frozen=True)
class Subset:
    """Which share of the contexts is kept.

    Contexts are ranked, within their category, by a hash of the seed and their id: no order of rows and no generator
    enters, and a larger share holds all of a smaller one.

    Args:
        share: of each category's contexts, above 0 and at most 1; rounded to whole contexts, one at least.
        seed: another seed ranks them otherwise.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("data.subset.share", self.share, above=0, most=1, hint="use e.g. 0.1")

    def of(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks of the contexts that are kept, in their order."""
        categories: dict[str, str] = {}  # of each context; where its tasks have several, the first by name
        for task in tasks:
            context, category = context_of(task), str(_metadata(task).get("context_category"))
            categories[context] = min(category, categories.get(context, category))
        strata: dict[str, list[str]] = {}
        for context in sorted(categories, key=lambda one: hashlib.sha256(f"{self.seed}\0{one}".encode()).digest()):
            strata.setdefault(categories[context], []).append(context)
        kept: set[str] = set()
        for members in strata.values():
            kept.update(members[: max(1, math.floor(self.share * len(members) + 0.5))])
        return [task for task in tasks if context_of(task) in kept]


def group_tasks(tasks: Sequence[Task], batch_size: int) -> list[list[Task]]:
    """Groups of at most ``batch_size`` tasks that are decoded together.

    Tasks of one context are neighbours, and in one group where they fit into one; a context of more tasks shares
    its groups with no other.

    Groups are formed before they are sharded over ranks, so that no number depends on how many ranks there are.
    """
    groups: list[list[Task]] = []
    open_group: list[Task] = []  # may take up further contexts
    for members in by_context(tasks).values():
        if len(members) > batch_size:
            groups += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
        elif open_group and len(open_group) + len(members) <= batch_size:
            open_group += members
        else:
            open_group = list(members)
            groups.append(open_group)
    return groups


def group_shards(groups: Sequence[Sequence[Task]], ranks: int, *, together: bool = False) -> list[list[int]]:
    """Indices of the groups that each rank decodes, in turn; ``together``: all of a context on the same rank."""
    shards: list[list[int]] = [[] for _ in range(ranks)]
    turn, before = -1, None
    for number, group in enumerate(groups):
        context = context_of(group[0])
        if context != before or not together:
            turn = (turn + 1) % ranks
        shards[turn].append(number)
        before = context_of(group[-1])
    return shards


class ContextShards(DistributedSampler[int]):
    """This rank's groups; a `DistributedSampler`, so that Lightning leaves the sharding to it."""

    def __init__(self, groups: Sequence[Sequence[Task]], shards: Sequence[list[int]], rank: int) -> None:
        super().__init__(groups, num_replicas=len(shards), rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.mine = shards[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self.mine)

    def __len__(self) -> int:
        return len(self.mine)


class TaskData(LicensedData):
    """Base of the data modules of predict and test: a subclass implements `read`.

    Args:
        batch_size: tasks decoded together.
        limit: only the first so many tasks that pass the filter and are in the subset.
        category: keep tasks of these ``metadata.context_category`` values only.
        sub_category: keep tasks of these ``metadata.sub_category`` values only.
        subset: a share of every category's contexts that pass the filter, for development, see `Subset`.
        clbench: whether the rows are CL-bench's, which may be decoded but never adapted to. None: they are, if any
            looks like one and is not the lab's, or the source is named so. Set it to false for rows of your own.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        limit: int | None = None,
        category: Names = None,
        sub_category: Names = None,
        subset: Subset | None = None,
        clbench: bool | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = check_integer("data.batch_size", batch_size)
        self.limit = check_integer("data.limit", limit, optional=True)
        self.subset, self.clbench = subset, clbench
        self.filters = {"category": category, "sub_category": sub_category}

    data_commit: str | None = None  # of a `datasets` id's revision, once it is read

    def read(self) -> list[Task]:
        """All tasks in the order of their source.

        Raises:
            InputError: the source can't be read.
        """
        raise NotImplementedError

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks to decode, in the order of their source."""
        tasks = self.read()
        for argument, names in self.filters.items():
            if names is not None:
                tasks = _keep(tasks, argument, {names} if isinstance(names, str) else set(names))
        if self.subset is not None:
            tasks = self.subset.of(tasks)
        return tasks[: self.limit]

    def rows_used(self) -> Iterator[dict[str, Any]]:
        """See `LicensedData.rows_used`."""
        return (task.row for task in self.tasks)

    @cached_property
    def groups(self) -> list[list[Task]]:
        """The tasks as they are decoded together."""
        return group_tasks(self.tasks, self.batch_size)

    def resolved(self) -> list[str]:
        """What is decoded, in one line."""
        contexts = len(by_context(self.tasks))
        return [f"data: {type(self).__name__}, tasks {len(self.tasks)}, contexts {contexts}, groups {len(self.groups)}"]

    def fingerprint(self) -> str:
        """SHA-256 of everything that reaches the model, and of how it is batched."""
        digest = hashlib.sha256(f"batch_size={self.batch_size}".encode())
        for task in self.tasks:
            digest.update(json.dumps(task, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def shards(self, ranks: int, module: Any) -> list[list[int]]:
        """Which groups each rank decodes with a module.

        Where contexts are adapted to, each goes to one rank. So it does where their prefixes are read once, unless
        some rank would then have a tenth more to do than with groups in turn.
        """
        turns, whole = (group_shards(self.groups, ranks, together=together) for together in (False, True))
        even = all(whole) and max(map(len, whole)) <= MOST_UNEVEN * max(map(len, turns))
        together = getattr(module, "ttt", None) is not None or (getattr(module, "reuse_prefix", False) and even)
        return whole if together else turns

    def check_ranks(self, ranks: int, *, together: bool = False) -> None:
        """Raises InputError where there is too little for all ranks: some would have nothing to do."""
        shards = sum(map(bool, group_shards(self.groups, ranks, together=together)))
        if shards < ranks:
            what = f"one per group of {self.batch_size} tasks"
            raise InputError(
                "trainer.devices",
                expected=f"at most {shards} ranks, {'one per adapted context' if together else what}",
                received=f"{ranks} ranks for {len(self.tasks)} tasks",
                hint="use fewer devices or a smaller data.batch_size",
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Tasks are text; nothing moves."""
        return batch

    def predict_dataloader(self) -> DataLoader[Any]:
        """Yields one of this rank's groups (a list of `Task`) at a time."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        module = self.trainer and self.trainer.lightning_module
        self.check_ranks(ranks, together=getattr(module, "ttt", None) is not None)
        mine = ContextShards(self.groups, self.shards(ranks, module), rank)
        return DataLoader(self.groups, batch_size=None, sampler=mine)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader


def tasks_by_context(data: Any, wanted_by: str) -> dict[str, list[Task]]:
    """The tasks of every context of a run's datamodule, which must be a `TaskData`; ``wanted_by``: what needs them."""
    if not isinstance(data, TaskData):
        raise InputError(
            "data",
            expected=f"a TaskData, for {wanted_by}",
            received=type(data).__name__ if data is not None else "nothing",
            hint=f"use a datamodule such as ContextsData, or leave out {wanted_by}",
        )
    return by_context(data.tasks)


def _keep(tasks: list[Task], argument: str, wanted: set[str]) -> list[Task]:
    key = "context_category" if argument == "category" else argument
    found = {str(_metadata(task).get(key)) for task in tasks}
    if missing := wanted - found:
        raise InputError(
            f"data.{argument}",
            expected=f"one of {', '.join(sorted(found))}",
            received=", ".join(sorted(missing)),
            hint="use a value that the data has",
        )
    return [task for task in tasks if _metadata(task).get(key) in wanted]
