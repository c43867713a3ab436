"""`GroupDecoder`: decodes one group of tasks with every arm, and makes its rows. It knows nothing of Lightning."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dgd_lightning.data.tasks import by_context
from dgd_lightning.decode.call import Call, Progress
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.draft.checkpoint import Adapter
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Method
from dgd_lightning.modules.adaptation import ContextAdapter, OnAdapt, SavedAdapters
from dgd_lightning.modules.arms import Arm, control_of, joined, leaves_out_context, row_seed, with_prompts
from dgd_lightning.modules.prompts import PrefixStore, Prompts
from dgd_lightning.modules.rows import DivergenceSettings, divergence_record, prediction_row
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import DecodeOutput, Task

TooLong = Literal["error", "skip", "truncate_left"]
ONLINE_STEPS = 2  # per round of an arm that goes on adapting
WARMUP_PROMPT, WARMUP_TOKENS = 64, 8  # tokens; enough to load kernels and fill allocators before the first timing


@dataclass(frozen=True)
class GroupSettings:
    """What holds for all groups of a run; see `Decoding` for what each setting means."""

    max_new_tokens: int
    too_long: TooLong
    stop_token_ids: list[int] | None
    stop_strings: list[str] | None
    seed: int
    join_arms: bool
    divergence: DivergenceSettings | None


@dataclass
class GroupDecoder:
    """Every arm of a run, ready to decode."""

    pair: Pair
    arms: Sequence[Arm]  # in the order of the rows
    methods: dict[str, Method]  # the arms' methods with their second models, by arm name
    prompts: Prompts
    prefixes: PrefixStore
    settings: GroupSettings
    adapt: ContextAdapter | SavedAdapters | None  # None where no arm adapts
    on_note: Callable[[str], None]  # called with what a user should know
    on_progress: Callable[[str, Progress], None] | None = None
    on_adapt: OnAdapt | None = None
    matched: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # what is known of null controls, by arm

    def __post_init__(self) -> None:
        self.together = joined(self.arms, self.settings.join_arms)
        self.control_of = control_of(self.arms)

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse prompts that are too long, or of which nothing is left without context, before hours are spent."""
        bare = [name for name, method in self.methods.items() if leaves_out_context(method)]
        for task in tasks:
            if self.settings.too_long == "error":
                self.prompts.check_fit(task)
            try:
                if bare:
                    self.prompts.bare(task)
            except InputError as error:
                raise error.named(f"{error.argument}, readout WithoutContext of arm {', '.join(bare)}") from error

    def warm_up(self, task: Task) -> None:
        """Decode a few tokens, so that no arm's first timing pays for kernels and allocators."""
        prompt = self.prompts.of(task)[-min(WARMUP_PROMPT, self.prompts.limit) :]
        report, self.on_progress = self.on_progress, None  # no task's tokens, so nothing to show
        tokens = min(WARMUP_TOKENS, self.settings.max_new_tokens)
        for arms in self.together:
            self._decode(arms, self._ready(arms, [task]), [prompt], Call(tokens, seed=[0], names=[named(task, arms)]))
        self.on_progress = report

    def rows(self, tasks: list[Task], turn: int = 0, size: int | None = None) -> list[dict[str, Any]]:
        """Rows of a group, one per task and arm.

        Where memory does not hold the group it is halved, for all arms alike, until it does; the rows say so.

        Args:
            turn: arms take turns at being first, for fair timing.
            size: tasks to decode together, as rows of this group that are there already have it; None: all of them.
        """
        size = min(size or len(tasks), len(tasks))
        while True:
            try:
                parts = [tasks[at : at + size] for at in range(0, len(tasks), size)]
                together = None if size == len(tasks) else size
                return [row for part in parts for row in self._part(part, turn, together)]
            except torch.OutOfMemoryError as error:
                why = f"{error}"[:200]
            # Here, not above: what was caught holds on to the tensors of the batch that failed.
            self.prefixes.keep_only([])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                raise InputError(
                    f"task {tasks[0].idx}",
                    expected="a prompt that fits the device's memory with every arm",
                    received=why,
                    hint="use a larger device, model.device_map: auto, fewer new tokens, or model.join_arms: false",
                )
            size = (size + 1) // 2
            self.on_note(f"out of memory with {len(tasks)} tasks together: going on with {size}, for all arms alike")

    def _part(self, tasks: list[Task], turn: int, tasks_together: int | None) -> list[dict[str, Any]]:
        # an adapter belongs to one context: without adapters, one part is enough
        members = by_context(tasks) if self.adapt else {"": tasks}
        order = self.together if turn % 2 == 0 else self.together[::-1]
        return [row for name, own in members.items() for row in self._rows(name, own, order, tasks_together)]

    def _rows(
        self, context: str, tasks: list[Task], order: list[list[Arm]], tasks_together: int | None
    ) -> list[dict[str, Any]]:
        """Rows of tasks that are decoded together; of one context where there are adapters."""
        prompts, limit = [self.prompts.of(task) for task in tasks], self.prompts.limit
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= limit or self.settings.too_long == "truncate_left"]
        fitting, kept = [tasks[i] for i in fits], [prompts[i][-limit:] for i in fits]
        adapted = None
        if fits and self.adapt is not None and any(arm.ttt for arms in order for arm in arms):
            self.prefixes.keep_only([context])  # those of other contexts make room for the adaptation
            adapted = self.adapt(context, lambda: self.prompts.of_context(context), self.on_adapt, self.prefixes)
        stored = self.prefixes.of(fitting, kept, [len(prompts[i]) <= limit for i in fits])
        known, rows = dict(zip(fits, stored.known, strict=True)), []
        for arms in order:
            first = arms[0]  # what is asked of it holds for all
            adapter = adapted.adapter if adapted is not None and first.ttt else None
            methods = self._ready(arms, fitting)
            outputs: list[list[DecodeOutput]] = [[] for _ in arms]
            if fits:
                online = None
                if first.online_every is not None and isinstance(
                    self.adapt, ContextAdapter
                ):  # puts its adapter in itself
                    online = OnlineTTT(first.online_every, replace(self.adapt.config, steps=ONLINE_STEPS), adapter)
                seeds = [row_seed(self.settings.seed, task.idx, first) for task in fitting]
                new = self.settings.max_new_tokens
                names = [named(task, arms) for task in fitting]
                call = Call(new, seed=seeds, prefixes=stored.prefixes, cycle_hook=online, names=names)
                with nullcontext() if adapter is None or online is not None else self.pair.adapter(adapter):
                    outputs = self._decode(arms, methods, kept, call)
                self.prefixes.count(kept, stored, outputs[0][0].trace.prefill_seconds)
            for arm, method, own in zip(arms, methods, outputs, strict=True):
                by_index = dict(zip(fits, own, strict=True))
                bare = leaves_out_context(self.methods[arm.name])
                for i, task in enumerate(tasks):
                    row = prediction_row(
                        arm,
                        task,
                        prompts[i],
                        by_index.get(i),
                        pair=self.pair,
                        limit=limit,
                        stop_strings=self.settings.stop_strings,
                        prefix_tokens=known.get(i, 0),
                        prefix_seconds=stored.seconds if arms is order[0] else 0.0,  # once, by the arms that waited
                        without_context=self.prompts.bare(task) if bare and i in by_index else None,
                        adapted=adapted if arm.ttt else None,
                        joined_with=[other.name for other in arms if other is not arm],
                        control_of=self.control_of.get(arm.name),
                        tasks_together=tasks_together,
                    )
                    if arm.name in self.matched:
                        row["dgd"]["matched"] = {
                            name: value for name, value in self.matched[arm.name].items() if name != "settings"
                        }
                    self._compare(row["dgd"], arm, method, task, adapter)
                    rows.append(row)
        return rows

    def _ready(self, arms: Sequence[Arm], tasks: Sequence[Task]) -> list[Method]:
        """The arms' methods with the prompts that their readouts read instead of these tasks' own."""
        methods = [self.methods[arm.name] for arm in arms]
        if not any(map(leaves_out_context, methods)):
            return methods
        return with_prompts(methods, [self.prompts.bare(task) for task in tasks])

    def _compare(self, record: dict[str, Any], arm: Arm, method: Method, task: Task, adapter: Adapter | None) -> None:
        """Adds ``divergence`` to an answered row. What an arm learned while decoding is gone: its start is compared."""
        settings = self.settings.divergence
        if settings is None or "output_ids" not in record or (settings.guided_only and not method.blends):
            return
        prompt, answer = torch.tensor(record["prompt_ids"]), torch.tensor(record["output_ids"])
        (alone,) = self._ready([arm], [task])
        with nullcontext() if adapter is None else self.pair.adapter(adapter):
            record["divergence"] = divergence_record(
                self.pair, alone.guidance_of(record), prompt, answer, settings, named(task, [arm])
            )

    def _decode(
        self, arms: Sequence[Arm], methods: Sequence[Method], prompts: list[Tensor], call: Call
    ) -> list[list[DecodeOutput]]:
        """Outputs of each of the arms, which are decoded in one batch."""
        report, name = self.on_progress, label(arms)
        if report is not None:  # a long prefill is announced: the decoders report after it only
            report(name, Progress(0, 0, len(prompts), len(prompts)))
        call = call._replace(
            sampling=sampling_params(**arms[0].sampling()),
            stop_token_ids=self.settings.stop_token_ids,
            stop_strings=self.settings.stop_strings,
            on_progress=partial(report, name) if report else None,
        )
        try:
            if len(methods) == 1:
                outputs = [methods[0].generate(self.pair, prompts, call)]
            else:
                outputs = methods[0].generate_together(self.pair, prompts, methods, call)
        except InputError as error:
            if error.argument.startswith("readout"):
                raise error.named(
                    f"model.arms[{', '.join(arm.name for arm in arms)}].method.{error.argument}"
                ) from error
            if not error.argument.startswith("prefixes"):
                raise
            raise InputError(
                f"model.arms[{arms[0].name}].method",
                expected="a method whose block(pair) and layers(pair) name the layers that it reads",
                received=f"one that reads others: {error.received}",
                hint="let block(pair) return K where it drafts, or set model.reuse_prefix: false",
            ) from error
        for arm, own in zip(arms, outputs, strict=True):
            if not isinstance(own, list) or len(own) != len(prompts) or not all(len(one.tokens) for one in own):
                raise InputError(
                    f"model.arms[{arm.name}].method",
                    expected=f"a generate() that gives a list of {len(prompts)} outputs with tokens, one per prompt",
                    received=f"{len(own)} of them" if isinstance(own, list) else repr(own)[:80],
                    hint="see docs/extending.md",
                )
        return outputs


def label(arms: Sequence[Arm]) -> str:
    """Arms that are decoded in one batch, for people."""
    return arms[0].name if len(arms) == 1 else f"{len(arms)} arms from {arms[0].name}"


def named(task: Task, arms: Sequence[Arm]) -> str:
    """What a task's prompt is called in errors of its decoding."""
    return f"task {task.idx} ({label(arms)})"
