"""What the tests of output distributions share: a stub pair, a walk over every outcome, exact results.

The stub keeps the contract of Target and DFlashDraft and nothing else: the target's logits are a table over (position,
last two tokens), the draft's one over (anchor, its token, slot). So every probability is known in fp64.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgd_lightning.decode.batch import Batch
from dgd_lightning.decode.random_source import STREAMS, Stream
from dgd_lightning.decode.sampling import probabilities, sampling_params
from dgd_lightning.decode.session import Session
from dgd_lightning.pair import Pair
from dgd_lightning.types import Prefill, TargetStep

TV_TOLERANCE = 1e-12  # the bound: sums of some 1e5 fp64 path probabilities, each a product of up to 12 factors
NOTHING = 1e-14  # a probability of 1 may be rounded to less, in one batch and not in another
BUG_IS_SEEN = 1e-3  # a planted bug moves the distribution by far more than rounding


class StubCache:
    """Tokens by position, so that the stub target can look at the last two as a real one looks at its keys."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.tokens = torch.zeros(batch, capacity, dtype=torch.long)

    def select(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]

    def move(self, from_slots: Tensor, to_slots: Tensor) -> None:
        self.tokens.scatter_(1, to_slots, self.tokens.gather(1, from_slots))

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]


class StubTarget:
    """Logits table [P, V, V, V]: (position, token before, token) -> logits of the next token."""

    def __init__(self, vocab: int, seed: int, positions: int = 24) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(positions, vocab, vocab, vocab, generator=generator, dtype=torch.float64)
        self.vocab_size, self.max_positions, self.stop_token_ids = vocab, positions, ()
        self.device, self.dtype, self.hidden_size = torch.device("cpu"), torch.float64, 1

    def new_cache(self, batch: int, capacity: int) -> StubCache:
        return StubCache(batch, capacity)

    def step(self, ids: Tensor, positions: Tensor, cache: StubCache, *, max_length: int, **_: Any) -> TargetStep:
        cache.tokens.scatter_(1, positions, ids)
        assert int(positions.max()) < max_length
        before = cache.tokens.gather(1, (positions - 1).clamp(min=0))
        logits = self.table[positions.clamp(max=len(self.table) - 1), before, ids]
        return TargetStep(logits, torch.zeros(*ids.shape, 1))

    def prefill(self, ids: Tensor, lengths: Any, cache: StubCache, *, on_features: Any = None, **_: Any) -> Prefill:
        lengths = torch.as_tensor(lengths)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        step = self.step(ids, positions, cache, max_length=ids.shape[1])
        if on_features is not None:
            on_features(step.features, positions)
        return Prefill(step.logits[torch.arange(len(ids)), lengths - 1], None, lengths)

    def embed(self, ids: Tensor) -> Tensor:
        return ids[..., None].double()

    def lm_head(self, hidden: Tensor) -> Tensor:
        return hidden


class StubDraft:
    """Logits table [P, V, K, V]: (anchor, anchor token, slot) -> logits at anchor + slot."""

    def __init__(self, vocab: int, block_size: int, seed: int, positions: int = 24) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(positions, vocab, block_size, vocab, generator=generator, dtype=torch.float64)
        self.config = SimpleNamespace(block_size=block_size, mask_token_id=vocab - 1, target_layer_ids=(0,))

    def new_cache(self, batch: int, capacity: int) -> StubCache:
        return StubCache(batch, capacity)

    def extend(self, cache: StubCache, features: Tensor, positions: Tensor) -> None:
        assert features.shape[:2] == positions.shape == (len(cache.tokens), positions.shape[1])

    def block(
        self,
        cache: StubCache,
        embeddings: Tensor,
        anchors: Tensor,
        *,
        longest_anchor: int,
        keep_cache: bool = False,
        slot: int | None = None,
    ) -> Tensor:
        assert int(anchors.max()) <= longest_anchor
        size = embeddings.shape[1] // anchors.shape[1]  # K
        tokens = embeddings[:, ::size, 0].long()  # [B, N], each block's first
        slots = self.table[anchors.clamp(max=len(self.table) - 1), tokens]  # [B, N, K, V]
        return slots[:, :, :size].flatten(1, 2) if slot is None else slots[:, :, slot]


def stub_pair(vocab: int, block_size: int, seed: int = 0) -> Any:
    return Pair(StubTarget(vocab, seed), StubDraft(vocab, block_size, seed + 1), None)  # type: ignore[arg-type]


