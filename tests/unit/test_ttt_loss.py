"""The loss of test-time training, against a naive one that makes everything at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import make_pair
from torch import Tensor
from ttt_tools import config, context

from dgd_lightning import Pair, TTTConfig
from dgd_lightning.draft.lora import DraftLora
from dgd_lightning.ttt.adapt import gather
from dgd_lightning.ttt.context import ReadText, draw_blocks, read_context, split_context
from dgd_lightning.ttt.problem import AdaptProblem

RELATIVE = 1e-6  # of chunked against naive losses and gradients in fp64, as the issue states it


def naive_loss(
    pair: Pair, ids: Tensor, setup: TTTConfig, step: int, validation_texts: Sequence[ReadText] = ()
) -> Tensor:
    """Slot by slot, with all logits and plain softmaxes, uncached context, no chunks."""
    assert pair.draft is not None
    draft, target, size = pair.draft, pair.target, pair.draft.config.block_size
    split = split_context(len(ids) // setup.repeats, size, setup)
    blocks = draw_blocks(split, setup, step, ids.device, validation_texts)
    if blocks.text:
        ids = validation_texts[blocks.text - 1].ids[0]
    hidden = target.model(ids[None], output_hidden_states=True)
    tapped = [hidden.hidden_states[i + 1] for i in draft.config.target_layer_ids]
    features = torch.cat(tapped, dim=-1)[:, blocks.first : blocks.end].detach()
    distribution = hidden.logits[0].softmax(-1).detach()  # distribution[i]: of the token at i + 1
    total, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    for anchor, keep in zip(blocks.anchors[0].tolist(), blocks.keep[0].tolist(), strict=True):
        if not keep:
            continue
        one = torch.tensor([[anchor - blocks.first]])
        block = torch.full((1, size), draft.config.mask_token_id)
        block[0, 0] = ids[anchor]
        # positions are relative within a window here, which rotary attention cannot tell
        logits = target.lm_head(draft.multi_anchor(features, target.embed(block), one))[0]  # [K, V]
        q = logits.softmax(-1)
        losses, confidences = [], []
        for slot in range(1, size):
            at = anchor + slot
            if at >= blocks.end:
                break
            p = distribution[at - 1]
            if setup.labels == "context":
                losses.append(-q[slot, ids[at]].log())
                confidences.append(float(q[slot, ids[at]].detach()))
            elif setup.loss_kind == "argmax":
                losses.append(-q[slot, p.argmax()].log())
                confidences.append(float(q[slot, p.argmax()].detach()))
            else:
                cross = -(p * q[slot].log()).sum()
                losses.append(cross if setup.loss_kind == "ce" else cross + (p * p.log()).sum())
                confidences.append(float(torch.minimum(p, q[slot]).sum().detach()))
        for j, loss in enumerate(losses):
            if setup.weighting == "dpace":
                smooth = [(1 - setup.dpace_alpha) * c + setup.dpace_alpha for c in confidences]
                weight = sum(
                    float(torch.tensor(smooth[: m + 1], dtype=torch.float64).prod()) for m in range(j, len(losses))
                )
            else:
                weight = float(torch.exp(torch.tensor(-j / (setup.decay_gamma or size / 2), dtype=torch.float64)))
            total = total + weight * loss
            weight_sum += weight
    return total / weight_sum


CASES = [
    {"labels": "context"},
    {"labels": "context", "weighting": "dpace"},
    {"labels": "target"},
    {"labels": "target", "loss": "ce", "decay_gamma": 1.5},
    {"labels": "target", "loss": "argmax"},
    {"labels": "target", "weighting": "dpace", "dpace_alpha": 0.3},
    {"labels": "target", "modules": ["fc"]},
    {"labels": "target", "attention": "sdpa"},
    {"labels": "context", "attention": "dense", "window": 25},
    {"labels": "target", "modules": ["k_proj", "v_proj"]},
    {"labels": "context", "query_only": True},
    {"labels": "target", "gradient_checkpointing": True},
    {"labels": "target", "gradient_checkpointing": True, "modules": ["k_proj", "v_proj"]},
    {"labels": "target", "gradient_checkpointing": True, "train_texts": 1, "window": 25},
    {"labels": "target", "window": 20},
    {"labels": "context", "window": 20, "modules": ["q_proj"]},
    {"labels": "target", "repeats": 2},
    {"labels": "target", "train_texts": 2},
    {"labels": "context", "train_texts": 1, "window": 20},
    {"labels": "target", "train_texts": 1, "repeats": 2, "query_only": True},
    {"labels": "target", "train_texts": 2, "modules": ["k_proj", "o_proj"]},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_loss_and_gradients_equal_the_naive_ones(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgd_lightning.draft.model.CONTEXT_PIECE", 16)
    pair, ids = make_pair(), context()
    setup = config(chunk=5, **changes)
    step = 3 if setup.train_texts else 2  # every second step is one on validation texts
    material = gather(pair, ids, setup)
    ids = ids.repeat(setup.repeats)
    lora = DraftLora(pair.draft, rank=4, alpha=8, modules=setup.modules, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in lora.parameters():  # B too: at zero, A would have no gradient
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    ours = material.problem(pair, setup, lora).loss(step)
    gradients = torch.autograd.grad(ours, lora.parameters())
    pair.draft.gradient_checkpointing = False
    theirs = naive_loss(pair, ids, setup, step, material.validation_texts.trained)
    expected = torch.autograd.grad(theirs, lora.parameters())
    assert ours.item() == pytest.approx(theirs.item(), rel=RELATIVE)
    for a, b in zip(gradients, expected, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= RELATIVE * b.norm()


class Sum:
    """A sum over ranks that run one after the other: first it is taken up, then given."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def __call__(self, part: Tensor) -> Tensor:
        self.value = float(part)
        return part

    def give(self, part: Tensor) -> Tensor:
        return torch.full_like(part, self.value)


def test_ranks_together_make_the_loss_of_one() -> None:
    pair, ids = make_pair(), context()
    for weighting in ("decay", "dpace"):
        setup = config(weighting=weighting)
        lora = DraftLora(pair.draft, rank=4, alpha=8, modules=setup.modules, seed=0)
        split = split_context(len(ids), pair.draft.config.block_size, setup)
        problem = AdaptProblem(pair, read_context(pair, ids, setup, split), split, setup, lora)
        sums = [Sum(), Sum()]
        for rank in range(2):
            problem.loss(1, rank=rank, ranks=2, reduce=sums[rank])
        both = Sum(sums[0].value + sums[1].value)  # what all_reduce would give
        parts = [problem.loss(1, rank=rank, ranks=2, reduce=both.give) for rank in range(2)]
        assert (sum(parts) / 2).item() == pytest.approx(problem.loss(1).item(), rel=1e-6)
        lora.remove()
