"""Test-time training inside `Decoding`: one adapter per context, made when the context's first group is decoded."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.data.licence import check_clbench
from dgd_lightning.data.one_context import common_prefix
from dgd_lightning.data.tasks import tasks_by_context
from dgd_lightning.draft.checkpoint import CONFIG, WEIGHTS, Adapter, load_adapter, save_adapter
from dgd_lightning.draft.lora import with_adapter
from dgd_lightning.errors import ContextError, InputError
from dgd_lightning.files import whole_files
from dgd_lightning.modules.prompts import PrefixStore
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.adapt import ttt_adapt
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.types import AdaptTrace, HeldOutScore, Task

ADAPTERS, TRACE = "adapters", "trace.json"
PHASES = {
    "reading": "the target reads it",
    "writing": "the target writes validation texts",
    "fitting": "the draft learns",
}
COSTS = ("prefill_seconds", "validation_seconds", "fit_seconds", "peak_memory")  # of a trace: no two runs share them
OnAdapt = Callable[[str, int, str], None]  # context id; step, 0 where something else begins; what is done, in words


class Adapted(NamedTuple):
    """What is known of a context's adaptation."""

    adapter: Adapter | None  # None where there is none worth using
    record: dict[str, Any]  # goes into the rows of the context's tasks, as ``dgd.ttt``
    cost: dict[str, Any]  # so does this, beside it: what no two runs share


@dataclass
class ContextAdapter:
    """Adapts the draft to one context after another and remembers the last one."""

    pair: Pair  # whose draft is adapted, and left as it was
    config: TTTConfig  # of every fit
    folder: Path | None  # where adapters are saved, a folder per context; None saves none
    enable_thinking: bool = False
    last: tuple[str, Adapted] | None = None
    kept: dict[str, Adapted] = field(default_factory=dict)  # by context, of fits that were needed before its turn

    def __call__(
        self,
        context_id: str,  # groups of one context follow each other, so one adapter is remembered
        prompts: Callable[[], Sequence[Tensor]],  # of all tasks of the context, [S] each: their beginning is adapted to
        on_progress: OnAdapt | None = None,  # called with what begins, and after every step
        prefixes: PrefixStore | None = None,  # is given what the target read of the context, where it wants it
    ) -> Adapted:
        """The adapter of a context; what goes wrong with this context alone is recorded, and the run goes on."""
        if context_id in self.kept:
            return self.kept[context_id]
        if self.last is None or self.last[0] != context_id:
            self.last = (context_id, self._adapt(context_id, prompts(), on_progress, prefixes))
        return self.last[1]

    def _adapt(
        self, context_id: str, prompts: Sequence[Tensor], on_progress: OnAdapt | None, prefixes: PrefixStore | None
    ) -> Adapted:
        report = on_progress or (lambda context_id, step, what: None)
        layers = prefixes.layer_ids if prefixes is not None and prefixes.length(context_id) else None
        while True:
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
                break
            except (ContextError, torch.OutOfMemoryError) as error:
                why, no_room = " ".join(str(error).split()), isinstance(error, torch.OutOfMemoryError)
            except InputError as error:  # the pair's: no other context would fare better
                raise error.named(f"context {context_id}") if error.argument == "context" else error from error
            # Here, not above: what was caught holds on to the tensors of the fit.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if layers is None or not no_room:
                return Adapted(None, {"kept": False, "error": why}, {})
            layers = None  # once more with the memory that the context's own keys and values took
        if prefixes is not None and result.prefix is not None:
            prefixes.take(context_id, result.prefix)
        if self.folder is not None:
            save_adapted(result.adapter, result.trace, self.folder / safe_name(context_id))
        costs = {f"ttt_{name}": getattr(result.trace, name) for name in COSTS}
        return Adapted(result.adapter if result.kept else None, summary(result.trace), costs)


