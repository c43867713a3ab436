"""`ttt_adapt`: fit LoRA weights of the draft to one context, from the context's own prefill."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.finite import hint_of
from dgd_lightning.decode.prefix_cache import PrefixCache
from dgd_lightning.draft.checkpoint import Adapter
from dgd_lightning.draft.lora import DraftLora
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import ContextError, InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import ReadText, Split, read_context, split_context, synchronise
from dgd_lightning.ttt.problem import AdaptProblem
from dgd_lightning.ttt.validation_texts import Share, ValidationTexts, plan, write_texts
from dgd_lightning.types import AdaptTrace, HeldOutScore

PREFIX_SHARE = 1 / 16  # of the device's memory, that a context's keys and values may take beside the fit
DEVICE_MEMORY = 2**34  # bytes, assumed of devices other than CUDA

OnStep = Callable[[int, float, HeldOutScore | None], None]
OnPhase = Callable[[str], None]


class AdaptResult(NamedTuple):
    """An adapter and how it came about; ``with pair.adapter(result): …`` decodes with it."""

    adapter: Adapter
    trace: AdaptTrace
    kept: bool  # False: nothing was gained, and the adapter changes nothing
    prefix: PrefixCache | None = None  # the context as the target read it, where it was asked for and is small enough


def ttt_adapt(
    pair: Pair,
    context_ids: Tensor,
    config: TTTConfig | None = None,
    *,
    avoid: Sequence[Tensor] = (),
    enable_thinking: bool = False,
    on_step: OnStep | None = None,
    on_phase: OnPhase | None = None,
    prefix_layers: Sequence[int] | None = None,
) -> AdaptResult:
    """Adapt a pair's draft to one context; the pair itself is left as it was.

    The target reads the context once. Every step draws blocks at random anchors, runs them through the draft in one
    forward and fits LoRA weights to the labels. What the target itself writes behind the context is held out: the
    weights with the best τ on it are kept, or none where it rose too little (``min_gain``).

    Args:
        pair: target and draft.
        context_ids: [S], the tokens that all prompts to come begin with (no answers).
        config: see :class:`TTTConfig`; None takes its defaults.
        avoid: prompts whose answers are to be measured: none of them becomes a validation text.
        enable_thinking: passed to the chat template for validation texts.
        on_step: called after every step with its number (from 1), its loss and, every ``eval_every`` steps, the score.
        on_phase: called with what begins: ``reading``, ``writing`` (again as texts are written), ``fitting``.
        prefix_layers: give back what was read of the context, for prompts that begin with it: its prefix cache with
            these layers' features. See :func:`prefix_of`.

    Returns:
        The adapter, equal for equal arguments whatever was adapted before.

    Raises:
        InputError: a pair without a draft, or one whose target overflows, or a call inside ``torch.inference_mode``.
        ContextError: a context that is too short or too long, or behind which the target has nothing to say.
    """
    config = config or TTTConfig()
    on_step = on_step or (lambda step, loss, score: None)
    on_phase = on_phase or (lambda phase: None)
    check_adaptable(pair)
    if pair.target.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pair.target.device)
    material = gather(
        pair, context_ids, config, avoid, on_phase, enable_thinking=enable_thinking, prefix_layers=prefix_layers
    )
    on_phase("fitting")
    adapter, trace = fit_to(pair, material, config, on_step)
    return AdaptResult(adapter, trace, trace.kept, material.prefix)


class Material(NamedTuple):
    """All that the target gives to an adaptation."""

    read: ReadText
    split: Split
    validation_texts: ValidationTexts
    prefill_seconds: float
    validation_seconds: float
    prefix: PrefixCache | None

    def problem(self, pair: Pair, config: TTTConfig, lora: DraftLora) -> AdaptProblem:
        """What is minimised over the weights of ``lora``."""
        return AdaptProblem(pair, self.read, self.split, config, lora, self.validation_texts)


def fit_to(
    pair: Pair, material: Material, config: TTTConfig, on_step: OnStep = lambda step, loss, score: None
) -> tuple[Adapter, AdaptTrace]:
    """The loop over what :func:`gather` gave; see :func:`ttt_adapt`."""
    began, lora = time.perf_counter(), make_lora(pair.require_draft(), config)
    try:
        with torch.enable_grad():
            fit = Fit(material.problem(pair, config, lora), lora, config)
            optimizer = make_optimizer(lora, config)
            while not fit.finished:
                loss = fit.problem.loss(fit.step)
                if not fit.check(loss):
                    break
                make_step(loss, optimizer, lora, config)
                score = fit.advance(float(loss.detach()))
                on_step(fit.step, fit.losses[-1], score)
            fit.conclude()
        adapter = lora.adapter()
    finally:
        lora.remove()
    synchronise(pair.target.device)
    return adapter, fit.trace(material, time.perf_counter() - began)


def gather(
    pair: Pair,
    context_ids: Tensor,
    config: TTTConfig,
    avoid: Sequence[Tensor] = (),
    on_phase: OnPhase = lambda phase: None,
    *,
    enable_thinking: bool = False,
    share: Share = lambda make: make(),
    prefix_layers: Sequence[int] | None = None,
) -> Material:
    """Check the context [S], let the target read it, and let it write its validation texts.

    ``share`` gives every rank what rank 0 has; the other arguments are those of :func:`ttt_adapt`.
    """
    ids = check_context(pair, context_ids, config.repeats)
    once = len(ids) // config.repeats
    split = split_context(once, pair.require_draft().config.block_size, config)
    planned = plan(pair, once, config, enable_thinking=enable_thinking)
    cache = pair.target.new_cache(1, max(split.length, planned.capacity if planned else 0))
    on_phase("reading")
    synchronise(pair.target.device)
    began = time.perf_counter()
    read = read_context(pair, ids, config, split, cache)
    synchronise(pair.target.device)
    between = time.perf_counter()
    texts = ValidationTexts([], [])
    if planned is not None:
        on_text = partial(on_phase, "writing")
        texts = write_texts(pair, ids[:once], read.features, cache, config, planned, avoid, share, on_text)
        synchronise(pair.target.device)
    end = time.perf_counter()
    prefix = None if prefix_layers is None else prefix_of(pair, ids, config, read, cache, prefix_layers)
    return Material(read, split, texts, between - began, end - between, prefix)


def prefix_of(
    pair: Pair, ids: Tensor, config: TTTConfig, read: ReadText, cache: PositionCache, layer_ids: Sequence[int]
) -> PrefixCache | None:
    """The context's prefix cache, made of what was read anyway, so that decoding need not read it again.

    None where it would not be the same (layers that the draft does not tap, a repeated context), and where it would
    take more than :data:`PREFIX_SHARE` of the device's memory while the draft is fitted.
    """
    tapped, device = tuple(pair.require_draft().config.target_layer_ids), cache.buffers[0].keys.device
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else DEVICE_MEMORY
    held = sum(part.nbytes for buffer in cache.buffers for part in (buffer.keys, buffer.values))
    if config.repeats > 1 or not set(layer_ids) <= set(tapped) or held > PREFIX_SHARE * room:
        return None
    return PrefixCache(ids, cache, tapped, read.features) if layer_ids else PrefixCache(ids, cache)


class Fit:
    """The state of a fit: losses, scores, the best weights. Shared by `ttt_adapt` and the Lightning module."""

    def __init__(self, problem: AdaptProblem, lora: DraftLora, config: TTTConfig) -> None:
        self.problem, self.lora, self.config = problem, lora, config
        self.step, self.losses, self.scores = 0, [], []  # type: int, list[float], list[HeldOutScore]
        self.best_step, self.best_weights = 0, lora.state()
        self.best_tau = 0.0  # of those weights on validation texts
        self.idle = 0  # scores since the last one that was better, or had a lower loss than any before
        self.stopped = "done"
        score = problem.score(0) if config.steps > 0 else None
        if score is not None and self.check(torch.tensor(score.loss)):
            self.scores.append(score)

    @property
    def finished(self) -> bool:
        """No step is left to make."""
        return self.step >= self.config.steps or self.stopped != "done"

    def check(self, loss: Tensor) -> bool:
        """Whether a step's loss is finite; where it is not, the fit ends and is rolled back."""
        if math.isfinite(value := float(loss.detach())):
            return True
        hint = "lower ttt.lr" if self.step else hint_of(self.problem.target.dtype)  # no step yet: no rate is to blame
        self.stopped = f"the loss of step {self.step + 1} was {value}: {hint}"
        return False

    def advance(self, loss: float) -> HeldOutScore | None:
        """Count a step that was made; score what is held out when it is time to."""
        self.step += 1
        self.losses.append(loss)
        due = self.step % self.config.eval_every == 0 or self.step >= self.config.steps
        score = self.problem.score(self.step) if due else None
        if score is None:
            return None
        if math.isfinite(score.loss) and self._is_better(score):
            self.best_step, self.best_weights = self.step, self.lora.state()
        progress = self.best_step == self.step or score.loss < min(one.loss for one in self.scores)
        self.idle = 0 if progress else self.idle + 1
        self.scores.append(score)
        if self.idle >= self.config.patience and self.step < self.config.steps:
            self.stopped = "early"
        return score

    def _is_better(self, score: HeldOutScore) -> bool:
        """By τ on validation texts, which is what decoding will have; by the loss on the context's end."""
        if not self.problem.has_validation_texts:
            return score.loss < min(one.loss for one in self.scores)
        first = self.scores[0]
        worth_it = score.tau >= first.tau * (1 + self.config.min_gain) and score.loss < first.loss
        if not worth_it or sure_gain(first, score) <= 0 or score.tau <= self.best_tau:
            return False
        self.best_tau = score.tau
        return True

    def conclude(self) -> None:
        """Put the best weights into the draft; back to zero where nothing was gained or the loss went wrong."""
        if self.stopped == "done" and not self.lora.is_finite():
            self.stopped = f"the weights after step {self.step} are not finite: lower ttt.lr"
        if self.stopped not in ("done", "early"):
            self.best_step = 0
        elif not self.scores:  # nothing is held out: the last step counts
            self.best_step, self.best_weights = self.step, self.lora.state()
        if self.best_step > 0:
            self.lora.load(self.best_weights)
        else:
            self.lora.reset(self.config.seed)

    def trace(self, material: Material, fit_seconds: float) -> AdaptTrace:
        """What is reported of it."""
        texts, scored = material.validation_texts, "span" if self.scores else "nothing"
        device = self.problem.device
        return AdaptTrace(
            losses=self.losses,
            scores=self.scores,
            best_step=self.best_step,
            kept=self.best_step > 0,
            stopped=self.stopped,
            context_tokens=self.problem.split.length,
            parameters=sum(weight.numel() for weight in self.best_weights.values()),
            held_out_by="validation_texts" if self.problem.has_validation_texts else scored,  # type: ignore[arg-type]
            validation_texts=len(texts.held_out),
            validation_answers=texts.answers,
            validation_asked=texts.asked,
            train_texts=len(texts.trained),
            prefill_seconds=material.prefill_seconds,
            validation_seconds=material.validation_seconds,
            fit_seconds=fit_seconds,
            peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            attention=self.problem.attention,
            prefix_kept=material.prefix is not None,
        )