class Explorer:
    """Walks every outcome: row b follows ``scripts[b]``, and takes the first way at draws beyond its script.

    Each (stream, position) is one uniform, as in the real table: it starts as the interval [0, 1), a draw cuts it to
    the part that gives the chosen outcome, and a later draw from the same number is cut out of that part. So a number
    that entered the output twice would show as a wrong distribution. A row has the product of its intervals as
    probability.
    """

    def __init__(self, scripts: list[list[int]], limit: int) -> None:
        self.paths = [Path(script) for script in scripts]
        self.limit, self.rows = limit, list(range(len(scripts)))
        self.batch: Batch | None = None  # whose finished rows draw no more: what they would draw means nothing

    def select(self, rows: Tensor) -> Explorer:
        some = copy.copy(self)  # the paths are those of all
        some.rows = [self.rows[i] for i in rows.tolist()]
        return some

    def renewed(self, rows: Tensor, seeds: Any) -> Explorer:
        for i in rows.tolist():
            self.paths[self.rows[i]].step += 1
        return self

    def categorical(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        edges = (probs.cumsum(-1) / probs.sum(-1, keepdim=True)).tolist()
        return torch.tensor(self._walk(edges, stream, positions))

    def bernoulli(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        edges = torch.stack([probs, torch.ones_like(probs)], dim=-1).tolist()  # outcome 0 is true
        return torch.tensor(self._walk(edges, stream, positions)) == 0

    def _walk(self, edges: list[list[list[float]]], stream: Stream, positions: Tensor) -> list[list[int]]:
        at = positions.tolist()
        over = [False] * len(self.rows)
        if self.batch is not None and stream < STREAMS:  # a chain's step is decided when its proposal is finished
            over = self.batch.done.tolist()
        return [
            [
                self.paths[row].choose(slot_edges, (stream, position)) if position < self.limit and not done else 0
                for slot_edges, position in zip(edges[i], at[i], strict=True)
            ]
            for i, (row, done) in enumerate(zip(self.rows, over, strict=True))
        ]


def watch_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let explorers know their batches, so that thousands of paths of different lengths can be walked together."""
    begin = Batch.__init__

    def made(self: Batch, session: Session, **options: Any) -> None:
        if session.request.random_source is not None:
            session.request.random_source.batch = self  # type: ignore[attr-defined]
        begin(self, session, **options)

    monkeypatch.setattr(Batch, "__init__", made)


class Path:
    """One row's choices: the digits taken, how many ways there were at each, and every uniform's interval."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.digits, self.ways = script, list[int](), list[int]()
        self.intervals: dict[tuple[int, int, int], tuple[float, float]] = {}
        self.step = 0  # of a chain: every one has numbers of its own

    def choose(self, edges: list[float], number: tuple[int, int]) -> int:
        key = (*number, self.step)
        low, high = self.intervals.get(key, (0.0, 1.0))
        below = [0.0, *edges[:-1]]
        parts = [(max(low, a), min(high, b)) for a, b in zip(below, edges, strict=True)]
        open_ways = [i for i, (a, b) in enumerate(parts) if b - a > NOTHING]
        digit = self.script[len(self.digits)] if len(self.digits) < len(self.script) else 0
        self.digits.append(digit)
        self.ways.append(len(open_ways))
        self.intervals[key] = parts[open_ways[digit]]
        return open_ways[digit]

    def probability(self) -> float:
        product = 1.0
        for low, high in self.intervals.values():
            product *= high - low
        return product


def output_law(generate: Any, pair: Any, prompt: list[int], tokens: int, rows: int = 8192, **knobs: Any) -> dict:
    """Exact distribution {tokens: probability} of a decoder, every path walked once, thousands of paths to a batch."""
    distribution: dict[tuple[int, ...], float] = {}
    frontier: list[list[int]] = [[]]
    while frontier:
        scripts, frontier = frontier[:rows], frontier[rows:]
        explorer = Explorer(scripts, len(prompt) + tokens)
        prompts = [torch.tensor(prompt)] * len(scripts)
        outputs = generate(pair, prompts, max_new_tokens=tokens, random_source=explorer, seed=0, **knobs)
        for script, path, output in zip(scripts, explorer.paths, outputs, strict=True):
            key = tuple(output.tokens.tolist())
            distribution[key] = distribution.get(key, 0.0) + path.probability()
            for depth in range(len(script), len(path.digits)):  # the ways not taken are scripts of their own
                frontier += [[*path.digits[:depth], way] for way in range(1, path.ways[depth])]
    return distribution


def target_law(pair: Any, prompt: list[int], tokens: int, stops: tuple[int, ...] = (), **knobs: Any) -> dict:
    """The target's own distribution, straight from its table."""
    distributions = probabilities(pair.target.table, sampling_params(**knobs))  # [P, V, V, V]
    distribution = {(): 1.0}
    for _ in range(tokens):
        longer: dict[tuple[int, ...], float] = {}
        for path, mass in distribution.items():
            if path and path[-1] in stops:
                longer[path] = mass
                continue
            text = [*prompt, *path]
            row = distributions[len(text) - 1, text[-2], text[-1]]
            longer |= {(*path, token): mass * float(row[token]) for token in range(len(row)) if row[token] > 0}
        distribution = longer
    return distribution


def total_variation(a: dict, b: dict) -> float:
    return 0.5 * sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys())
