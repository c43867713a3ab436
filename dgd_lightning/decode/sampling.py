"""From logits to a distribution and from one uniform to a token; nothing here draws a random number itself."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer, check_number
from dgd_lightning.distributions import real_dtype, wide

MIN_TEMPERATURE = 1e-4  # below it fp32 logits overflow when divided, and the distribution is the argmax's anyway


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
    check_integer("top_k", top_k, optional=True, hint="leave it out")
    check_number("top_p", top_p, above=0, most=1, optional=True, hint="leave it out")
    return SamplingParams(float(temperature), top_k, None if top_p is None else float(top_p))


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that a token is drawn from: temperature, then top-k, then top-p, then renormalised.

    Logits [.., V] of any float dtype give [.., V] in fp32 or wider; temperature 0 gives the argmax's one-hot vector.
    """
    logits = wide(logits)  # [.., V]
    if params.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    scaled = (logits - logits.amax(-1, keepdim=True)) / params.temperature  # [.., V], at most 0: cannot overflow
    if params.top_k is not None and params.top_k < scaled.shape[-1]:
        smallest_kept = scaled.topk(params.top_k, dim=-1).values[..., -1:]  # [.., 1]
        scaled = scaled.masked_fill(scaled < smallest_kept, -math.inf)
    if params.top_p is not None and params.top_p < 1.0:
        # Stable, so that equal logits are cut in the order of their ids, whatever the batch.
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        before = mass.cumsum(-1) - mass  # [.., V], mass of all likelier tokens; 0 for the first, so one always stays
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= params.top_p)
        scaled = scaled.masked_fill(dropped, -math.inf)
    return scaled.softmax(-1)


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
    """log Σ_v p(v)^(1/T) of log-probabilities [.., V]: what ``p^(1/T)`` is divided by for a draw. 0 where T is 0."""
    if params.greedy:
        return torch.zeros_like(log_p[..., 0])
    return (log_p / params.temperature).logsumexp(-1)
