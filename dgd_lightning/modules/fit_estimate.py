"""What a fit of a draft will take, said before it starts: memory by counting tensors, time by counting operations."""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.target.model import Target

STATES = 16  # bytes per trained number: fp32 weight, gradient, and AdamW's two averages
KEPT = 34  # numbers per slot and layer that the backward pass needs, in hidden sizes, beside the MLP's
LOGITS = 2048  # rows of logits, a chunk of 512 with its softmax and gradients
SHARE = 0.5  # of a matrix product's speed that a step reaches: attention, norms and the optimiser take the rest


class FitEstimate(NamedTuple):
    """Of one device."""

    memory: float  # bytes
    step_seconds: float


def estimate_fit(
    target: Target, draft: DFlashDraft, conversations: Sequence[Sequence[Tensor]], batch_size: int, num_anchors: int
) -> FitEstimate:
    """Memory and seconds of a step on the draft's device, for conversations of (prompt [S], answer [T])."""
    config = draft.config
    lengths = [len(prompt) + len(answer) for prompt, answer in conversations]
    tokens = batch_size * sum(lengths) / len(lengths)
    anchors = sum(min(num_anchors, len(answer) - 1) for _, answer in conversations) / len(conversations)
    slots = batch_size * anchors * config.block_size
    trained = sum(weight.numel() for weight in draft.parameters())
    read = [weight for name, weight in target.model.named_parameters() if ".layers." in name]
    deep = (1 + max(config.target_layer_ids)) / target.num_layers  # of the target's layers, that are run
    head = config.hidden_size * config.vocab_size
    forward = 2 * deep * sum(weight.numel() for weight in read) * tokens
    backward = 6 * (trained * slots + head * slots * (1 - 1 / config.block_size))
    wide = KEPT * config.hidden_size + 6 * config.intermediate_size
    kept = 4 * config.num_layers * slots * (config.hidden_size if draft.gradient_checkpointing else wide)
    held = sum(weight.nbytes for weight in target.model.parameters())
    logits = 4 * LOGITS * config.vocab_size
    memory = held + STATES * trained + kept + logits + 4 * tokens * config.num_features
    speed = SHARE * _speed(draft.device, config.hidden_size)
    return FitEstimate(memory, (forward + backward) / speed)


def _speed(device: torch.device, width: int) -> float:
    """Operations a second of a matrix product, measured; fp32, or what autocast makes of it."""
    left, right = torch.ones(512, width, device=device), nn.Linear(width, 4 * width, device=device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(8):
            began = time.perf_counter()
            right(left).sum().item()  # waits for the device
            best = min(best, time.perf_counter() - began)
    return 2 * 512 * width * 4 * width / best


def said(estimate: FitEstimate, steps: int, device: torch.device) -> str:
    """The estimate in words, with a warning where the device has less memory."""
    seconds = estimate.step_seconds * steps
    unit, name = (3600, "h") if seconds > 5400 else (60, "min") if seconds > 90 else (1, "s")
    text = (
        f"estimate:   {estimate.memory / 2**30:.1f} GiB, {seconds / unit:.2g} {name} without validation ({steps:,} "
        f"steps of {estimate.step_seconds:.2g} s); counted, not tried: a factor of two either way is usual"
    )
    room = memory_of(device)
    if room is not None and estimate.memory > room:
        text += f". That is more than the {room / 2**30:.0f} GiB here: lower data.batch_size or model.num_anchors"
    return text


def memory_of(device: torch.device) -> int | None:
    """Bytes of the device, or of the machine; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such question on this system
        return None
