"""From logits to a distribution and from one uniform to a token; nothing here draws a random number itself."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgd_lightning.checks import check_integer, check_number
from dgd_lightning.distributions import real_dtype, wide
from dgd_lightning.errors import LEAVE_OUT

MIN_TEMPERATURE = 1e-4  # below it fp32 logits overflow when divided, and the distribution is the argmax's anyway
CACHED = 32  # rows at a time on a CPU: a vocabulary of some ten thousand tokens stays in its caches
GRAIN = 2.0**40  # units in the mass of the likeliest token: int64 holds the sum of 2²² such tokens


class SamplingParams(NamedTuple):
    """How a token is drawn."""

    temperature: float = 0.0  # 0: greedy, the one token with the largest logit; otherwise at least MIN_TEMPERATURE
    top_k: int | None = None  # keep the k largest logits, and whatever ties with the smallest kept; None: all
    top_p: float | None = None  # in (0, 1]: keep the smallest set of likeliest tokens that holds this mass; None: all

    @property
    def greedy(self) -> bool:
        """True where no random number is needed."""
        return self.temperature == 0.0


GREEDY = SamplingParams()


def sampling_params(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> SamplingParams:
    """Check the three knobs and pack them."""
    if check_number("temperature", temperature, least=0, hint="use 0 for greedy decoding or e.g. 1.0") != 0:
        check_number("temperature", temperature, least=MIN_TEMPERATURE, hint="use 0 for greedy decoding")
    check_integer("top_k", top_k, optional=True, hint=LEAVE_OUT)
    check_number("top_p", top_p, above=0, most=1, optional=True, hint=LEAVE_OUT)
    return SamplingParams(float(temperature), top_k, None if top_p is None else float(top_p))


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that a token is drawn from: temperature, then top-k, then top-p, then renormalised.

    Logits [.., V] of any float dtype give [.., V] in fp32 or wider; temperature 0 gives the argmax's one-hot vector.
    """
    rows = wide(logits).reshape(-1, logits.shape[-1])  # [n, V]
    if params.greedy:
        return torch.zeros_like(rows).scatter_(-1, rows.argmax(-1, keepdim=True), 1.0).view(logits.shape)
    scaled, ranked = (rows - rows.amax(-1, keepdim=True)).div_(params.temperature), None  # at most 0: no overflow
    if params.top_k is not None and params.top_k < rows.shape[-1]:
        ranked = scaled.topk(params.top_k).values  # [n, k]
        scaled.masked_fill_(scaled < ranked[:, -1:], -math.inf)
    if params.top_p is None or params.top_p == 1.0:
        return scaled.softmax(-1).view(logits.shape)
    if asking_waits(scaled.device):
        return nucleus(scaled, params.top_p, ranked, waits=True).view(logits.shape)
    parts = scaled.split(CACHED)
    return torch.cat([nucleus(part, params.top_p, waits=False) for part in parts]).view(logits.shape)


def asking_waits(device: torch.device) -> bool:
    """Whether a branch on what tensors hold makes the host wait for their device."""
    return device.type != "cpu"


def halved_sum(numbers: Tensor) -> Tensor:
    """Sum over the last dimension, [.., V] -> [.., 1], in an order that depends on V only, not on device or batch.

    Again and again the second half is added to the first one, entry by entry, and an odd last entry to the first.
    """
    while (size := numbers.shape[-1]) > 1:
        half = size // 2
        sums = numbers[..., :half] + numbers[..., half : 2 * half]
        if size % 2:
            sums[..., :1] += numbers[..., -1:]
        numbers = sums
    return numbers


def nucleus(scaled: Tensor, top_p: float, ranked: Tensor | None = None, *, waits: bool) -> Tensor:
    """Probabilities [n, V] of logits, 0 outside of the smallest set of likeliest tokens that holds the mass ``top_p``.

    A token is inside if the mass before it, of all likelier tokens and of equal ones with lower ids, is less than
    ``top_p`` of the whole, which is the `halved_sum` of exp(logit). Masses before a token are sums of whole multiples
    of 1 / GRAIN, exact in every order.

    Args:
        scaled: at most 0, and 0 for the likeliest token.
        ranked: [n, k], largest first, where all but these k logits and those equal to the last of them are -inf.
        waits: whether to ask a device how many tokens can be inside would wait for it. Then all are sorted, or
            ``ranked`` is read; on a CPU only tokens that can be inside are sorted, row by row.
    """
    weights = scaled.exp()  # [n, V]
    whole = halved_sum(weights).to(real_dtype(scaled.device))  # [n, 1]
    needed = (whole * (top_p * GRAIN)).ceil().long()
    if waits:
        ranked = scaled.sort(dim=-1, descending=True).values if ranked is None else ranked
        weights.masked_fill_(~inside(scaled, *edge_of(ranked, needed)), 0)
        return weights.div_(halved_sum(weights))
    # V tokens below this mass have less than half of what may be outside: none of them is inside. 1e-5 is more than
    # all rounding.
    least = (whole * (max((1 - top_p) / 2 - 1e-5, 0) / scaled.shape[-1])).log().to(scaled.dtype)
    probs = torch.zeros_like(weights)
    for into, mass, ids in zip(probs.numpy(), weights.numpy(), insides(scaled, least, needed), strict=True):
        members = mass[ids]
        into[ids] = members / members.sum()
    return probs


