"""What a test-time training run is: one dataclass, checked where it is made."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from dgd_lightning.checks import check_choice, check_integer, check_number
from dgd_lightning.draft.attention import Wanted
from dgd_lightning.draft.checkpoint import MODULES
from dgd_lightning.errors import InputError

Labels = Literal["context", "target"]
Loss = Literal["auto", "ce", "kl", "argmax"]
Weighting = Literal["decay", "dpace"]


@dataclass
class TTTConfig:
    """How a draft is adapted to one context.

    Args:
        steps: optimiser steps; 0 adapts nothing.
        lr: learning rate of AdamW on the LoRA weights.
        rank: r of the low-rank updates.
        alpha: LoRA's alpha, the update counts alpha / rank; None takes the rank, that is a factor of 1.
        modules: linear layers of the draft that are adapted: ``fc``, ``q_proj``, ``k_proj``, ``v_proj``; ``o_proj`` and
            the MLP's ``gate_proj``, ``up_proj``, ``down_proj`` may be added. ``[fc]`` needs the least memory.
        anchors_per_step: N, blocks per step.
        labels: ``context``: the context's own next tokens (makes a readout that differs from the target); ``target``:
            the target's distribution at each of them (raises τ).
        loss: ``auto`` is ``ce`` for context labels, ``kl`` for target labels. With target labels ``kl`` is
            KL(target ‖ draft), ``ce`` the cross-entropy to the same distribution (equal gradients, another zero) and
            ``argmax`` the cross-entropy to the target's top-1 token.
        weighting: how slots of a block weigh: ``decay`` is exp(−(slot − 1)/γ) as in DFlash's training, ``dpace`` the
            weights of D-PACE (arXiv 2605.18810).
        decay_gamma: γ in slots; None takes the paper's for the block size.
        dpace_alpha: smoothing of D-PACE's confidences, 0 < α ≤ 1.
        validation_texts: texts that the target writes itself behind the context: in a chat a question that it is asked
            for, or expects next, and its greedy answer; else a continuation. No step sees them; τ on them is scored
            before, during and after, the weights with the highest are kept, and none where the gain is not sure
            (``min_gain``). The context's own text does not show what becomes of answers. 0 holds out the context's end.
        validation_tokens: limit of each question and of each answer.
        validation_batch: texts that are written together, in copies of the context's keys and values; null: as many as
            fit in 1 GiB of copies. For every number the texts are the same, but for near-ties in half precision.
        train_texts: more such texts, other ones, on which every second step trains.
        min_gain: least relative gain in the validation texts' micro τ; their mean gain must also exceed its standard
            error (`ttt.adapt.sure_gain`), and the loss on them must have fallen.
        holdout: without validation_texts: share of the context, its end, that no step reads as label; its loss is
            scored, and an adaptation that does not improve it is rolled back. 0 keeps whatever came out.
        holdout_anchors: at most so many blocks are scored there.
        eval_every: steps between two scores of what is held out.
        patience: scores in a row that neither are better nor have a lower loss, after which the loop stops.
        query_only: adapt ``q_proj`` alone; keys and values of the context are computed once for all steps.
        repeats: the target reads the context so often in a row, and steps train on its last pass: there it knows
            what comes, as in answers that quote the context. Costs as many times the prefill.
        window: a step reads at most so many positions of the context; longer contexts are visited window by window, at
            random. None reads all that precedes an anchor.
        gradient_checkpointing: recompute the draft's layers in the backward pass.
        attention: how blocks read the context: ``flex`` (FlexAttention, CUDA), ``tiles`` (made for CPUs), ``sdpa``
            (anywhere) or ``dense`` (one mask over all: much memory); ``auto`` is ``flex`` on CUDA where Triton works,
            ``tiles`` on a CPU, else ``sdpa``.
        chunk: slots whose logits exist at a time.
        weight_decay: AdamW's.
        clip: largest gradient norm; None does not clip.
        seed: of the LoRA weights and of the anchors; both depend on nothing else.

    Raises:
        InputError: a value that can't work, by name.
    """

    steps: int = 10
    lr: float = 2e-3
    rank: int = 8
    alpha: float | None = None
    modules: list[str] = field(default_factory=lambda: ["fc", "q_proj", "k_proj", "v_proj"])
    anchors_per_step: int = 64
    labels: Labels = "target"
    loss: Loss = "auto"
    weighting: Weighting = "decay"
    decay_gamma: float | None = None
    dpace_alpha: float = 0.5
    validation_texts: int = 4
    validation_tokens: int = 64
    validation_batch: int | None = None
    train_texts: int = 0
    min_gain: float = 0.1
    holdout: float = 0.125
    holdout_anchors: int = 64
    eval_every: int = 5
    patience: int = 3
    query_only: bool = False
    repeats: int = 1
    window: int | None = None
    gradient_checkpointing: bool = False
    attention: Wanted = "auto"
    chunk: int = 256
    weight_decay: float = 0.0
    clip: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "repeats", "anchors_per_step", "holdout_anchors", "eval_every", "patience", "chunk"):
            check_integer(f"ttt.{name}", getattr(self, name))
        for name in ("steps", "validation_texts", "train_texts"):
            check_integer(f"ttt.{name}", getattr(self, name), least=0)
        check_integer("ttt.validation_tokens", self.validation_tokens, least=2)
        check_integer("ttt.validation_batch", self.validation_batch, optional=True)
        check_integer("ttt.window", self.window, least=2, optional=True)
        for name in ("lr", "min_gain", "weight_decay"):
            check_number(f"ttt.{name}", getattr(self, name), least=0)
        for name in ("alpha", "decay_gamma", "clip"):
            check_number(f"ttt.{name}", getattr(self, name), above=0, optional=True)
        check_number("ttt.dpace_alpha", self.dpace_alpha, above=0, most=1)
        check_number("ttt.holdout", self.holdout, least=0, below=1)
        check_choice("ttt.labels", self.labels, get_args(Labels))
        check_choice("ttt.weighting", self.weighting, get_args(Weighting))
        check_choice("ttt.attention", self.attention, get_args(Wanted))
        kinds = ("auto", "ce") if self.labels == "context" else get_args(Loss)
        check_choice("ttt.loss", self.loss, kinds, hint=f"labels are {self.labels}")
        if not isinstance(self.modules, list | tuple) or not self.modules:
            expected = f"a list of some of {', '.join(MODULES)}"
            raise InputError("ttt.modules", expected=expected, received=repr(self.modules), hint="name one at least")
        for module in self.modules:
            check_choice("ttt.modules", module, MODULES)
        if self.query_only:
            self.modules = ["q_proj"]

    def fingerprint(self) -> dict[str, Any]:
        """All settings, for the hash of a run."""
        return asdict(self)

    @property
    def loss_kind(self) -> Literal["ce", "kl", "argmax"]:
        """``loss`` with ``auto`` resolved."""
        by_labels: Literal["ce", "kl"] = "ce" if self.labels == "context" else "kl"
        return by_labels if self.loss == "auto" else self.loss
