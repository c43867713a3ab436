"""`Decoding`: decodes every group of tasks with every arm; one row per task and arm (`dgd predict`)."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dgd_lightning.checks import check_integer
from dgd_lightning.data.licence import check_clbench
from dgd_lightning.data.tasks import TaskData, tasks_by_context
from dgd_lightning.draft.checkpoint import CONFIG
from dgd_lightning.modules.adaptation import SavedAdapters, adapters_root, context_adapter, contexts_to_adapt
from dgd_lightning.modules.arms import (
    Arm,
    Source,
    check_arms,
    check_on_pair,
    check_ttt,
    described,
    leaves_out_context,
    loaded_methods,
    pinned_models,
)
from dgd_lightning.modules.group_decoder import GroupDecoder, GroupSettings, TooLong
from dgd_lightning.modules.matching import MatchControls, in_words, matched_controls, scaled_arms, scaled_methods
from dgd_lightning.modules.pair_source import PairSource, check_rows_run
from dgd_lightning.modules.prompts import PrefixStore, Prompts
from dgd_lightning.modules.rows import DivergenceSettings
from dgd_lightning.pair import source_fingerprint
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
        enable_thinking: passed to the chat template.
        too_long: a prompt that does not fit the target with its new tokens: ``error``; ``skip`` writes a row without an
            answer; ``truncate_left`` drops the prompt's first tokens.
        stop_token_ids: None for the target's own; an empty list for none.
        stop_strings: an answer ends before the first of these texts; None for none.
        seed: from which each task's seed is derived, for arms with a temperature.
        warmup: decode a few tokens before the first timing.
        ttt: adapt the draft to every context (what the prompts of its tasks begin with) before its tasks are decoded by
            the arms that have ``ttt: true``; None adapts nothing.
        adapters: use saved adapters where ``ttt`` would make them: the folder of an earlier run (or its ``adapters/``)
            with one for each context, or one adapter's folder, such as `dgd fit` writes, for all contexts. They are
            checked against the draft.
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
        match_controls: find the scale at which each null control is as strong as what it controls, before anything is
            decoded, and keep it in the run folder; None takes controls as they are. See `MatchControls`.
        pair: see `PairSource`.
    """

    def __init__(
        self,
        target: str,
        draft: str | None,
        arms: list[Arm],
        *,
        max_new_tokens: int = 512,
        enable_thinking: bool = False,
        too_long: TooLong = "error",
        stop_token_ids: list[int] | None = None,
        stop_strings: list[str] | None = None,
        seed: int = 0,
        warmup: bool = True,
        ttt: TTTConfig | None = None,
        adapters: str | None = None,
        save_adapters: bool = True,
        accept_clbench_license: bool = False,
        join_arms: bool = False,
        divergence: DivergenceSettings | None = None,
        reuse_prefix: bool = True,
        match_controls: MatchControls | None = None,
        **pair: Any,
    ) -> None:
        super().__init__()
        check_integer("model.max_new_tokens", max_new_tokens)
        check_arms(arms, draft)
        check_ttt(arms, ttt is not None, adapters is not None)
        self.source = PairSource(target, draft, **pair)
        self.settings = GroupSettings(
            max_new_tokens, too_long, stop_token_ids, stop_strings, seed, join_arms, divergence
        )
        self.arms, self.ttt, self.divergence = arms, ttt, divergence
        self.enable_thinking, self.warmup, self.reuse_prefix = enable_thinking, warmup, reuse_prefix
        self.save_adapters, self.accept_clbench_license = save_adapters, accept_clbench_license
        self.adapters = None if adapters is None else Path(adapters).expanduser()
        if self.adapters is not None:
            adapters_root(self.adapters)
        self.match_controls = match_controls
        self.done: set[tuple[str, str]] = set()  # (idx, arm) of rows that a resumed run has already
        self.tasks_together: dict[str, int] = {}  # by idx, of rows that were decoded in smaller groups
        self.summary = Summary()

    @property
    def row_names(self) -> list[str]:
        """Names of the rows that every task gets."""
        return [arm.name for arm in self.arms]

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the model that can change a row, to be hashed; revisions count by their commits."""
        source, models = self.source, self.second_models.items()
        return {
            **source.fingerprint(),
            "second_models": [source_fingerprint("target", model.model, commit) for model, commit in models],
            "arms": [{"name": arm.name, **arm.settings()} for arm in self.arms],
            "settings": [
                source.dtype_name(self._trainer),
                source.attn_implementation,
                self.enable_thinking,
                self.reuse_prefix,
            ],
            "group_settings": asdict(self.settings),
            "ttt": self.ttt and self.ttt.fingerprint(),
            **({} if self.adapters is None else {"adapters": self._saved()}),
            **({} if self.match_controls is None else {"match_controls": self.match_controls.fingerprint()}),
        }

    def _saved(self) -> dict[str, str]:
        """What the saved adapters hold, by folder."""
        assert self.adapters is not None
        root = adapters_root(self.adapters)
        places = sorted(path.parent for path in root.rglob(CONFIG))
        return {str(place.relative_to(root)): source_fingerprint("adapters", str(place), None) for place in places}

    @cached_property
    def second_models(self) -> dict[Source, str | None]:
        """Of readouts, with their commits."""
        return pinned_models(self.arms)

    def resolved(self) -> list[str]:
        """What is decoded with, a line per arm and one of the pair; settings are checked as far as no weight is needed.

        The pair is as large as the real one, and holds nothing.
        """
        pair = self.source.outline()
        check_on_pair(self.arms, pair)
        return [*described(self.arms), self.source.described(pair)]

    def setup(self, stage: str) -> None:
        """Loads the pair onto this rank's device, where the trainer suits decoding."""
        check_rows_run(self.trainer, stage, "predict")
        contexts = self._contexts()
        if hasattr(self, "decoder"):
            return
        pair = self.source.load(self.trainer)
        self.second_models = self.trainer.strategy.broadcast(self.second_models)
        check_on_pair(self.arms, pair)
        model_type = str(getattr(pair.target.model.config, "model_type", ""))
        if self.enable_thinking and pair.draft is not None and model_type.startswith("qwen3"):
            why = "the published Qwen3 drafts were trained without thinking"
            rank_zero_warn(f"enable_thinking is on: {why}; τ will drop")
        methods = loaded_methods(self.arms, self.second_models, pair.target)
        new = self.settings.max_new_tokens
        prompts = Prompts(pair, contexts, max_new_tokens=new, enable_thinking=self.enable_thinking)
        layers = [layer for method in methods.values() for layer in method.layers(pair)]
        if any(arm.online_every is not None for arm in self.arms):
            layers.append(pair.target.num_layers - 1)  # whose states are the labels
        prefixes = PrefixStore(pair, prompts, contexts if self.reuse_prefix else {}, tuple(dict.fromkeys(layers)))
        rank = f"rank {self.global_rank}: " if self.trainer.world_size > 1 else ""
        adapt = context_adapter(self, pair) if self.adapters is None else SavedAdapters(self.adapters, contexts, pair)
        matched = {} if self.match_controls is None else matched_controls(self, pair, methods, prompts, adapt)
        self.decoder = GroupDecoder(  # a plain attribute: Lightning neither moves nor saves the pair
            pair,
            scaled_arms(self.arms, matched),
            scaled_methods(methods, matched),
            prompts,
            prefixes,
            self.settings,
            adapt,
            on_note=lambda text: print(rank + text, flush=True),
            matched=matched,
        )
        self.summary.details += in_words(matched)
        if matched and self.trainer.is_global_zero:
            print("\n".join(in_words(matched)), flush=True)

    def _contexts(self) -> dict[str, list[Task]]:
        """The tasks of every context, where something is asked of contexts."""
        data = getattr(self.trainer, "datamodule", None)
        if self.ttt is not None:
            inference = self.trainer.predict_loop.inference_mode
            return contexts_to_adapt(data, accepted=self.accept_clbench_license, inference_mode=inference)
        if self.adapters is not None:
            check_clbench(data, self.accept_clbench_license, "model.adapters")
            return tasks_by_context(data, "model.adapters")
        if any(leaves_out_context(arm.method) for arm in self.arms):
            return tasks_by_context(data, "a readout without context")
        return tasks_by_context(data, "model.reuse_prefix") if self.reuse_prefix and isinstance(data, TaskData) else {}

    def on_predict_start(self) -> None:
        """Finds what can't be decoded before hours are spent, says what is to be read, and warms up."""
        decoder, data = self.decoder, self.trainer.datamodule  # type: ignore[attr-defined]
        groups = getattr(data, "groups", [])
        decoder.check([task for group in groups for task in group])
        if decoder.prefixes.contexts and self.trainer.is_global_zero:
            shards = data.shards(self.trainer.world_size, self)
            cut = self.settings.too_long == "truncate_left"
            reads = decoder.prefixes.ahead(groups, shards, len(decoder.together), cut=cut)
            if reads.read < reads.prompts:
                print(f"to be read: {reads.summary()}", flush=True)
        if self.warmup and not all(map(self._is_done, groups)):
            decoder.warm_up(groups[0][0])

    def on_predict_end(self) -> None:
        """Says what rank 0 read in this session: no rank waits for another after its last context."""
        reads = self.decoder.prefixes.reads
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
        return self.decoder.rows(batch, batch_idx, min(sizes, default=None))
