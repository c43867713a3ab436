"""`Decoding`: decodes every group of tasks with every arm; one row per task and arm (`dgd predict`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.text import Text
from torch import Tensor

from dgd_lightning.data.tasks import TaskData, context_of, tasks_by_context
from dgd_lightning.decode.engine import Progress
from dgd_lightning.decode.readouts import Readout
from dgd_lightning.draft.adapter import Adapter
from dgd_lightning.errors import InputError
from dgd_lightning.modules.adaptation import ADAPTERS, Adapted, ContextAdapter, OnAdapt, contexts_to_adapt
from dgd_lightning.modules.arm_checks import check_arms, check_block_sizes, check_ttt
from dgd_lightning.modules.arms import Arm, row_seed
from dgd_lightning.modules.decoders import decode, joined
from dgd_lightning.modules.divergence import DivergenceSettings, divergence_record
from dgd_lightning.modules.pairing import control_of
from dgd_lightning.modules.prefixes import PrefixStore, Reads, StoredPrefixes, layers_of
from dgd_lightning.modules.prompts import Prompts
from dgd_lightning.modules.readouts import (
    Source,
    leaves_out,
    load_models,
    models_fingerprint,
    pinned_models,
    ready_readouts,
    with_prompts,
)
from dgd_lightning.modules.rows import prediction_row
from dgd_lightning.modules.sources import PairSources
from dgd_lightning.pair import Pair, load_pair
from dgd_lightning.target.load import bundled
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import DecodeOutput, Task

TooLong = Literal["error", "skip", "truncate_left"]
ONLINE_STEPS = 2  # per round of an arm that goes on adapting
WARMUP_PROMPT, WARMUP_TOKENS = 64, 8  # tokens; enough to load kernels and fill allocators before the first timing


class Decoding(PairSources, LightningModule):
    """Decode tasks with a target and its draft.

    Args:
        target: folder or Hub id of the target; ``lab`` for the bundled one.
        draft: folder or Hub id of the draft; ``lab`` for the bundled one; None where no arm needs one.
        arms: ways to decode; an arm's speed-up refers to the first autoregressive arm that has its temperature, top_k
            and top_p.
        max_new_tokens: limit per task.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` …
        attn_implementation: of the target, ``sdpa`` (default) or ``eager``.
        revision: Hub revision of the target: branch, tag or commit. It is looked up once per run; everything is loaded
            from that commit, and ``provenance.json`` names it.
        draft_revision: Hub revision of the draft.
        device_map: spread the target over this process's GPUs (``auto`` or a map of module names); None: one device.
        enable_thinking: passed to the chat template.
        too_long: a prompt that does not fit the target with its new tokens: ``error``; ``skip`` writes a row without an
            answer; ``truncate_left`` drops the prompt's first tokens.
        stop_token_ids: None for the target's own; an empty list for none.
        seed: from which each task's seed is derived, for arms with a temperature.
        warmup: decode a few tokens before the first timing.
        cpu_threads: threads that torch uses on a CPU; None leaves torch's choice. Small models run fastest on one.
        ttt: adapt the draft to every context (what the prompts of its tasks begin with) before its tasks are decoded by
            the arms that have ``ttt: true``; None adapts nothing.
        save_adapters: keep every context's adapter in the run folder, ``adapters/<context id>/``, in PEFT's format.
        accept_clbench_license: you have obtained permission to adapt to CL-bench's contexts, which its licence forbids.
        join_arms: guided arms that differ in nothing but β, readout, space, constraints and schedule are one batch:
            prompts are read once for all, and so are the weights. Answers are the same up to rounding; seconds are
            those of the whole batch, so these arms have no tokens/s of their own.
        reuse_prefix: what the prompts of a context's tasks begin with alike is read once for all its tasks and arms,
            and copied; answers are the same up to rounding. It is kept on the device beside the batch: keys, values and
            tapped states of the contexts that are being decoded. Second models, prompts without context, ranking,
            adaptation and ``divergence`` read whole prompts as before.
        divergence: record at every token how target and readout differ and what guidance changed, ``dgd.divergence`` of
            the rows; None records nothing.
    """

    def __init__(
        self,
        target: str,
        draft: str | None,
        arms: list[Arm],
        max_new_tokens: int = 512,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        draft_revision: str | None = None,
        device_map: str | dict[str, int | str] | None = None,
        enable_thinking: bool = False,
        too_long: TooLong = "error",
        stop_token_ids: list[int] | None = None,
        seed: int = 0,
        warmup: bool = True,
        cpu_threads: int | None = None,
        ttt: TTTConfig | None = None,
        save_adapters: bool = True,
        accept_clbench_license: bool = False,
        join_arms: bool = False,
        divergence: DivergenceSettings | None = None,
        reuse_prefix: bool = True,
    ) -> None:
        super().__init__()
        if cpu_threads is not None and cpu_threads < 1:
            raise InputError(
                "model.cpu_threads", expected="a positive integer or null", received=cpu_threads, hint="use 1 or more"
            )
        self.cpu_threads = cpu_threads
        check_arms(arms, draft)
        check_ttt(arms, ttt is not None)
        self.ttt, self.save_adapters, self.accept_clbench_license = ttt, save_adapters, accept_clbench_license
        self.adapt: ContextAdapter | None = None
        if max_new_tokens < 1:
            raise InputError(
                "model.max_new_tokens", expected="a positive integer", received=max_new_tokens, hint="use 1 or more"
            )
        self.target_source, self.draft_source = bundled(target, "target"), draft and bundled(draft, "draft")
        self.arms, self.max_new_tokens, self.dtype_name = arms, max_new_tokens, dtype
        self.control_of = control_of(arms)
        self.revision, self.draft_revision = revision, draft_revision
        self.attn_implementation, self.device_map = attn_implementation, device_map
        self.enable_thinking, self.too_long, self.stop_token_ids = enable_thinking, too_long, stop_token_ids
        self.seed, self.warmup, self.join_arms, self.divergence = seed, warmup, join_arms, divergence
        self.reuse_prefix = reuse_prefix
        self.second_models: dict[Source, str | None] | None = None  # of readouts, with their commits
        self.readouts: dict[str, Readout] = {}  # of arms that blend, with their second models
        self.pair: Pair | None = None  # a plain attribute: Lightning neither moves nor saves it
        self.contexts: dict[str, list[Task]] = {}  # tasks by context, where something is asked of it
        self.done: set[tuple[str, str]] = set()  # (idx, arm) of rows that a resumed run has already
        self.on_progress: Callable[[str, Progress], None] | None = None  # set by a progress bar
        self.on_adapt: OnAdapt | None = None  # so is this
        self.summary_tables: list[Any] = []  # rich renderables that callbacks add; printed at the end of the run

    @property
    def row_names(self) -> list[str]:
        """Names of the rows that every task gets."""
        return [arm.name for arm in self.arms]

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the model that can change a row, to be hashed; revisions count by their commits."""
        return {
            **super().fingerprint(),
            "second_models": models_fingerprint(self._pin_models()),
            "arms": [arm.settings() for arm in self.arms],
            "settings": [
                self.max_new_tokens,
                self.dtype_name,
                self.attn_implementation,
                self.enable_thinking,
                self.too_long,
                self.stop_token_ids,
                self.seed,
            ],
            "ttt": self.ttt and self.ttt.fingerprint(),
            # Without them: the hash of old runs.
            **({"reuse_prefix": True} if self.reuse_prefix else {}),
            **({"join_arms": True} if self.join_arms else {}),
            **({"divergence": asdict(self.divergence)} if self.divergence else {}),
        }

    def _pin_models(self) -> dict[Source, str | None]:
        """The commits of the readouts' second models, looked up when first asked and kept."""
        if self.second_models is None:
            self.second_models = pinned_models(self.arms)
        return self.second_models

    def setup(self, stage: str) -> None:
        """Loads the pair onto this rank's device.

        Raises:
            InputError: the pair can't be loaded, or the trainer's settings do not suit decoding.
        """
        if stage != "predict":
            raise InputError("subcommand", expected="predict", received=stage, hint="run `dgd predict`")
        if self.trainer.precision != "32-true":
            raise InputError(
                "trainer.precision",
                expected="the default",
                received=self.trainer.precision,
                hint="set model.dtype instead: weights are loaded in it",
            )
        if self.ttt is not None:
            self.contexts = contexts_to_adapt(
                getattr(self.trainer, "datamodule", None),
                accepted=self.accept_clbench_license,
                inference_mode=self.trainer.predict_loop.inference_mode,
            )
        elif any(leaves_out(arm.readout) for arm in self.arms):
            self.contexts = tasks_by_context(getattr(self.trainer, "datamodule", None), "a readout without context")
        elif self.reuse_prefix and isinstance(data := getattr(self.trainer, "datamodule", None), TaskData):
            self.contexts = tasks_by_context(data, "model.reuse_prefix")
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        if self.pair is None:
            # a branch may move between two ranks' look-ups: rank 0's counts, which the run folder names
            commits = self.commits = self.trainer.strategy.broadcast(self.pin())
            self.pair = load_pair(
                self.target_source,
                self.draft_source,
                dtype=self.dtype_name,
                device=self._placement(),
                attn_implementation=self.attn_implementation,
                revision=commits.target,
                draft_revision=commits.draft,
            )
            models = self.second_models = self.trainer.strategy.broadcast(self._pin_models())
            self.readouts = ready_readouts(self.arms, load_models(models, self.pair.target))
        if self.pair.draft is not None:
            check_block_sizes(self.arms, self.pair.draft.config.block_size)
        if self.enable_thinking and self.pair.draft is not None and _model_type(self.pair).startswith("qwen3"):
            rank_zero_warn(
                "enable_thinking is on: the published Qwen3 drafts were trained without thinking; τ will drop"
            )
        self.prompts = Prompts(
            self.pair, self.contexts, max_new_tokens=self.max_new_tokens, enable_thinking=self.enable_thinking
        )
        layers = layers_of(self._loaded(), self.arms, self.readouts)
        self.prefixes = PrefixStore(self._loaded(), self.prompts, self.contexts if self.reuse_prefix else {}, layers)
        if self.ttt is not None:
            log_dir = self.trainer.log_dir
            folder = Path(log_dir, ADAPTERS) if self.save_adapters and log_dir is not None else None
            self.adapt = ContextAdapter(self._loaded(), self.ttt, folder, enable_thinking=self.enable_thinking)

    def _placement(self) -> Any:
        """This rank's device, or how the target is spread over all devices of the only rank."""
        if self.device_map is None:
            return self.trainer.strategy.root_device
        if self.trainer.world_size > 1:
            raise InputError(
                "model.device_map",
                expected="null with several ranks: each holds the whole target on a device of its own",
                received=f"{self.device_map!r} with {self.trainer.world_size} ranks",
                hint="leave it out, or set trainer.devices: 1",
            )
        return "balanced" if self.device_map == "auto" else self.device_map  # load_target's auto is one device

    def on_predict_start(self) -> None:
        """Finds prompts that are too long before hours are spent on the others, says what is read, and warms up."""
        groups = getattr(self.trainer.datamodule, "groups", [])  # type: ignore[attr-defined]
        for task in (task for group in groups for task in group):
            if self.too_long == "error":
                self.prompts.check_fit(task)
            if any(leaves_out(arm.readout) for arm in self.arms):
                self.prompts.without_context(task)
        if self.prefixes.contexts:
            shards = self.trainer.datamodule.shards(self.trainer.world_size, self)  # type: ignore[attr-defined]
            readings = len(joined(self.arms, self.join_arms))
            reads = self.prefixes.ahead(groups, shards, readings, cut=self.too_long == "truncate_left")
            if self.trainer.is_global_zero and reads.read < reads.prompts:
                print(f"ahead: {reads.words()}", flush=True)
        if self.warmup and not all(map(self._is_done, groups)):
            prompt = self.prompts.of(groups[0][0])[-min(WARMUP_PROMPT, self.prompts.limit) :]
            report, self.on_progress = self.on_progress, None  # no task's tokens, so nothing to show
            for arms in joined(self.arms, self.join_arms):
                self._decode([prompt], self._ready(arms, groups[0][:1]), min(WARMUP_TOKENS, self.max_new_tokens), [0])
            self.on_progress = report

    def on_predict_epoch_end(self) -> None:
        """Says what was read on all ranks, in this session."""
        own = torch.tensor(self.prefixes.reads, dtype=torch.float64, device=self.trainer.strategy.root_device)
        prompts, read, seconds = self.trainer.strategy.reduce(own, reduce_op="sum").tolist()
        if self.trainer.is_global_zero and read:
            self.summary_tables.append(Text(f"prefill: {Reads(int(prompts), int(read), seconds).words()}"))

    def _is_done(self, group: list[Task]) -> bool:
        return all((task.idx, arm.name) in self.done for task in group for arm in self.arms)

    def predict_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:
        """Rows of a group, one per task and arm; none where a resumed run has them all.

        A group is decoded as a whole even if only some rows are missing: rows share forwards, so numbers could
        otherwise differ in the last bit.
        """
        if self._is_done(batch):
            return []
        together = joined(self.arms, self.join_arms)
        turn = together if batch_idx % 2 == 0 else together[::-1]  # fair timing: nobody is always first
        members: dict[str, list[Task]] = {}  # an adapter belongs to one context: without adapters, one part is enough
        for task in batch:
            members.setdefault(context_of(task) if self.adapt else "", []).append(task)
        return [row for context, tasks in members.items() for row in self._rows(context, tasks, turn)]

    def _rows(self, context: str, tasks: list[Task], together: list[list[Arm]]) -> list[dict[str, Any]]:
        """Rows of tasks that are decoded together; of one context where there are adapters."""
        prompts, limit = [self.prompts.of(task) for task in tasks], self.prompts.limit
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= limit or self.too_long == "truncate_left"]
        wanted = self.adapt is not None and fits and any(arm.ttt for arms in together for arm in arms)
        adapted = None
        if self.adapt and wanted:
            adapted = self.adapt(context, lambda: self.prompts.of_context(context), self.on_adapt)
        kept = [prompts[i][-limit:] for i in fits]
        stored = self._stored([tasks[i] for i in fits], kept, [len(prompts[i]) <= limit for i in fits])
        rows = []
        for arms in together:
            first = arms[0]  # what is asked of it holds for all
            outputs: list[list[DecodeOutput]] = [[] for _ in arms]
            if fits:
                seeds = [row_seed(self.seed, tasks[i].idx, first) for i in fits]
                ready = self._ready(arms, [tasks[i] for i in fits])
                with self._adapter(first, adapted):
                    outputs = self._decode(
                        kept, ready, self.max_new_tokens, seeds, self._online(first, adapted), stored
                    )
                self.prefixes.count(kept, stored, outputs[0][0].trace.prefill_seconds)
            for arm, own in zip(arms, outputs, strict=True):
                by_index, known = dict(zip(fits, own, strict=True)), dict(zip(fits, stored.known, strict=True))
                seconds = stored.seconds if arms is together[0] else 0.0  # told once, by the arms that waited for it
                others = [other.name for other in arms if other is not arm]
                made = [
                    self._row(task, arm, prompts[i], by_index.get(i), known.get(i, 0), seconds, adapted, others)
                    for i, task in enumerate(tasks)
                ]
                if self.divergence is not None and (arm.method == "guided" or not self.divergence.guided_only):
                    self._compare(tasks, made, arm, adapted, self.divergence)
                rows += made
        return rows

    def _row(
        self,
        task: Task,
        arm: Arm,
        prompt: Tensor,
        output: DecodeOutput | None,
        prefix_tokens: int,
        prefix_seconds: float,
        adapted: Adapted | None,
        others: list[str],
    ) -> dict[str, Any]:
        bare = self.prompts.bare(task) if output is not None and leaves_out(arm.readout) else None
        return prediction_row(
            task,
            arm,
            output,
            prompt,
            pair=self._loaded(),
            limit=self.prompts.limit,
            adapted=adapted if arm.ttt else None,
            prefix_tokens=prefix_tokens,
            prefix_seconds=prefix_seconds,
            joined_with=others,
            without_context=bare,
            control_of=self.control_of.get(arm.name),
        )

    def _ready(self, arms: list[Arm], tasks: list[Task]) -> list[Arm]:
        """The arms with the readouts that these tasks need; what is one readout stays one."""
        own = {arm.name: self.readouts[arm.name] for arm in arms if arm.blends}
        bare = [self.prompts.bare(task) for task in tasks] if any(map(leaves_out, own.values())) else []
        made = {id(one): with_prompts(one, bare) for one in own.values()}
        return [replace(arm, readout=made[id(own[arm.name])]) if arm.blends else arm for arm in arms]

    def _compare(
        self,
        tasks: list[Task],
        rows: list[dict[str, Any]],
        arm: Arm,
        adapted: Adapted | None,
        settings: DivergenceSettings,
    ) -> None:
        """Adds ``divergence`` to answered rows. What an arm learned while it decoded is gone: its start is compared."""
        kept, pair = _kept(arm, adapted), self._loaded()
        with nullcontext() if kept is None else pair.adapter(kept):
            for task, record in ((task, row["dgd"]) for task, row in zip(tasks, rows, strict=True)):
                if "output_ids" in record:
                    prompt, answer = torch.tensor(record["prompt_ids"]), torch.tensor(record["output_ids"])
                    (ready,) = self._ready([_compared(arm, record)], [task])
                    record["divergence"] = divergence_record(pair, ready, prompt, answer, settings)

    def _adapter(self, arm: Arm, adapted: Adapted | None) -> AbstractContextManager[Any]:
        """The draft as the arm wants it; an arm that goes on adapting puts its adapter in itself."""
        kept = _kept(arm, adapted)
        return nullcontext() if kept is None or arm.online_every is not None else self._loaded().adapter(kept)

    def _online(self, arm: Arm, adapted: Adapted | None) -> OnlineTTT | None:
        if arm.online_every is None or self.ttt is None:
            return None
        return OnlineTTT(arm.online_every, replace(self.ttt, steps=ONLINE_STEPS), _kept(arm, adapted))

    def _stored(self, tasks: list[Task], prompts: list[Tensor], whole: list[bool]) -> StoredPrefixes:
        """Where these prompts go on from."""
        try:
            return self.prefixes.of(tasks, prompts, whole)
        except torch.OutOfMemoryError as error:
            raise InputError(
                "model.reuse_prefix",
                expected="beginnings of contexts that fit the device's memory beside the batch",
                received=f"prompts of up to {max(map(len, prompts))} tokens",
                hint="set it to false, or use a smaller data.batch_size or a larger device",
            ) from error

    def _decode(
        self,
        prompts: list[Tensor],
        arms: list[Arm],
        max_new_tokens: int,
        seeds: list[int],
        online: OnlineTTT | None = None,
        stored: StoredPrefixes | None = None,
    ) -> list[list[DecodeOutput]]:
        """Outputs of each of the arms, which are decoded in one batch."""
        report = self.on_progress
        name = arms[0].name if len(arms) == 1 else f"{len(arms)} arms from {arms[0].name}"
        if report is not None:  # a long prefill is announced: the decoders report after it only
            report(name, Progress(0, 0, len(prompts), len(prompts)))
        try:
            return decode(
                self._loaded(),
                prompts,
                arms,
                max_new_tokens=max_new_tokens,
                stop_token_ids=self.stop_token_ids,
                seed=seeds,
                online=online,
                prefixes=stored and stored.prefixes,
                on_progress=partial(report, name) if report else None,
            )
        except torch.OutOfMemoryError as error:
            raise InputError(
                "data.batch_size",
                expected="groups that fit the device's memory",
                received=f"{len(prompts)} prompts of up to {max(map(len, prompts))} tokens in {len(arms)} arms",
                hint="use a smaller batch_size, or a larger device"
                + (", or model.join_arms: false" if len(arms) > 1 else "")
                + (", or model.reuse_prefix: false" if stored and any(stored.known) else ""),
            ) from error

    def _loaded(self) -> Pair:
        assert self.pair is not None, "setup loads the pair"
        return self.pair


def _kept(arm: Arm, adapted: Adapted | None) -> Adapter | None:
    """The context's adapter where the arm uses it and it is worth using."""
    if not arm.ttt or adapted is None or adapted.result is None or not adapted.result.kept:
        return None
    return adapted.result.adapter


def _compared(arm: Arm, record: dict[str, Any]) -> Arm:
    """The arm that a row's answer is compared as: an answer with a β was decoded as a guided arm does it."""
    if arm.betas is None:
        return arm
    return replace(arm, method="guided", beta=record["answers"][record["chosen"]]["beta"])


def _model_type(pair: Pair) -> str:
    return str(getattr(pair.target.model.config, "model_type", ""))
