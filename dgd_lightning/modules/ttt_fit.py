"""`TestTimeTraining`: `ttt_adapt` as a Lightning fit, for one context (`dgd fit --config configs/ttt/*.yaml`).

Precision, accumulation, clipping and the strategy are the Trainer's; the loss, the blocks, the held-out score and the
choice of the best weights are the functions that `ttt_adapt` calls, so both give the same adapter for the same seed.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dgd_lightning.data.licence import check_clbench
from dgd_lightning.data.one_context import common_prefix
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.modules.adaptation import ADAPTERS, TRACE, best_score, safe_name, save_adapted
from dgd_lightning.modules.pair_source import PairSource
from dgd_lightning.ttt.adapt import Fit, gather, make_lora, make_optimizer
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.validation_texts import Chosen
from dgd_lightning.types import AdaptTrace


class TestTimeTraining(L.LightningModule):
    """Fit LoRA weights of the draft to the one context that the datamodule holds.

    The datamodule's ``context(tokenizer)`` gives the context; its batches are the numbers of the steps. Under DDP every
    rank reads the context and takes every n-th block of a step; gradients are averaged, so that the ranks together make
    the step that one would.

    Args:
        target: Hub id or folder of the target, or ``lab``.
        draft: Hub id or folder of the draft, or ``lab``.
        ttt: the fit; ``clip`` is the Trainer's here (``trainer.gradient_clip_val``).
        export_dir: where the adapter goes too, beside the run folder's ``adapters/<context id>/``, if it is kept; None:
            nowhere else.
        accept_clbench_license: you have obtained permission to adapt to CL-bench's contexts, which its licence forbids.
        pair: see `PairSource`; ``dtype`` is the pair's, LoRA weights are fp32 or wider.
    """

    def __init__(
        self,
        target: str,
        draft: str,
        ttt: TTTConfig,
        *,
        export_dir: Path | None = None,
        accept_clbench_license: bool = False,
        **pair: Any,
    ) -> None:
        super().__init__()
        self.source = PairSource(target, draft, device_map=None, **pair)
        self.ttt, self.export_dir, self.accept_clbench_license = ttt, export_dir, accept_clbench_license
        self.values: list[float] = []  # losses of the micro-batches since the last optimiser step

    def fingerprint(self) -> dict[str, Any]:
        """What the run starts from, for its provenance."""
        return {**self.source.fingerprint(), "dtype": self.source.dtype_name(self._trainer)}

    def setup(self, stage: str) -> None:
        """Checks that the data may be adapted to, and that the trainer suits a fit."""
        if stage != "fit":
            raise InputError("subcommand", expected="fit", received=stage, hint="run `dgd fit`")
        if self.trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise InputError(
                "trainer.precision",
                expected="32-true, bf16-mixed or 16-mixed: LoRA weights stay fp32 or wider",
                received=self.trainer.precision,
                hint="set model.dtype for the pair's own dtype",
            )
        if self.ttt.anchors_per_step < self.trainer.world_size:
            raise InputError(
                "model.ttt.anchors_per_step",
                expected=f"at least one for each of {self.trainer.world_size} ranks",
                received=self.ttt.anchors_per_step,
                hint="use more anchors or fewer devices",
            )
        if self.trainer.ckpt_path is not None:
            raise InputError(
                "ckpt_path",
                expected="none: a fit takes seconds and starts anew",
                received=self.trainer.ckpt_path,
                hint=f"{LEAVE_OUT}; load_adapter reads a finished adapter",
            )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "prompts"):
            raise InputError(
                "data",
                expected="a FileContext: one context to adapt to",
                received=type(data).__name__,
                hint="set data.class_path: FileContext",
            )
        check_clbench(data, self.accept_clbench_license, "model.ttt")

    def configure_model(self) -> None:
        """Loads the pair, lets the target read the context, puts the LoRA layers in."""
        if hasattr(self, "lora"):
            return
        self.pair = self.source.load(self.trainer)
        self.context_id, prompts = self.trainer.datamodule.prompts(self.pair.tokenizer)  # type: ignore[attr-defined]
        self.material = gather(self.pair, common_prefix(prompts), self.ttt, prompts, share=self._share)
        self.draft = self.pair.require_draft()  # registered: its LoRA weights are all that can be trained
        self.lora = make_lora(self.draft, self.ttt)

    def _share(self, make: Callable[[], Chosen]) -> Chosen:
        """What rank 0 made, or its mistake, on every rank: texts that each wrote itself might differ."""
        made: Any = None
        mistake = None
        if self.trainer.is_global_zero:
            try:
                made = make()
            except InputError as error:
                mistake = dict(vars(error))
        made, mistake = self.trainer.strategy.broadcast((made, mistake))
        if mistake is not None:
            raise InputError(**mistake)
        return made

    def on_fit_start(self) -> None:
        """Scores what is held out before the first step."""
        self.began = time.perf_counter()
        self.fit = Fit(self.material.problem(self.pair, self.ttt, self.lora), self.lora, self.ttt)
        self._log_score(0)

    def training_step(self, batch: int, batch_idx: int) -> Tensor | None:
        """The loss of a step's blocks on this rank."""
        ranks, strategy = self.trainer.world_size, self.trainer.strategy
        reduce = (lambda x: strategy.reduce(x.detach(), reduce_op="sum")) if ranks > 1 else None
        loss = self.fit.problem.loss(int(batch), rank=self.trainer.global_rank, ranks=ranks, reduce=reduce)
        value = strategy.reduce(loss.detach(), reduce_op="mean") if ranks > 1 else loss.detach()
        self.values.append(float(value))
        self.log("ttt/loss", self.values[-1], prog_bar=True)
        if not self.fit.check(value):
            self.trainer.should_stop = True
            return None
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimiser step: counts it, and scores when it is time to."""
        # accumulating, or nothing was stepped, or the loss went wrong
        if self.trainer.global_step == self.fit.step or self.fit.stopped != "done":
            return
        if self.fit.advance(statistics.fmean(self.values)) is not None:
            self._log_score(self.fit.step)
        self.values = []
        if self.fit.finished:
            self.trainer.should_stop = True

    def _log_score(self, step: int) -> None:
        if not self.fit.scores or self.trainer.logger is None:
            return
        score = self.fit.scores[-1]
        values = {"ttt/held_out_loss": score.loss, "ttt/held_out_tau": score.tau}
        values |= {f"ttt/held_out_acceptance/slot_{slot:02d}": rate for slot, rate in enumerate(score.acceptance, 1)}
        self.trainer.logger.log_metrics(values, step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.lora, self.ttt)

    def on_fit_end(self) -> None:
        """Keeps the best weights, or none, and writes the adapter; also where there was no step to make."""
        self.fit.conclude()
        trace = self.fit.trace(self.material, time.perf_counter() - self.began)
        if self.trainer.logger is not None:
            self.trainer.logger.log_metrics({"ttt/kept_step": trace.best_step}, len(trace.losses))  # 0: none
        log_dir = self.trainer.log_dir  # a collective: every rank asks
        if not self.trainer.is_global_zero:
            return
        own = log_dir and Path(log_dir, ADAPTERS, safe_name(self.context_id))
        # where nothing was kept there is no adapter to export, and an earlier one there stays beside its own trace
        folders = [Path(folder) for folder in (own, self.export_dir if trace.kept else None) if folder]
        for folder in folders:
            save_adapted(self.lora.adapter(), trace, folder)
        print(report(self.context_id, trace, self.ttt))
        for folder in folders:
            print(f"adapter:    {folder}" if trace.kept else f"trace:      {folder / TRACE}")
        if trace.stopped not in ("done", "early"):
            received, _, hint = trace.stopped.partition(": ")
            raise InputError("model.ttt", expected="finite losses and weights", received=received, hint=hint)


def report(context_id: str, trace: AdaptTrace, config: TTTConfig) -> str:
    """A fit in a few lines, for people."""
    lines = [
        f"context {context_id}: {trace.context_tokens} tokens, {trace.parameters:,} LoRA parameters, "
        f"prefill {trace.prefill_seconds:.2f} s, {len(trace.losses)} steps in {trace.fit_seconds:.2f} s"
    ]
    if trace.scores:
        before, best = trace.scores[0], best_score(trace)
        texts = trace.held_out_by == "validation_texts"
        of = f"{trace.validation_texts} validation texts" if texts else "the context’s end"
        scores = f"loss {before.loss:.3f} → {best.loss:.3f}, τ {before.tau:.2f} → {best.tau:.2f}"
        lines.append(f"held out, {of}: {scores}")
    if trace.stopped == "early":
        lines.append(
            f"stopped early, after step {len(trace.losses)} of {config.steps}: {config.patience} scores in a row "
            "were no better and had no lower loss (ttt.patience)"
        )
    lines.append(f"kept the weights of step {trace.best_step}" if trace.kept else _rolled_back(trace, config))
    return "\n".join(lines)


def _rolled_back(trace: AdaptTrace, config: TTTConfig) -> str:
    """Why nothing was kept; on validation texts, what the score with the highest τ lacked."""
    if trace.stopped not in ("done", "early"):
        why = trace.stopped
    elif not trace.scores:
        why = "no step was made (ttt.steps)"
    elif trace.held_out_by != "validation_texts":
        why = "no step lowered the loss on the context’s end"
    else:
        first, best = trace.scores[0], max(trace.scores, key=lambda score: score.tau)
        gain = best.tau / first.tau - 1
        why = (
            f"on the validation texts no step had a sure gain in τ of {config.min_gain:.0%} (ttt.min_gain) "
            f"and a lower loss; the highest τ was {best.tau:.2f}"
        )
        if gain > 0:
            why += f", at step {best.step}: {gain:+.0%}"
        if gain > 0 and gain >= config.min_gain:
            why += (
                ", but the loss on them did not fall"
                if best.loss >= first.loss
                else f", but not beyond its standard error over {len(best.tau_by_text)} validation texts "
                "(with more of them, ttt.validation_texts, smaller gains are sure)"
            )
    return f"kept nothing, the draft stays as it was: {why}"
