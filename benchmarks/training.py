"""What training a draft costs: CPU-seconds per supervised slot, before and after, part by part.

    python benchmarks/training.py [--shape smollm2] [--target FOLDER --data ROWS] [--device cuda]

Two arms, alternating in one run on the same batches and draft: *before* pads all conversations of a batch to the
longest, and each one's blocks to the number of anchors, runs all of the target's layers into a cache, sends all slots
through the head, and makes logits once more in the backward pass; *after* is the library. A slot is supervised where it
has weight in the loss. Without ``--target`` the pair is the bundled one, or with ``--shape smollm2`` a random one of
SmolLM2-135M's widths (30 layers of 576, 49,152 tokens) on random conversations of its lengths. Prints a table and ends
with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from dgd_lightning.data.responses import Conversation, ResponseBatch, ResponsesData, pad_responses
from dgd_lightning.draft.objective import BlockLoss, block_loss, decay_weights
from dgd_lightning.lab.draft_data import DraftStage, LabDraftData
from dgd_lightning.modules import draft_training
from dgd_lightning.modules.draft_training import DraftTraining, rows_alike
from dgd_lightning.pair import Pair, load_pair
from dgd_lightning.target.model import Target

PARTS = ("target", "draft", "head", "backward", "optimiser")
ARMS = ("before", "after")


def padded(part: Callable[..., BlockLoss], most: int) -> Callable[..., BlockLoss]:
    """The loss of rows that all have ``most`` blocks, however few are kept."""

    def run(input_ids: Tensor, loss_mask: Tensor, anchors: Tensor, keep: Tensor) -> BlockLoss:
        blocks = (torch.nn.functional.pad(x, (0, most - x.shape[1])) for x in (anchors, keep))
        return part(input_ids, loss_mask, *blocks)

    return run


def whole_loss(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    loss_mask: Tensor,
    anchors: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    gamma: float,
) -> BlockLoss:
    """The loss of every slot, 2,048 at a time, by logits that the backward pass makes again."""
    length = input_ids.shape[1]
    where = anchors[..., None] + torch.arange(1, block_size, device=anchors.device)  # [B, N, K−1]
    flat = where.clamp(max=length - 1).flatten(1)
    labels, mask = input_ids.gather(1, flat).flatten(), loss_mask.gather(1, flat).view_as(where)
    counted = keep[..., None] & (where < length) & (mask > 0)
    weights = decay_weights(counted, gamma).flatten()
    states = hidden.unflatten(1, (-1, block_size))[:, :, 1:].flatten(0, 2)  # [B·N·(K−1), H]

    def part(states: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(states).float()
        nll = logits.logsumexp(-1) - logits.gather(1, labels[:, None]).squeeze(1)
        return (nll * weights).sum(), logits.argmax(-1) == labels

    pieces = zip(*(x.split(2048) for x in (states, labels, weights)), strict=True)
    parts = [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
    total = torch.stack([loss for loss, _ in parts]).sum()
    right = (torch.cat([hit for _, hit in parts]).view_as(counted) & counted).sum(dim=(0, 1))
    count = counted.sum(dim=(0, 1))
    return BlockLoss(total / weights.sum(), weights.sum(), right.sum() / count.sum(), right / count, count)


def whole_features(target: Target, ids: Tensor, layer_ids: Sequence[int]) -> Tensor:
    """By a prefill, all layers and the cache with it."""
    batch, length = ids.shape
    cache = target.new_cache(batch, length)
    more: dict[str, Any] = {"layer_ids": layer_ids, "chunk_size": length, "keep_features": True}
    found = target.prefill(ids, [length] * batch, cache, **more).features
    assert found is not None
    return found


class Clock:
    """Seconds by part; of the CPU, or the clock's on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds[part] += self.now() - began

    def now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted."""

        def run(*args: Any, **more: Any) -> Any:
            with self.of(part):
                return function(*args, **more)

        return run


def step(
    training: DraftTraining, optimizer: torch.optim.Optimizer, batch: ResponseBatch, number: int, arm: str
) -> dict[str, float]:
    """One step: its seconds by part, its supervised slots and loss."""
    device = training.pair.target.device
    clock = Clock(device)
    loss, part, rows, features = block_loss, training._part, rows_alike, training.pair.target.features
    if arm == "before":
        part = padded(part, training.num_anchors)
        loss, features = whole_loss, partial(whole_features, training.pair.target)
        rows = lambda lengths: [list(range(len(lengths)))]  # noqa: E731
    with ExitStack() as patched:
        for place, name, value in (
            (draft_training, "block_loss", clock.timed("head", loss)),
            (draft_training, "rows_alike", rows),
            (training, "_part", part),
            (training.pair.target, "features", clock.timed("target", features)),
            (training.draft, "multi_anchor", clock.timed("draft", training.draft.multi_anchor)),
        ):
            patched.enter_context(mock.patch.object(place, name, value))
        generator = torch.Generator().manual_seed(number)
        found = training(*(x.to(device) for x in batch), generator)
    with clock.of("backward"):
        found.loss.backward()
    with clock.of("optimiser"):
        torch.nn.utils.clip_grad_norm_(training.draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return clock.seconds | {"slots": int(found.per_slot_count.sum()), "loss": float(found.loss.detach())}


def made_pair(args: argparse.Namespace) -> Pair:
    """The target, and no draft: `DraftTraining` makes one."""
    if args.shape == "bundled" or args.target:
        return load_pair(args.target or "lab", None, dtype=args.dtype, device=args.device)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return Pair(Target(model.to(args.device, getattr(torch, args.dtype))), None, None)


def conversations(args: argparse.Namespace, pair: Pair) -> list[Conversation]:
    """Of the given rows, the lab's, or random ones of SmolLM2's lengths."""
    if args.data:
        data = ResponsesData(args.data, args.target, args.batch_size, val_share=0)
        data.setup("fit")
        assert data.train_set is not None
        return data.train_set
    if args.shape == "bundled":
        lab = LabDraftData("lab", [DraftStage(1, 512, (5, 16), 0.7)], generation_batch=128)
        lab.setup("fit")
        assert lab.dataset is not None
        return lab.dataset
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> Tensor:
        return torch.randint(pair.target.vocab_size - 1, (count,), generator=generator)

    lengths = torch.rand(512, 2, generator=generator)  # its own answers: 23 to 257 tokens, a third of them cut there
    return [(some(40 + int(60 * a)), some(min(257, 23 + int(351 * b)))) for a, b in lengths.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("bundled", "smollm2"), default="bundled")
    parser.add_argument("--target", help="folder or Hub id, with --data")
    parser.add_argument("--data", help="rows with the target's answers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--anchors", type=int)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=8, help="of each arm, behind one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bundled = args.shape == "bundled" and not args.target
    for name, usual in (("batch_size", (16, 4)), ("anchors", (32, 512)), ("block_size", (8, 16)), ("layers", (4, 5))):
        setattr(args, name, getattr(args, name) or usual[not bundled])
    pair = made_pair(args)
    training = DraftTraining(
        "made below",
        num_layers=args.layers,
        block_size=args.block_size,
        target_layer_ids=[0, 1, 2, 3, 4] if bundled else None,
        mask_token_id=pair.target.vocab_size - 1,
        num_anchors=args.anchors,
    )
    training._trainer = None
    with mock.patch.object(training.source, "load", return_value=pair):
        training.configure_model()
    fresh = {name: value.clone() for name, value in training.draft.state_dict().items()}
    data = conversations(args, pair)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    optimizers = {}
    for number in range(args.steps + 1):
        for arm in ARMS:  # weights start anew: what is timed does not depend on them
            training.draft.load_state_dict(fresh)
            optimizer = optimizers.setdefault(arm, torch.optim.AdamW(training.draft.parameters(), lr=1e-4))
            batch = pad_responses([data[index] for index in batches[number % len(batches)]])
            found = step(training, optimizer, batch, number, arm)
            if number > 0:
                rows[arm].append(found)
    print(f"{args.target or args.shape}, {args.device}, {args.dtype}, {args.threads} threads; steps of ", end="")
    print(f"{args.batch_size} conversations, up to {args.anchors} blocks of {args.block_size}, {args.layers} layers")
    print("".join(f"{title:>11}" for title in ("arm", "slots", "s a step", "ms a slot", *PARTS)))
    costs = {}
    for arm, found in rows.items():
        slots = sum(row["slots"] for row in found)
        parts = {part: 1000 * sum(row[part] for row in found) / slots for part in PARTS}
        cost = costs[arm] = {"ms_per_slot": sum(parts.values()), **parts, "slots": slots / len(found)}
        seconds = cost["ms_per_slot"] * cost["slots"] / 1000
        cells = (arm, f"{cost['slots']:.0f}", f"{seconds:.2f}", f"{cost['ms_per_slot']:.4f}")
        print("".join(f"{cell:>11}" for cell in (*cells, *(f"{value:.4f}" for value in parts.values()))))
    apart = max(abs(one["loss"] - other["loss"]) for one, other in zip(*rows.values(), strict=True))
    print(f"losses of the same batches differ by {apart:.1e} at most")
    ratio = costs["after"]["ms_per_slot"] / costs["before"]["ms_per_slot"]
    print(f"after / before {ratio:.3f}")
    print(json.dumps({"benchmark": "training", **vars(args), "costs": costs, "ratio": ratio}))


if __name__ == "__main__":
    main()
