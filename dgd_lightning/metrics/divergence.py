"""How much target and readout differ at every token, and how much guidance changed the target: pure functions.

A torchmetrics wrapper averages the numbers by groups: token classes, positions, contexts.
"""

import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from dgd_lightning.distributions import entropy, js_divergence, kl_divergence, total_variation, wide

TokenClass = Literal["word", "number", "punctuation", "whitespace", "special", "partial"]
SPECIAL = re.compile(r"<[^<>\s]+>")


class TokenDivergence(NamedTuple):
    """Numbers of Q tokens, [Q] each; distributions are those of the logits, before temperature and filters."""

    kl_target_readout: Tensor  # KL(target ‖ readout) in nats
    kl_readout_target: Tensor
    js: Tensor  # of target and readout, in nats, at most ln 2
    tv: Tensor  # total variation of target and readout, 0 … 1
    agree: Tensor  # whether both have the same top-1 token
    target_entropy: Tensor  # in nats
    readout_entropy: Tensor
    target_rank: Tensor  # of the emitted token: 1 is the top-1 token; equally likely ones share a rank
    readout_rank: Tensor
    target_prob: Tensor  # of the emitted token
    readout_prob: Tensor
    guided_prob: Tensor
    argmax_changed: Tensor  # whether guidance changed the top-1 token
    tv_target_guided: Tensor  # total variation of target and guided distribution: how much guidance changed


def token_divergence(target: Tensor, readout: Tensor, guided: Tensor, tokens: Tensor) -> TokenDivergence:
    """Compare the distributions that tokens were chosen from.

    Args:
        target, readout, guided: [Q, V] logits.
        tokens: [Q] emitted tokens.
    """
    p, r, g = (wide(logits).log_softmax(-1) for logits in (target, readout, guided))  # [Q, V]
    first = p.argmax(-1)
    p_own, r_own, g_own = (log_p.gather(-1, tokens[:, None]) for log_p in (p, r, g))  # [Q, 1]
    return TokenDivergence(
        kl_target_readout=kl_divergence(p, r).clamp(min=0),  # rounding leaves equal distributions a little below 0
        kl_readout_target=kl_divergence(r, p).clamp(min=0),
        js=js_divergence(p, r),
        tv=total_variation(p, r),
        agree=first == r.argmax(-1),
        target_entropy=entropy(p),
        readout_entropy=entropy(r),
        target_rank=(p > p_own).sum(-1) + 1,
        readout_rank=(r > r_own).sum(-1) + 1,
        target_prob=p_own[:, 0].exp(),
        readout_prob=r_own[:, 0].exp(),
        guided_prob=g_own[:, 0].exp(),
        argmax_changed=g.argmax(-1) != first,
        tv_target_guided=total_variation(p, g),
    )


def token_class(text: str) -> TokenClass:
    """What kind of token a text is, by the first rule that fits.

    ``special``: one pair of angle brackets around everything, as ``<|im_end|>`` or ``</s>``. ``partial``: nothing, or a
    replacement character: the token ends inside a character. ``whitespace``: only whitespace. ``word``: has a letter.
    ``number``: has a digit. ``punctuation``: all else.
    """
    if SPECIAL.fullmatch(text):
        return "special"
    if not text or "\ufffd" in text:
        return "partial"
    if text.isspace():
        return "whitespace"
    if any(map(str.isalpha, text)):
        return "word"
    return "number" if any(map(str.isnumeric, text)) else "punctuation"


class GroupedMeans(Metric):
    """Means of several numbers in each of G groups, pooled over everything that was added on all ranks.

    Args:
        groups: G.
        numbers: n, numbers per token.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, groups: int, numbers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(groups, numbers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, values: Tensor, groups: Tensor) -> None:
        """Adds the values [Q, n] of tokens, and the group of each [Q], 0 … G − 1."""
        groups = groups.to(self.counts.device)
        self.sums.index_add_(0, groups, values.to(self.sums))
        self.counts += torch.bincount(groups, minlength=len(self.counts))

    def compute(self) -> Tensor:
        """[G, n] means; NaN where a group has no token."""
        return self.sums / self.counts[:, None]