def sure_gain(before: HeldOutScore, after: HeldOutScore) -> float:
    """The validation texts' mean gain in ln τ, less its standard error.

    Long answers dominate micro τ, and a short one takes one or two verifications: a gain on only one of several
    texts is no gain.
    """
    ratios = [math.log(new / old) for old, new in zip(before.tau_by_text, after.tau_by_text, strict=True)]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return statistics.fmean(ratios) - error


def make_lora(draft: DFlashDraft, config: TTTConfig) -> DraftLora:
    """The LoRA layers that a configuration asks for."""
    alpha = float(config.rank if config.alpha is None else config.alpha)
    return DraftLora(draft, rank=config.rank, alpha=alpha, modules=config.modules, seed=config.seed)


def make_optimizer(lora: DraftLora, config: TTTConfig) -> torch.optim.Optimizer:
    """AdamW on the LoRA weights alone."""
    return torch.optim.AdamW(lora.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def make_step(loss: Tensor, optimizer: torch.optim.Optimizer, lora: DraftLora, config: TTTConfig) -> None:
    """One optimiser step; no gradient is left behind."""
    loss.backward()
    if config.clip is not None:
        torch.nn.utils.clip_grad_norm_(lora.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def check_adaptable(pair: Pair) -> None:
    """Refuse a pair without a draft, and a call where autograd is ruled out."""
    pair.require_draft()
    if torch.is_inference_mode_enabled():
        expected = "torch.no_grad or no context at all: adaptation needs gradients"
        hint = "set trainer.inference_mode: false, or use torch.no_grad around your own code"
        raise InputError("inference mode", expected=expected, received="a call inside torch.inference_mode", hint=hint)


def check_context(pair: Pair, context_ids: Tensor, repeats: int = 1) -> Tensor:
    """The context, as often as it is to be read, as a 1-D LongTensor on CPU."""
    given = isinstance(context_ids, Tensor)
    if not given or context_ids.dim() != 1 or context_ids.is_floating_point() or context_ids.dtype == torch.bool:
        received = f"shape {list(context_ids.shape)}, {context_ids.dtype}" if given else type(context_ids).__name__
        hint = "pass the token ids of the context"
        raise InputError("context_ids", expected="a 1-D integer tensor", received=received, hint=hint)
    ids = context_ids.detach().cpu().long()
    if len(ids) == 0 or len(ids) * repeats > pair.target.max_positions:
        raise ContextError(
            "context_ids",
            expected=f"1 … {pair.target.max_positions} tokens, the target's positions",
            received=f"{len(ids)} tokens, read {repeats} times",
            hint="shorten it, or lower ttt.repeats" if len(ids) else "give a context's tasks the same first tokens",
        )
    if int(ids.min()) < 0 or int(ids.max()) >= pair.target.vocab_size:
        expected = f"token ids in 0 … {pair.target.vocab_size - 1}"
        hint = "encode the context with the target's own tokenizer"
        raise InputError("context_ids", expected=expected, received=f"{int(ids.min())} … {int(ids.max())}", hint=hint)
    return ids.repeat(repeats)