class SavedAdapters:
    """Adapters that an earlier run or fit has saved, in place of fits.

    Args:
        folder: that run's folder, or the ``adapters/`` in it, with a folder for each context; or one adapter's folder,
            for all contexts.
        contexts: ids of those that are decoded.
        pair: whose draft the adapters belong to.

    Raises:
        InputError: a context has none, or one can't be read or is of another draft.
    """

    def __init__(self, folder: Path, contexts: Iterable[str], pair: Pair) -> None:
        self.places: dict[str, Path | None] = {}  # None: its fit kept nothing
        root, draft, lacking = adapters_root(folder), pair.require_draft(), []
        for context in contexts:
            place = root if (root / CONFIG).is_file() else root / safe_name(context)
            kept = _was_kept(place)
            self.places[context] = place if kept else None
            if kept is None:
                lacking.append(context)
        if lacking:
            raise InputError(
                "model.adapters",
                expected=f"an adapter of each of {len(self.places)} contexts in {root}",
                received=f"none of {len(lacking)} of them, such as {lacking[0]}",
                hint="name the run that adapted to these contexts, or one adapter's own folder for all of them",
            )
        for place in {place for place in self.places.values() if place is not None}:
            try:
                with_adapter(draft, load_adapter(place)).remove()
            except InputError as error:
                received = error.received if str(place) in error.received else f"{place}: {error.received}"
                raise InputError(
                    "model.adapters", expected=error.expected, received=received, hint=error.hint
                ) from error

    def __call__(self, context_id: str, *_: Any) -> Adapted:
        """The adapter of a context; called as `ContextAdapter` is."""
        place = self.places[context_id]
        record = {"kept": place is not None, "saved": True, "held_out_before": None, "held_out_after": None}
        costs = dict.fromkeys((f"ttt_{name}" for name in COSTS), 0.0) | {"ttt_peak_memory": None}
        return Adapted(None if place is None else load_adapter(place), record, costs)


def adapters_root(folder: Path) -> Path:
    """Where a folder has its adapters: itself, or its ``adapters/``."""
    if not folder.is_dir():
        hint = "name a run's folder logs/NAME/version_N"
        raise InputError("model.adapters", expected="a folder with adapters", received=folder, hint=hint)
    return folder / ADAPTERS if (folder / ADAPTERS).is_dir() else folder


def _was_kept(place: Path) -> bool | None:
    """Whether a fit's folder has an adapter that was kept; None where there is no fit's folder.

    Runs of before 0.3 wrote those too that were not.
    """
    with contextlib.suppress(OSError, ValueError):
        if json.loads((place / TRACE).read_text(encoding="utf-8")).get("kept") is False:
            return False
    return True if (place / CONFIG).is_file() else None


def context_adapter(module: Any, pair: Pair) -> ContextAdapter | None:
    """What adapts the draft of a run's module, saving adapters in the run folder if asked to; None without ``ttt``."""
    log_dir = module.trainer.log_dir  # a collective: every rank asks
    if module.ttt is None:
        return None
    folder = Path(log_dir, ADAPTERS) if module.save_adapters and log_dir is not None else None
    return ContextAdapter(pair, module.ttt, folder, enable_thinking=module.enable_thinking)


def contexts_to_adapt(data: Any, *, accepted: bool, inference_mode: bool) -> dict[str, list[Task]]:
    """The tasks of every context of a datamodule, after a check of licence (``accepted``: obtained) and trainer."""
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
    apart = ("losses", "scores", *COSTS)
    return {
        **{name: value for name, value in trace._asdict().items() if name not in apart},
        "steps": len(trace.losses),
        "first_loss": trace.losses[0] if trace.losses else None,
        "last_loss": trace.losses[-1] if trace.losses else None,
        "held_out_before": trace.scores[0]._asdict() if trace.scores else None,
        "held_out_after": best_score(trace)._asdict() if trace.scores else None,
    }


def save_adapted(adapter: Adapter, trace: AdaptTrace, folder: Path) -> None:
    """Write a fit's adapter, if it is kept, and its whole trace; numbers that are not finite become null.

    One of a killed start would stand beside another fit's trace: where nothing is kept it is removed.
    """
    if trace.kept:
        save_adapter(adapter, folder)
    else:
        for name in (WEIGHTS, CONFIG):
            (folder / name).unlink(missing_ok=True)
    scores = [score._asdict() | {"loss": finite(score.loss)} for score in trace.scores]
    record = {**trace._asdict(), "scores": scores, "losses": list(map(finite, trace.losses))}
    with whole_files(folder, TRACE) as scratch:
        (scratch / TRACE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(number: float) -> float | None:
    """A number for JSON, which knows no infinity."""
    return number if math.isfinite(number) else None


def best_score(trace: AdaptTrace) -> HeldOutScore:
    """The held-out score of the weights that were kept (the first one where none were)."""
    return next(score for score in trace.scores if score.step == trace.best_step)


def safe_name(context_id: str) -> str:
    """A folder name for any id: other characters than ``[\\w.-]`` are replaced, and then a digest keeps ids apart."""
    plain = re.sub(r"[^\w.-]", "_", context_id, flags=re.ASCII)[:80].lstrip(".")
    if plain and plain == context_id:
        return plain
    return f"{plain}-{hashlib.sha256(context_id.encode()).hexdigest()[:8]}"
