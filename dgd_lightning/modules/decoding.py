"""`Decoding`: decodes every group of tasks with every arm; one row per task and arm (`dgd predict`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dgd_lightning.checks import check_integer
from dgd_lightning.data.tasks import TaskData, tasks_by_context
from dgd_lightning.modules.adaptation import ADAPTERS, ContextAdapter, contexts_to_adapt
from dgd_lightning.modules.arms import Arm, check_arms, check_blocks, check_ttt, joined
from dgd_lightning.modules.divergence import DivergenceSettings
from dgd_lightning.modules.group_decoder import GroupDecoder, GroupSettings, TooLong
from dgd_lightning.modules.pair_source import PairSettings, PairSource, check_rows_run
from dgd_lightning.modules.prefix_store import PrefixStore
from dgd_lightning.modules.prompts import Prompts
from dgd_lightning.modules.second_models import (
    Source,
    leaves_out_context,
    load_models,
    loaded_methods,
    models_fingerprint,
    pinned_models,
)
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.types import Summary, Task


class Decoding(LightningModule):
    """Decode tasks with a target and its draft.

    Args:
        target: folder or Hub id of the target; ``lab`` for the bundled one.
        draft: folder or Hub id of the draft; ``lab`` for the bundled one; None where no arm needs one.
        arms: ways to decode; an arm's speed-up refers to the first arm with a baseline method (``Autoregressive``) that
            has its temperature, top_k and top_p.
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
        join_arms: guided arms that differ in nothing but β, readout, space, constraints and schedule share a batch:
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
        check_integer("model.max_new_tokens", max_new_tokens)
        check_arms(arms, draft)
        check_ttt(arms, ttt is not None)
        self.source = PairSource(
            PairSettings(target, draft, dtype, attn_implementation, revision, draft_revision, device_map, cpu_threads)
        )
        self.settings = GroupSettings(max_new_tokens, too_long, stop_token_ids, seed, join_arms, divergence)
        self.arms, self.ttt, self.divergence = arms, ttt, divergence
        self.enable_thinking, self.warmup, self.reuse_prefix = enable_thinking, warmup, reuse_prefix
        self.save_adapters, self.accept_clbench_license = save_adapters, accept_clbench_license
        self.second_models: dict[Source, str | None] | None = None  # of readouts, with their commits
        self.decoder: GroupDecoder | None = None  # a plain attribute: Lightning neither moves nor saves the pair
        self.done: set[tuple[str, str]] = set()  # (idx, arm) of rows that a resumed run has already
        self.tasks_together: dict[str, int] = {}  # by idx, of rows that were decoded in smaller groups
        self.summary = Summary()

    @property
    def row_names(self) -> list[str]:
        """Names of the rows that every task gets."""
        return [arm.name for arm in self.arms]

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the model that can change a row, to be hashed; revisions count by their commits."""
        settings, source = self.settings, self.source.settings
        return {
            **self.source.fingerprint(),
            "second_models": models_fingerprint(self._pin_models()),
            "arms": [{"name": arm.name, **arm.settings()} for arm in self.arms],
            "settings": [source.dtype, source.attn_implementation, self.enable_thinking, self.reuse_prefix],
            "group_settings": {**settings._asdict(), "divergence": self.divergence and asdict(self.divergence)},
            "ttt": self.ttt and self.ttt.fingerprint(),
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
        check_rows_run(self.trainer, stage, "predict")
        contexts = self._contexts()
        if self.decoder is not None:
            return
        pair = self.source.load(self.trainer)
        models = self.second_models = self.trainer.strategy.broadcast(self._pin_models())
        check_blocks(self.arms, pair)
        model_type = str(getattr(pair.target.model.config, "model_type", ""))
        if self.enable_thinking and pair.draft is not None and model_type.startswith("qwen3"):
            rank_zero_warn(
                "enable_thinking is on: the published Qwen3 drafts were trained without thinking; τ will drop"
            )
        methods = loaded_methods(self.arms, load_models(models, pair.target))
        prompts = Prompts(
            pair, contexts, max_new_tokens=self.settings.max_new_tokens, enable_thinking=self.enable_thinking
        )
        layers = [layer for method in methods.values() for layer in method.layers(pair)]
        if any(arm.online_every is not None for arm in self.arms):
            layers.append(pair.target.num_layers - 1)  # whose states are the labels
        prefixes = PrefixStore(pair, prompts, contexts if self.reuse_prefix else {}, tuple(dict.fromkeys(layers)))
        log_dir = self.trainer.log_dir
        folder = Path(log_dir, ADAPTERS) if self.save_adapters and log_dir is not None else None
        adapt = None
        if self.ttt is not None:
            adapt = ContextAdapter(pair, self.ttt, folder, enable_thinking=self.enable_thinking)
        self.decoder = GroupDecoder(pair, self.arms, methods, prompts, prefixes, self.settings, adapt, self.ttt)
        rank = f"rank {self.global_rank}: " if self.trainer.world_size > 1 else ""
        self.decoder.on_note = lambda text: print(rank + text, flush=True)

    def _contexts(self) -> dict[str, list[Task]]:
        """The tasks of every context, where something is asked of contexts."""
        data = getattr(self.trainer, "datamodule", None)
        if self.ttt is not None:
            inference = self.trainer.predict_loop.inference_mode
            return contexts_to_adapt(data, accepted=self.accept_clbench_license, inference_mode=inference)
        if any(leaves_out_context(arm.method) for arm in self.arms):
            return tasks_by_context(data, "a readout without context")
        return tasks_by_context(data, "model.reuse_prefix") if self.reuse_prefix and isinstance(data, TaskData) else {}

    def on_predict_start(self) -> None:
        """Finds what can't be decoded before hours are spent, says what is to be read, and warms up."""
        decoder, data = self._ready(), self.trainer.datamodule  # type: ignore[attr-defined]
        groups = getattr(data, "groups", [])
        decoder.check([task for group in groups for task in group])
        if decoder.prefixes.contexts and self.trainer.is_global_zero:
            shards = data.shards(self.trainer.world_size, self)
            readings = len(joined(self.arms, self.settings.join_arms))
            cut = self.settings.too_long == "truncate_left"
            reads = decoder.prefixes.ahead(groups, shards, readings, cut=cut)
            if reads.read < reads.prompts:
                print(f"to be read: {reads.summary()}", flush=True)
        if self.warmup and not all(map(self._is_done, groups)):
            decoder.warm_up(groups[0][0])

    def on_predict_end(self) -> None:
        """Says what rank 0 read in this session: no rank waits for another after its last context."""
        reads = self._ready().prefixes.reads
        if self.trainer.is_global_zero and reads.read:
            whose = " (of rank 0)" if self.trainer.world_size > 1 else ""
            self.summary.details.append(f"prefill{whose}: {reads.summary()}")

    def _is_done(self, group: list[Task]) -> bool:
        return all((task.idx, arm.name) in self.done for task in group for arm in self.arms)

    def predict_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:
        """Rows of a group, one per task and arm; none where a resumed run has them all.

        A group is decoded as a whole even if only some rows are missing: rows share forwards, so numbers could
        otherwise differ in the last bit.
        """
        if self._is_done(batch):
            return []
        sizes = [self.tasks_together[task.idx] for task in batch if task.idx in self.tasks_together]
        return self._ready().rows(batch, batch_idx, min(sizes, default=None))

    def _ready(self) -> GroupDecoder:
        assert self.decoder is not None, "setup loads the pair"
        return self.decoder
