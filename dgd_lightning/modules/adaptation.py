"""Test-time training inside `Decoding`: one adapter per context, made when the context's first group is decoded."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.data.licence import check_clbench
from dgd_lightning.data.one_context import common_prefix
from dgd_lightning.data.tasks import tasks_by_context
from dgd_lightning.draft.checkpoint import save_adapter
from dgd_lightning.errors import ContextError, InputError
from dgd_lightning.files import whole_files
from dgd_lightning.modules.prefix_store import PrefixStore
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.adapt import AdaptResult, ttt_adapt
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.types import AdaptTrace, Task

ADAPTERS, TRACE = "adapters", "trace.json"
PHASES = {
    "reading": "the target reads it",
    "writing": "the target writes validation texts",
    "fitting": "the draft learns",
}
OnAdapt = Callable[[str, int, str], None]  # context id; step, 0 where something else begins; what is done, in words


class Adapted(NamedTuple):
    """What is known of a context's adaptation."""

    result: AdaptResult | None  # None where it failed
    record: dict[str, Any]  # goes into the rows of the context's tasks, as ``dgd.ttt``
    cost: dict[str, Any]  # so does this, beside it: what no two runs share


class ContextAdapter:
    """Adapts the draft to one context after another and remembers the last one.

    Args:
        pair: whose draft is adapted, and left as it was.
        config: of every fit.
        folder: where adapters are saved, a folder per context; None saves none.
        enable_thinking: of the prompts.
    """

    def __init__(self, pair: Pair, config: TTTConfig, folder: Path | None, *, enable_thinking: bool = False) -> None:
        self.pair, self.config, self.folder, self.enable_thinking = pair, config, folder, enable_thinking
        self.last: tuple[str, Adapted] | None = None

    def __call__(
        self,
        context_id: str,
        prompts: Callable[[], Sequence[Tensor]],
        on_progress: OnAdapt | None = None,
        prefixes: PrefixStore | None = None,
    ) -> Adapted:
        """The adapter of a context; what belongs to this context alone is recorded, and the run goes on.

        Args:
            context_id: the context's name; groups of one context follow each other, so one adapter is remembered.
            prompts: gives the prompts of all tasks of the context, [S] each; what they begin with is adapted to.
            on_progress: called with what begins, and after every step.
            prefixes: is given what the target read of the context, where it wants it.

        Raises:
            InputError: a mistake in the settings, which every context would meet.
        """
        if self.last is None or self.last[0] != context_id:
            report = on_progress or (lambda context_id, step, what: None)
            self.last = (context_id, self._adapt(context_id, prompts(), report, prefixes))
        return self.last[1]

    def _adapt(
        self, context_id: str, prompts: Sequence[Tensor], report: OnAdapt, prefixes: PrefixStore | None
    ) -> Adapted:
        wanted = prefixes is not None and prefixes.length(context_id) > 0
        layers = prefixes.layer_ids if prefixes is not None and wanted else None
        result, why = self._fitted(context_id, prompts, report, layers)
        if result is None and layers is not None and isinstance(why, torch.OutOfMemoryError):
            # once more with the memory that the context's own keys and values took
            result, why = self._fitted(context_id, prompts, report, None)
        if result is None:
            return Adapted(None, {"kept": False, "error": " ".join(str(why).split())}, {})
        if prefixes is not None and result.prefix is not None:
            prefixes.take(context_id, result.prefix)
            result = result._replace(prefix=None)  # the store alone holds it
        if self.folder is not None:
            folder = save_adapter(result.adapter, self.folder / safe_name(context_id))
            save_trace(result.trace, folder)
        trace = result.trace
        cost = {
            "ttt_prefill_seconds": trace.prefill_seconds,
            "ttt_validation_seconds": trace.validation_seconds,
            "ttt_fit_seconds": trace.fit_seconds,
            "ttt_peak_memory": trace.peak_memory,
        }
        return Adapted(result, summary(trace), cost)

    def _fitted(
        self, context_id: str, prompts: Sequence[Tensor], report: OnAdapt, layers: tuple[int, ...] | None
    ) -> tuple[AdaptResult | None, Exception | None]:
        """A result, or what kept this context from one; ``layers``: of the prefix that is handed on, None for none."""
        failed: Exception
        try:
            result = ttt_adapt(
                self.pair,
                common_prefix(prompts),
                self.config,
                avoid=prompts,
                enable_thinking=self.enable_thinking,
                on_step=lambda step, loss, score: report(context_id, step, f"step {step}/{self.config.steps}"),
                on_phase=lambda phase: report(context_id, 0, PHASES[phase]),
                prefix_layers=layers,
            )
            return result, None
        except (ContextError, torch.OutOfMemoryError) as error:
            failed = error.with_traceback(None)  # which holds on to the tensors of the fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, failed


def contexts_to_adapt(data: Any, *, accepted: bool, inference_mode: bool) -> dict[str, list[Task]]:
    """The tasks of every context, after a check of what adaptation needs.

    Args:
        data: the run's datamodule.
        accepted: permission to adapt to CL-bench's rows has been obtained.
        inference_mode: whether the loop runs under it.

    Raises:
        InputError: CL-bench's rows without permission, no tasks, or a trainer that rules gradients out.
    """
    contexts = tasks_by_context(data, "model.ttt")
    check_clbench(data, accepted, "model.ttt")
    if inference_mode:  # Lightning asks for no_grad on gloo, where this would go unseen
        raise InputError(
            "trainer.inference_mode",
            expected="false: test-time training needs gradients",
            received="true",
            hint="set trainer.inference_mode: false, which is what dgd does by itself",
        )
    return contexts


def summary(trace: AdaptTrace) -> dict[str, Any]:
    """What a prediction row says of an adaptation."""
    before, after = (trace.scores[0], best_score(trace)) if trace.scores else (None, None)
    return {
        "kept": trace.kept,
        "stopped": trace.stopped,
        "steps": len(trace.losses),
        "best_step": trace.best_step,
        "context_tokens": trace.context_tokens,
        "parameters": trace.parameters,
        "attention": trace.attention,
        "prefix_kept": trace.prefix_kept,
        "first_loss": trace.losses[0] if trace.losses else None,
        "last_loss": trace.losses[-1] if trace.losses else None,
        "held_out_by": trace.held_out_by,
        "validation_texts": trace.validation_texts,
        "validation_answers": trace.validation_answers,
        "train_texts": trace.train_texts,
        "held_out_before": before and before._asdict(),
        "held_out_after": after and after._asdict(),
    }


def save_trace(trace: AdaptTrace, folder: Path) -> None:
    """Write a whole trace beside its adapter, in one step; numbers that are not finite become null."""
    record = {**trace._asdict(), "scores": [score._asdict() for score in trace.scores]}
    record["losses"] = [loss if math.isfinite(loss) else None for loss in trace.losses]
    for score in record["scores"]:
        score["loss"] = score["loss"] if math.isfinite(score["loss"]) else None
    with whole_files(folder, TRACE) as scratch:
        (scratch / TRACE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def best_score(trace: AdaptTrace) -> Any:
    """The held-out score of the weights that were kept (the first one where none were)."""
    return next(score for score in trace.scores if score.step == trace.best_step)


def safe_name(context_id: str) -> str:
    """A folder name for any id: other characters than ``[\\w.-]`` are replaced, and then a digest keeps ids apart."""
    plain = re.sub(r"[^\w.-]", "_", context_id, flags=re.ASCII)[:80].lstrip(".")
    if plain and plain == context_id:
        return plain
    return f"{plain}-{hashlib.sha256(context_id.encode()).hexdigest()[:8]}"
