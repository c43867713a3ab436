"""The prompts of a run's tasks, whole and without contexts; what those of a context begin with is read once."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.data.chat import prompt_ids, prompt_text
from dgd_lightning.data.one_context import common_prefix
from dgd_lightning.data.tasks import context_of
from dgd_lightning.data.without_context import without_context
from dgd_lightning.decode.call import check_prompt
from dgd_lightning.decode.prefix_cache import PrefixCache, make_prefix_cache
from dgd_lightning.errors import InputError
from dgd_lightning.modules.pair_source import room_before
from dgd_lightning.pair import Pair
from dgd_lightning.types import Task

SHORTEST = 16  # tokens: what chat templates begin with is not worth a forward of its own


def prompt_of(pair: Pair, task: Task, *, enable_thinking: bool) -> Tensor:
    """Token ids [S] of a task's prompt, none of which is beyond the target's vocabulary."""
    ids = prompt_ids(pair.tokenizer, task, enable_thinking=enable_thinking)
    return check_prompt(f"task {task.idx}", ids, pair.target.vocab_size)


@dataclass(frozen=True)
class Prompts:
    """Token ids of tasks."""

    pair: Pair  # has a tokenizer
    contexts: Mapping[str, list[Task]]  # all tasks by context; empty where nothing is asked of contexts
    max_new_tokens: int  # must fit behind every prompt
    enable_thinking: bool

    @property
    def limit(self) -> int:
        """Longest prompt, in tokens."""
        return room_before(self.pair.target, "model.max_new_tokens", self.max_new_tokens)

    def of(self, task: Task) -> Tensor:
        """[S]"""
        return prompt_of(self.pair, task, enable_thinking=self.enable_thinking)

    def of_context(self, context: str) -> list[Tensor]:
        """Prompts of all tasks of a context that fit: a prompt cut on the left begins with something else."""
        prompts = [self.of(task) for task in self.contexts[context]]
        return [prompt for prompt in prompts if len(prompt) <= self.limit] or [prompts[0][:0]]

    def bare(self, task: Task) -> Tensor:
        """[S'], the prompt without the context; cut on the left where it does not fit."""
        others = [other for other in self.contexts[context_of(task)] if other.idx != task.idx]
        return self.of(without_context(task, others))[-self.limit :]

    def check_fit(self, task: Task) -> None:
        """Raises InputError for a prompt that does not fit. A token is at least a byte, so few texts need encoding."""
        text = prompt_text(self.pair.tokenizer, task, enable_thinking=self.enable_thinking)
        if len(text.encode()) < self.limit:
            return
        if (length := len(self.of(task))) > self.limit:
            raise InputError(
                f"task {task.idx}",
                expected=f"at most {self.limit} prompt tokens ({self.max_new_tokens} new ones must fit too)",
                received=length,
                hint="set model.too_long to skip or truncate_left, or use a target with a longer context",
            )


@dataclass
class Reads:
    """Prompt tokens of a run, counted without padding."""

    prompts: int = 0  # of all prompts, once per decoding of them
    read: int = 0  # by the target: prefixes, and what prompts have behind them
    seconds: float = 0.0  # of all ranks together

    def summary(self) -> str:
        """In words."""
        text = f"{self.read:,} prompt tokens"
        if self.seconds:
            text += f" in {self.seconds:,.1f} s ({self.read / self.seconds:,.0f} tokens/s per device)"
        if self.read == self.prompts:
            return text
        return f"{text}; {self.prompts:,} without model.reuse_prefix ({1 - self.read / self.prompts:.0%} saved)"


class StoredPrefixes(NamedTuple):
    """What of a group's prompts has been read."""

    prefixes: list[PrefixCache | None]  # of each prompt
    seconds: float  # spent on reading those that were not there yet

    @property
    def known(self) -> list[int]:
        """Tokens of each prompt that are read already."""
        return [0 if prefix is None else len(prefix.ids) for prefix in self.prefixes]


@dataclass
class PrefixStore:
    """Prefix caches of the contexts whose tasks are decoded now; those of other contexts are let go.

    A context's prefix is what the prompts of all tasks that the run has of it begin with, so it does not depend on
    ranks, or on where a run was killed. A context with a single task has none.
    """

    pair: Pair  # whose target reads
    prompts: Prompts
    contexts: Mapping[str, list[Task]]  # all tasks; none where nothing is reused
    layer_ids: tuple[int, ...]  # layers that one of the arms needs the states of

    def __post_init__(self) -> None:
        self.contexts = {name: tasks for name, tasks in self.contexts.items() if len(tasks) > 1}
        self.lengths: dict[str, int] = {}  # of the contexts' prefixes, once they were asked for
        self.sizes: dict[str, int] = {}  # tokens of the tasks' prompts, likewise
        self.kept: dict[str, PrefixCache] = {}
        self.reads = Reads()  # of this rank

    def length(self, context: str) -> int:
        """Tokens that the prompts of a context's tasks begin with alike; 0 where it is not worth a forward."""
        if context not in self.lengths:
            tasks = self.contexts.get(context, [])
            prompts = [self.prompts.of(task) for task in tasks]
            self.sizes.update({task.idx: len(prompt) for task, prompt in zip(tasks, prompts, strict=True)})
            prompts = [prompt for prompt in prompts if len(prompt) <= self.prompts.limit]  # others are cut on the left
            same = 0
            if len(prompts) > 1:  # the shortest goes on behind it
                same = min(len(common_prefix(prompts)), min(map(len, prompts)) - 1)
            self.lengths[context] = same if same >= SHORTEST else 0
        return self.lengths[context]

    def keep_only(self, contexts: Sequence[str | None]) -> None:
        """Let the prefixes of all other contexts go."""
        self.kept = {context: prefix for context, prefix in self.kept.items() if context in contexts}

    def take(self, context: str, prefix: PrefixCache) -> None:
        """Keep a context's prefix that something else has read: at least these layers, and as many tokens."""
        length = self.length(context)
        if 0 < length <= len(prefix.ids):
            features = None if prefix.features is None else prefix.features[:, :length]
            self.kept[context] = prefix._replace(ids=prefix.ids[:length], features=features)
            self.reads.read += length

    def of(self, tasks: Sequence[Task], prompts: Sequence[Tensor], whole: Sequence[bool]) -> StoredPrefixes:
        """The prefixes of these tasks' prompts, of which some are not whole but cut; what is not there yet is read."""
        wanted = [
            context if uncut and self.length(context) else None
            for context, uncut in zip(map(context_of, tasks), whole, strict=True)
        ]
        self.keep_only(wanted)
        began, seconds = time.perf_counter(), 0.0
        for context, prompt in zip(wanted, prompts, strict=True):
            if context is not None and context not in self.kept:
                ids = prompt[: self.length(context)]
                self.kept[context] = make_prefix_cache(self.pair.target, ids, self.layer_ids)
                self.reads.read += len(ids)
                if self.pair.target.device.type == "cuda":
                    torch.cuda.synchronize(self.pair.target.device)
                seconds = time.perf_counter() - began
        self.reads.seconds += seconds
        return StoredPrefixes([None if context is None else self.kept[context] for context in wanted], seconds)

    def count(self, prompts: Sequence[Tensor], stored: StoredPrefixes, seconds: float) -> None:
        """Count the prompts of a group that one batch of arms has read, and the seconds of its prefill."""
        total = sum(map(len, prompts))
        self.reads.prompts += total
        self.reads.read += total - sum(stored.known)
        self.reads.seconds += seconds

    def ahead(
        self,
        groups: Sequence[Sequence[Task]],
        shards: Sequence[Sequence[int]],  # numbers of groups of each rank
        readings: int,  # batches of arms, each of which reads every prompt
        *,
        cut: bool,  # prompts that are too long are cut on the left; else they are skipped
    ) -> Reads:
        """What a run over these groups will read on all ranks."""
        reads = Reads()
        for shard in shards:
            before: set[str] = set()
            for group in (groups[number] for number in shard):
                now: set[str] = set()
                for task in group:
                    known = self.length(context_of(task))
                    length = self.sizes.get(task.idx) or len(self.prompts.of(task))
                    if length > self.prompts.limit:
                        length, known = self.prompts.limit if cut else 0, 0
                    if known:
                        now.add(context_of(task))
                    reads.prompts += length * readings
                    reads.read += (length - known) * readings
                reads.read += sum(map(self.length, now - before))
                before = now
        return reads