def insides(scaled: Tensor, least: Tensor, needed: Tensor) -> Iterator[np.ndarray]:
    """Ids inside the nucleus of each row of logits [n, V] on a CPU, from those of ``least`` [n, 1] and more.

    Of NaN there are none. In NumPy, whose loops stay on one thread: of so small pieces PyTorch's threads would mostly
    wait for each other.

    Args:
        needed: [n, 1] mass that must be inside, in units of 1 / GRAIN.
    """
    likely = [(~(row < bound)).nonzero()[0] for row, bound in zip(scaled.numpy(), least.numpy(), strict=True)]
    found = [row[ids] for row, ids in zip(scaled.numpy(), likely, strict=True)]
    ranked = [-np.sort(-own) for own in found]  # largest first
    mass = (torch.from_numpy(np.concatenate(ranked)).exp_() * GRAIN).long().numpy()
    start = 0
    for ids, own, order, need in zip(likely, found, ranked, needed.numpy(), strict=True):
        parts = mass[start : start + len(order)]
        start += len(order)
        last = max(int((parts.cumsum() - parts).searchsorted(need)[0]) - 1, 0)
        edge = order[last]
        kept = own >= edge
        if edge == order[min(last + 1, len(order) - 1)]:  # of equal ones the first, in the order of their ids
            kept[(own == edge).nonzero()[0][(order[: last + 1] == edge).sum() :]] = False
        yield ids[kept]


class Edge(NamedTuple):
    """Where the nucleus ends, on a device that is not asked."""

    logit: Tensor  # [.., 1] the smallest one inside
    equal: Tensor  # [.., 1] how many tokens with this logit are inside


def edge_of(ranked: Tensor, needed: Tensor) -> Edge:
    """From logits [.., m], largest first, and the mass [.., 1] that must be inside, in units of 1 / GRAIN."""
    mass = (ranked.exp() * GRAIN).long()  # [.., m]
    last = (mass.cumsum(-1) - mass < needed).sum(-1, keepdim=True).clamp(min=1) - 1  # [.., 1]; of NaN 0
    edge = ranked.gather(-1, last)
    above = mass.masked_fill(ranked <= edge, 0).sum(-1, keepdim=True)
    own = mass.gather(-1, last).clamp(min=1)
    return Edge(edge, (needed - above + own - 1).div(own, rounding_mode="floor"))  # more may be equal than the m hold


def inside(logits: Tensor, edge: Tensor, equal: Tensor) -> Tensor:
    """Which of the logits [.., m], in the order of their ids, are inside: of those at the edge the first ones."""
    tied = logits == edge
    return (logits > edge) | (tied & (tied.cumsum(-1) <= equal))


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw by inverse CDF, so that one uniform decides one token on every device and in every batch.

    Probabilities [.., V] need not sum to exactly 1; uniforms [..] fp64 in [0, 1) give token ids [..], none of
    probability 0. Of NaN it is the last id: a run is stopped for them at the end of the cycle, and no id may be beyond.
    """
    cdf = probs.cumsum(-1, dtype=real_dtype(probs.device))  # [.., V]
    # The first index whose CDF exceeds u·total; scaling by the total absorbs a sum of 1 ± rounding.
    point = (uniform[..., None] * cdf[..., -1:]).contiguous()  # [.., 1]
    return torch.searchsorted(cdf.contiguous(), point, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def log_normalisers(log_p: Tensor, params: SamplingParams) -> Tensor:
    """log Σ_v p(v)^(1/T) of log-probabilities [.., V], over the tokens that can be drawn: 0 where T is 0.

    So a token v that can be drawn has the probability ``p(v)^(1/T) / Z``.
    """
    if params.greedy:
        return torch.zeros_like(log_p[..., 0])
    powers = log_p / params.temperature
    if params.top_k is not None or params.top_p is not None:
        powers = powers.masked_fill(probabilities(log_p, params) == 0, -math.inf)
    return powers.logsumexp(-1)
