"""Distributions over a vocabulary and how far they lie apart: pure functions of log-probabilities, in fp32 or wider.

And which real numbers a device has for them.
"""

import math

import torch
from torch import Tensor


def wide(logits: Tensor) -> Tensor:
    """The same numbers in fp32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def entropy(log_p: Tensor) -> Tensor:
    """Shannon entropy in nats; log-probabilities [.., V], fp32 or wider -> [..]."""
    return -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats; [.., V] -> [..]."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen–Shannon divergence in nats, 0 … ln 2; [.., V] -> [..]."""
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((kl_divergence(log_p, middle) + kl_divergence(log_q, middle)) / 2).clamp(min=0)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation, half the L1 distance of the probabilities, 0 … 1; [.., V] -> [..]."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def real_dtype(device: torch.device) -> torch.dtype:
    """The widest real numbers that a device computes with: fp64, or fp32 where there is none (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniforms_on(uniforms: Tensor, device: torch.device) -> Tensor:
    """Uniforms in [0, 1) on a device, in its :func:`real_dtype`; narrowing rounds none of them up to 1."""
    dtype = real_dtype(device)
    narrowed = uniforms.to(dtype)  # before the move: a device without fp64 takes none
    return narrowed.clamp(max=1 - torch.finfo(dtype).eps / 2).to(device)
