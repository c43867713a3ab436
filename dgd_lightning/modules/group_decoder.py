"""`GroupDecoder`: decodes one group of tasks with every arm, and makes its rows. It knows nothing of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.data.tasks import context_of
from dgd_lightning.decode.call import Call, CycleHook, Progress
from dgd_lightning.draft.checkpoint import Adapter
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Method
from dgd_lightning.modules.adaptation import Adapted, ContextAdapter, OnAdapt
from dgd_lightning.modules.arms import Arm, control_of, joined, row_seed
from dgd_lightning.modules.divergence import DivergenceSettings, divergence_record
from dgd_lightning.modules.prefix_store import PrefixStore
from dgd_lightning.modules.prompts import Prompts
from dgd_lightning.modules.rows import Decoded, prediction_row
from dgd_lightning.modules.second_models import leaves_out_context, with_prompts
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import DecodeOutput, Task

TooLong = Literal["error", "skip", "truncate_left"]
ONLINE_STEPS = 2  # per round of an arm that goes on adapting
WARMUP_PROMPT, WARMUP_TOKENS = 64, 8  # tokens; enough to load kernels and fill allocators before the first timing


class GroupSettings(NamedTuple):
    """What holds for all groups of a run; see `Decoding` for what each setting means."""

    max_new_tokens: int
    too_long: TooLong
    stop_token_ids: list[int] | None
    seed: int
    join_arms: bool
    divergence: DivergenceSettings | None


class GroupDecoder:
    """Every arm of a run, ready to decode.

    Args:
        pair: target and draft.
        arms: in the order of the rows.
        methods: the arms' methods with their second models, by arm name.
        prompts: gives the tasks' prompt ids.
        prefixes: gives what prompts of a context have in common.
        settings: of the run.
        adapt: makes a context's adapter; None where no arm adapts.
    """

    def __init__(
        self,
        pair: Pair,
        arms: Sequence[Arm],
        methods: dict[str, Method],
        prompts: Prompts,
        prefixes: PrefixStore,
        settings: GroupSettings,
        adapt: ContextAdapter | None,
        ttt: TTTConfig | None,
    ) -> None:
        self.pair, self.methods, self.prompts, self.prefixes = pair, methods, prompts, prefixes
        self.settings, self.adapt, self.ttt = settings, adapt, ttt
        self.together = joined(arms, settings.join_arms)
        self.control_of = control_of(arms)
        self.on_progress: Callable[[str, Progress], None] | None = None
        self.on_adapt: OnAdapt | None = None
        self.on_note: Callable[[str], None] = lambda text: None  # called with what a user should know

    def check(self, tasks: Sequence[Task]) -> None:
        """Find what can't be decoded before hours are spent on the others.

        Raises:
            InputError: a prompt is too long, or nothing is left of it without its context.
        """
        bare = any(leaves_out_context(method) for method in self.methods.values())
        for task in tasks:
            if self.settings.too_long == "error":
                self.prompts.check_fit(task)
            if bare:
                self.prompts.without_context(task)

    def warm_up(self, task: Task) -> None:
        """Decode a few tokens, so that no arm's first timing pays for kernels and allocators."""
        prompt = self.prompts.of(task)[-min(WARMUP_PROMPT, self.prompts.limit) :]
        report, self.on_progress = self.on_progress, None  # no task's tokens, so nothing to show
        tokens = min(WARMUP_TOKENS, self.settings.max_new_tokens)
        for arms in self.together:
            self._decode(arms, self._ready(arms, [task]), [prompt], Call(tokens, seed=[0]))
        self.on_progress = report

    def rows(self, tasks: list[Task], turn: int = 0, size: int | None = None) -> list[dict[str, Any]]:
        """Rows of a group, one per task and arm.

        Where memory does not hold the group it is halved, for all arms alike, until it does; the rows say so.

        Args:
            turn: arms take turns at being first, for fair timing.
            size: tasks to decode together, as rows of this group that are there already have it; None: all of them.

        Raises:
            InputError: a single task does not fit the device's memory.
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
            self.prefixes.release()
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
        members: dict[str, list[Task]] = {}  # an adapter belongs to one context: without adapters, one part is enough
        for task in tasks:
            members.setdefault(context_of(task) if self.adapt else "", []).append(task)
        order = self.together if turn % 2 == 0 else self.together[::-1]
        return [row for name, own in members.items() for row in self._rows(name, own, order, tasks_together)]

    def _rows(
        self, context: str, tasks: list[Task], order: list[list[Arm]], tasks_together: int | None
    ) -> list[dict[str, Any]]:
        """Rows of tasks that are decoded together; of one context where there are adapters."""
        prompts, limit = [self.prompts.of(task) for task in tasks], self.prompts.limit
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= limit or self.settings.too_long == "truncate_left"]
        fitting = [tasks[i] for i in fits]
        adapted = self._adapted(context) if fits else None
        kept = [prompts[i][-limit:] for i in fits]
        stored = self.prefixes.of(fitting, kept, [len(prompts[i]) <= limit for i in fits])
        known, rows = dict(zip(fits, stored.known, strict=True)), []
        for arms in order:
            first = arms[0]  # what is asked of it holds for all
            methods = self._ready(arms, fitting)
            outputs: list[list[DecodeOutput]] = [[] for _ in arms]
            if fits:
                seeds = [row_seed(self.settings.seed, task.idx, first) for task in fitting]
                call = Call(
                    self.settings.max_new_tokens,
                    seed=seeds,
                    prefixes=stored.prefixes,
                    cycle_hook=self._online(first, adapted),
                )
                with self._adapter(first, adapted):
                    outputs = self._decode(arms, methods, kept, call)
                self.prefixes.count(kept, stored, outputs[0][0].trace.prefill_seconds)
            for arm, method, own in zip(arms, methods, outputs, strict=True):
                by_index = dict(zip(fits, own, strict=True))
                seconds = stored.seconds if arms is order[0] else 0.0  # reported once, by the arms that waited for it
                for i, task in enumerate(tasks):
                    output = by_index.get(i)
                    bare = leaves_out_context(self.methods[arm.name]) and output is not None
                    decoded = Decoded(
                        task, prompts[i], output, known.get(i, 0), seconds, self.prompts.bare(task) if bare else None
                    )
                    row = prediction_row(
                        arm,
                        decoded,
                        pair=self.pair,
                        limit=limit,
                        adapted=adapted if arm.ttt else None,
                        joined_with=[other.name for other in arms if other is not arm],
                        control_of=self.control_of.get(arm.name),
                        tasks_together=tasks_together,
                    )
                    self._compare(row["dgd"], arm, method, adapted, task)
                    rows.append(row)
        return rows

    def _adapted(self, context: str) -> Adapted | None:
        """The context's adaptation, where an arm uses it; prefixes of other contexts make room for it."""
        if self.adapt is None or not any(arm.ttt for arms in self.together for arm in arms):
            return None
        self.prefixes.keep_only([context])
        return self.adapt(context, lambda: self.prompts.of_context(context), self.on_adapt, self.prefixes)

    def _ready(self, arms: Sequence[Arm], tasks: Sequence[Task]) -> list[Method]:
        """The arms' methods with the prompts that their readouts read instead of these tasks' own."""
        methods = [self.methods[arm.name] for arm in arms]
        if not any(map(leaves_out_context, methods)):
            return methods
        return with_prompts(methods, [self.prompts.bare(task) for task in tasks])

    def _compare(self, record: dict[str, Any], arm: Arm, method: Method, adapted: Adapted | None, task: Task) -> None:
        """Adds ``divergence`` to an answered row. What an arm learned while decoding is gone: its start is compared."""
        settings = self.settings.divergence
        if settings is None or "output_ids" not in record or (settings.guided_only and not method.blends):
            return
        kept = _kept(arm, adapted)
        prompt, answer = torch.tensor(record["prompt_ids"]), torch.tensor(record["output_ids"])
        (alone,) = self._ready([arm], [task])
        with nullcontext() if kept is None else self.pair.adapter(kept):
            record["divergence"] = divergence_record(self.pair, alone.guidance_of(record), prompt, answer, settings)

    def _adapter(self, arm: Arm, adapted: Adapted | None) -> AbstractContextManager[Any]:
        """The draft as the arm wants it; an arm that goes on adapting puts its adapter in itself."""
        kept = _kept(arm, adapted)
        return nullcontext() if kept is None or arm.online_every is not None else self.pair.adapter(kept)

    def _online(self, arm: Arm, adapted: Adapted | None) -> CycleHook | None:
        if arm.online_every is None or self.ttt is None:
            return None
        return OnlineTTT(arm.online_every, replace(self.ttt, steps=ONLINE_STEPS), _kept(arm, adapted))

    def _decode(
        self, arms: Sequence[Arm], methods: Sequence[Method], prompts: list[Tensor], call: Call
    ) -> list[list[DecodeOutput]]:
        """Outputs of each of the arms, which are decoded in one batch."""
        report = self.on_progress
        name = arms[0].name if len(arms) == 1 else f"{len(arms)} arms from {arms[0].name}"
        if report is not None:  # a long prefill is announced: the decoders report after it only
            report(name, Progress(0, 0, len(prompts), len(prompts)))
        call = call._replace(
            sampling=arms[0].sampling_params(),
            stop_token_ids=self.settings.stop_token_ids,
            on_progress=partial(report, name) if report else None,
        )
        try:
            if len(methods) == 1:
                outputs = [methods[0].generate(self.pair, prompts, call)]
            else:
                outputs = methods[0].generate_together(self.pair, prompts, methods, call)
        except InputError as error:
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


def _kept(arm: Arm, adapted: Adapted | None) -> Adapter | None:
    """The context's adapter where the arm uses it and it is worth using."""
    if not arm.ttt or adapted is None or adapted.result is None or not adapted.result.kept:
        return None
    return adapted.result.adapter
