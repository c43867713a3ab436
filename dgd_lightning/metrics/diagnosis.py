"""Does a second reader of the target know better where the target is unsure? Buckets, win rates, a verdict.

Everything here works on answer tokens that are given, with numbers per token: a rank, a log-probability, the target's
confidence, and the context the token belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import ALPHA, FEWEST_CONTEXTS, NAN, Difference, counted, sign_flip

TARGET, DRAFT, ADAPTED = "target", "draft", "draft + TTT"  # names of readers
SHUFFLED, RANDOM = "shuffled features", "random features"
By = Literal["rank", "probability"]
PERCENT = "{:+.0%}"
FEWEST_TOKENS = 30  # in the deciding bucket, below which nothing is said


class Reader(NamedTuple):
    """What one reader made of every token; NaN where it said nothing of it."""

    rank: np.ndarray  # [T], 1 for the top-1 token, see `gold.gold_rank`
    log_probability: np.ndarray  # [T]


class AnswerTokens(NamedTuple):
    """All answer tokens of a run, in one order."""

    context: np.ndarray  # [T] integers; tokens of one context depend on each other
    confidence: np.ndarray  # [T], the target's probability of its own top-1 token
    readers: Mapping[str, Reader]

    def part(self, mask: np.ndarray) -> AnswerTokens:
        """The tokens [T] that the mask names."""
        readers = {name: Reader(one.rank[mask], one.log_probability[mask]) for name, one in self.readers.items()}
        return AnswerTokens(self.context[mask], self.confidence[mask], readers)


class Placement(NamedTuple):
    """Where a reader places the tokens that were right; NaN where it read none."""

    tokens: int
    top_1: float  # share of tokens with rank 1
    median_rank: float
    mean_rank: float  # geometric: one token of rank 10,000 does not drown the others
    probability: float  # mean


class Wins(NamedTuple):
    """One reader against another on the tokens that both read."""

    tokens: int
    contexts: int
    better: float  # share of tokens
    worse: float
    net: Difference  # better − worse
    p: float  # of no difference; where all contexts agree to the last token there is no interval, and yet this


def bucket_of(confidence: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Number of each token's bucket [T]: 0 below the first of the ascending edges; an edge belongs to the one above."""
    return np.searchsorted(np.asarray(edges, dtype=float), confidence, side="right")


def bucket_names(edges: Sequence[float]) -> list[str]:
    """``below 50%``, ``50–80%``, …, ``95% and more``."""
    shown = [f"{100 * edge:g}" for edge in edges]
    between = [f"{low}–{high}%" for low, high in pairwise(shown)]
    return [f"below {shown[0]}%", *between, f"{shown[-1]}% and more"]


def placement(reader: Reader) -> Placement:
    """Sums a reader up over the tokens that it read."""
    read = ~np.isnan(reader.rank)
    ranks = reader.rank[read]
    if not len(ranks):
        return Placement(0, NAN, NAN, NAN, NAN)
    return Placement(
        len(ranks),
        float((ranks == 1).mean()),
        float(np.median(ranks)),
        float(np.exp(np.log(ranks).mean())),
        float(np.exp(reader.log_probability[read]).mean()),
    )


def wins(ours: Reader, theirs: Reader, context: np.ndarray, *, by: By = "rank") -> Wins:
    """Token by token: on how many one reader places the right token better than another, and on how many worse.

    A smaller rank, or a larger probability, is better; equal ones count for neither. ``context``: [T] integers.
    """
    a, b = (one.rank if by == "rank" else -one.log_probability for one in (ours, theirs))
    both = ~(np.isnan(a) | np.isnan(b))
    a, b, context = a[both], b[both], context[both]
    if not len(a):
        return Wins(0, 0, NAN, NAN, Difference(NAN), 1.0)
    better, worse = a < b, a > b
    _, index = np.unique(context, return_inverse=True)
    net, p = sign_flip(np.bincount(index, weights=better.astype(float) - worse), np.bincount(index))
    return Wins(len(a), int(index.max()) + 1, float(better.mean()), float(worse.mean()), net, p)


class Verdict(NamedTuple):
    """Whether it is worth going on with a reader, and why."""

    go: bool
    text: str  # one line in plain words


def verdict(name: str, target: Wins, control: Wins, unsure: str) -> Verdict:
    """GO where a reader places the right token better than the target, and than its null control, both beyond chance.

    Both are compared by rank on the tokens that decide (``unsure``: which these are, in words). The null control is the
    same network fed with random features.
    """
    of = f"{counted(target.tokens, 'token')} of {counted(target.contexts, 'context')}"
    where = f"where the target is unsure (top-1 token {unsure}; {of})"
    if target.tokens < FEWEST_TOKENS or target.contexts < FEWEST_CONTEXTS:
        return Verdict(
            False,
            f"NO-GO: nothing can be said of the {name}, because {where} there are too few tokens: "
            f"{FEWEST_TOKENS} tokens of {FEWEST_CONTEXTS} contexts are the least. Take more contexts.",
        )
    ours = f"it ranks the right token above the target at {target.better:.0%} of them and below at {target.worse:.0%}"
    theirs = f"against random features {control.better:.0%} above, {control.worse:.0%} below"
    numbers = f"{ours} (net {target.net.text(PERCENT)}); {theirs} (net {control.net.text(PERCENT)})"
    beats_target, beats_control = (one.net.value > 0 and one.p <= ALPHA for one in (target, control))
    if beats_target and beats_control:
        return Verdict(True, f"GO: the {name} knows something that the target does not, because {where} {numbers}.")
    reason = {
        (False, True): "it knows no better than the target, though it does read its features",
        (True, False): "what it has over the target, random features have too",
        (False, False): "it knows no better than the target, nor than random features",
    }[beats_target, beats_control]
    return Verdict(False, f"NO-GO: the {name} would not guide, because {reason}: {where} {numbers}.")
