"""The output law of the real loops, enumerated exactly; planted bugs; drafts accepted never, always, sometimes.

Most run over a stub pair of lookup tables, which keeps the contract of Target and DFlashDraft and nothing else: the
target's logits are a table over (position, last two tokens), the draft's one over (anchor, its token, slot). So every
probability is known in fp64.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_draft, make_target
from torch import Tensor

from dgd_lightning.decode import speculative, verify
from dgd_lightning.decode.autoregressive import autoregressive_generate
from dgd_lightning.decode.noise import Stream
from dgd_lightning.decode.sampling import probabilities, sampling_params
from dgd_lightning.decode.speculative import speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.types import Prefill, TargetStep

TV_TOLERANCE = 1e-12  # the bound: sums of some 1e5 fp64 path probabilities, each a product of up to 12 factors
BUG_IS_SEEN = 1e-3  # a planted bug moves the law by far more than rounding


class StubCache:
    """Tokens by position, so that the stub target can look at the last two as a real one looks at its keys."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.tokens = torch.zeros(batch, capacity, dtype=torch.long)

    def select(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]


class StubTarget:
    """Logits table [P, V, V, V]: (position, token before, token) -> logits of the next token."""

    def __init__(self, vocab: int, seed: int, positions: int = 24) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(positions, vocab, vocab, vocab, generator=generator, dtype=torch.float64)
        self.vocab_size, self.max_positions, self.stop_token_ids = vocab, positions, ()
        self.device, self.dtype = torch.device("cpu"), torch.float64

    def new_cache(self, batch: int, capacity: int) -> StubCache:
        return StubCache(batch, capacity)

    def step(self, ids: Tensor, positions: Tensor, cache: StubCache, *, max_length: int, **_: Any) -> TargetStep:
        cache.tokens.scatter_(1, positions, ids)
        assert int(positions.max()) < max_length
        before = cache.tokens.gather(1, (positions - 1).clamp(min=0))
        logits = self.table[positions.clamp(max=len(self.table) - 1), before, ids]
        return TargetStep(logits, torch.zeros(*ids.shape, 1))

    def prefill(self, ids: Tensor, lengths: Tensor, cache: StubCache, *, on_features: Any = None, **_: Any) -> Prefill:
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

    def block(self, cache: StubCache, embeddings: Tensor, anchors: Tensor, *, longest_anchor: int) -> Tensor:
        assert int(anchors.max()) <= longest_anchor
        token = embeddings[:, 0, 0].long()  # [B]
        return self.table[anchors[:, 0], token][:, : embeddings.shape[1]]  # [B, K, V]


def stub_pair(vocab: int, block_size: int, seed: int = 0) -> Any:
    return SimpleNamespace(target=StubTarget(vocab, seed), draft=StubDraft(vocab, block_size, seed + 1), tokenizer=None)


class Explorer:
    """Noise that walks every outcome: row b follows ``scripts[b]``, and takes the first way at draws beyond its script.

    Each (stream, position) is one uniform, as in the real table: it starts as the interval [0, 1), a draw cuts it to
    the part that gives the chosen outcome, and a later draw from the same number is cut out of that part. So a number
    that entered the output twice would show as a wrong law. A row has the product of its intervals as probability.
    """

    def __init__(self, scripts: list[list[int]], limit: int) -> None:
        self.paths = [Path(script) for script in scripts]
        self.limit, self.rows = limit, list(range(len(scripts)))

    def select(self, rows: Tensor) -> Explorer:
        self.rows = [self.rows[i] for i in rows.tolist()]
        return self

    def categorical(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        edges = (probs.cumsum(-1) / probs.sum(-1, keepdim=True)).tolist()
        return torch.tensor(self._walk(edges, stream, positions))

    def bernoulli(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        edges = torch.stack([probs, torch.ones_like(probs)], dim=-1).tolist()  # outcome 0 is true
        return torch.tensor(self._walk(edges, stream, positions)) == 0

    def _walk(self, edges: list[list[list[float]]], stream: Stream, positions: Tensor) -> list[list[int]]:
        at = positions.tolist()
        return [
            [
                self.paths[row].choose(slot_edges, (stream, position)) if position < self.limit else 0
                for slot_edges, position in zip(edges[i], at[i], strict=True)
            ]
            for i, row in enumerate(self.rows)
        ]


class Path:
    """One row's choices: the digits taken, how many ways there were at each, and every uniform's interval."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.digits, self.ways = script, list[int](), list[int]()
        self.intervals: dict[tuple[int, int], tuple[float, float]] = {}

    def choose(self, edges: list[float], key: tuple[int, int]) -> int:
        low, high = self.intervals.get(key, (0.0, 1.0))
        below = [0.0, *edges[:-1]]
        parts = [(max(low, a), min(high, b)) for a, b in zip(below, edges, strict=True)]
        open_ways = [i for i, (a, b) in enumerate(parts) if b > a]
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
    """Exact law {tokens: probability} of a decoder, every path walked once, thousands of paths to a batch."""
    law: dict[tuple[int, ...], float] = {}
    frontier: list[list[int]] = [[]]
    while frontier:
        scripts, frontier = frontier[:rows], frontier[rows:]
        explorer = Explorer(scripts, len(prompt) + tokens)
        prompts = [torch.tensor(prompt)] * len(scripts)
        outputs = generate(pair, prompts, max_new_tokens=tokens, noise=explorer, seed=0, **knobs)
        for script, path, output in zip(scripts, explorer.paths, outputs, strict=True):
            key = tuple(output.tokens.tolist())
            law[key] = law.get(key, 0.0) + path.probability()
            for depth in range(len(script), len(path.digits)):  # the ways not taken are scripts of their own
                frontier += [[*path.digits[:depth], way] for way in range(1, path.ways[depth])]
    return law


def target_law(pair: Any, prompt: list[int], tokens: int, stops: tuple[int, ...] = (), **knobs: Any) -> dict:
    """The target's own law, straight from its table."""
    laws = probabilities(pair.target.table, sampling_params(**knobs))  # [P, V, V, V]
    law = {(): 1.0}
    for _ in range(tokens):
        longer: dict[tuple[int, ...], float] = {}
        for path, mass in law.items():
            if path and path[-1] in stops:
                longer[path] = mass
                continue
            text = [*prompt, *path]
            row = laws[len(text) - 1, text[-2], text[-1]]
            longer |= {(*path, token): mass * float(row[token]) for token in range(len(row)) if row[token] > 0}
        law = longer
    return law


def total_variation(a: dict, b: dict) -> float:
    return 0.5 * sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys())


@pytest.mark.parametrize(
    ("scheme", "vocab", "block_size", "tokens", "knobs"),
    [
        ("rejection", 6, 2, 4, {"temperature": 1.0}),
        ("rejection", 3, 3, 4, {"temperature": 0.7}),
        ("rejection", 4, 3, 3, {"temperature": 1.3, "top_p": 0.9}),
        ("rejection", 6, 4, 4, {"temperature": 1.0, "top_k": 2}),
        ("exact_match", 6, 2, 3, {"temperature": 1.0}),
        ("exact_match", 3, 2, 4, {"temperature": 0.7}),
        ("exact_match", 3, 3, 3, {"temperature": 1.0}),
        ("exact_match", 4, 3, 3, {"temperature": 1.3, "top_p": 0.9}),
        ("exact_match", 6, 4, 4, {"temperature": 1.0, "top_k": 2}),
    ],
)
def test_law_is_the_targets(scheme: str, vocab: int, block_size: int, tokens: int, knobs: dict) -> None:
    pair, prompt = stub_pair(vocab, block_size), [1, 0, 2]
    law = output_law(speculative_generate, pair, prompt, tokens, scheme=scheme, **knobs)
    assert total_variation(law, target_law(pair, prompt, tokens, **knobs)) <= TV_TOLERANCE
    assert sum(law.values()) == pytest.approx(1.0, abs=TV_TOLERANCE)


def test_law_of_the_plain_decoder_and_with_a_stop_token() -> None:
    pair, prompt = stub_pair(3, 3), [0, 1]
    expected = target_law(pair, prompt, 3, stops=(2,), temperature=1.0)
    for generate in (autoregressive_generate, speculative_generate):
        # One path to a batch: a row that has stopped draws on, unread, as long as its batch runs.
        law = output_law(generate, pair, prompt, 3, rows=1, temperature=1.0, stop_token_ids=[2])
        assert total_variation(law, expected) <= TV_TOLERANCE


@pytest.mark.parametrize("scheme", ["rejection", "exact_match"])
def test_law_of_a_real_pair(scheme: str) -> None:
    """The same over a real target and draft in fp64: caches, masks and features take part in the law."""
    target = make_target(vocab_size=4, num_hidden_layers=4, hidden_size=16, intermediate_size=16)
    pair, prompt, tokens = Pair(target, make_draft(target, block_size=3), None), [1, 0, 2], 3
    law = output_law(speculative_generate, pair, prompt, tokens, scheme=scheme, temperature=0.8, top_k=3)
    expected = {(): 1.0}
    for _ in range(tokens):
        paths = list(expected)
        with torch.no_grad():
            logits = target.model(torch.tensor([[*prompt, *path] for path in paths])).logits[:, -1]
        rows = probabilities(logits, sampling_params(0.8, top_k=3)).tolist()
        expected = {
            (*path, token): expected[path] * mass
            for path, row in zip(paths, rows, strict=True)
            for token, mass in enumerate(row)
            if mass > 0
        }
    assert total_variation(law, expected) <= TV_TOLERANCE


def plant_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """q is computed at another temperature than the proposals were drawn at."""
    propose = speculative.propose

    def warm(*arguments: Any) -> Any:
        proposal = propose(*arguments)
        wrong = proposal.q.log().div(1.5).softmax(-1)
        return proposal._replace(q=wrong)

    monkeypatch.setattr(speculative, "propose", warm)


def plant_unsubtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejection the target's own distribution is drawn from."""
    monkeypatch.setattr(verify, "residual", lambda p, q: p)


def plant_unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual is renormalised without clipping what the draft liked more."""
    monkeypatch.setattr(verify, "residual", lambda p, q: (p - q).abs() / (p - q).abs().sum(-1, keepdim=True))


def plant_unnormalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual keeps its mass below one, so that what is missing falls to the last token."""

    def rest(p: Tensor, q: Tensor) -> Tensor:
        kept = (p - q).clamp(min=0)
        return torch.cat([kept[..., :-1], 1 - kept[..., :-1].sum(-1, keepdim=True)], dim=-1)

    monkeypatch.setattr(verify, "residual", rest)


def plant_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rejected draft token is committed after all."""
    verify_rejection = verify.verify_rejection

    def reuse(proposals: Tensor, q: Tensor, p: Tensor, noise: Any, positions: Tensor) -> verify.Verdict:
        tokens, lengths = verify_rejection(proposals, q, p, noise, positions)
        rejected = (lengths <= proposals.shape[1])[:, None]
        kept = torch.cat([proposals, tokens[:, -1:]], dim=1)
        return verify.Verdict(torch.where(rejected, kept, tokens), lengths)

    monkeypatch.setattr(speculative, "verify_rejection", reuse)


def plant_shared_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft and verifier read the same uniforms."""
    monkeypatch.setattr(verify, "TARGET", 0)


def plant_stale_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals are drawn for one anchor and judged by the q of another."""
    propose = speculative.propose

    def stale(*arguments: Any) -> Any:
        proposal = propose(*arguments)
        return proposal._replace(q=proposal.q.roll(1, dims=1))

    monkeypatch.setattr(speculative, "propose", stale)


@pytest.mark.parametrize(
    "plant",
    [
        plant_temperature,
        plant_unsubtracted,
        plant_unclipped,
        plant_unnormalised,
        plant_reused,
        plant_shared_noise,
        plant_stale_anchor,
    ],
)
def test_planted_bugs_are_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    pair, prompt = stub_pair(3, 3), [1, 0, 2]
    law = output_law(speculative_generate, pair, prompt, 3, temperature=1.0)
    assert total_variation(law, target_law(pair, prompt, 3, temperature=1.0)) > BUG_IS_SEEN


class ChainDraft(StubDraft):
    """Proposes the target's own greedy chain; ``wrong(anchor, slot)`` says where it errs instead."""

    def __init__(self, pair: Any, block_size: int, texts: list[list[int]], wrong: Any) -> None:
        super().__init__(pair.target.vocab_size, block_size, 0)
        self.texts, self.wrong = texts, wrong

    def block(self, cache: StubCache, embeddings: Tensor, anchors: Tensor, *, longest_anchor: int) -> Tensor:
        logits = torch.zeros(*embeddings.shape[:2], self.table.shape[-1], dtype=torch.float64)
        for b, anchor in enumerate(anchors[:, 0].tolist()):
            text = next(t for t in self.texts if len(t) > anchor and t[anchor] == int(embeddings[b, 0, 0]))
            for slot in range(1, embeddings.shape[1]):
                token = text[anchor + slot] if anchor + slot < len(text) else 0
                logits[b, slot, (token + self.wrong(anchor, slot)) % logits.shape[-1]] = 1.0
        return logits


@pytest.mark.parametrize(
    ("wrong", "verified"),
    [
        pytest.param(lambda anchor, slot: 0, [4, 4, 4], id="always"),
        pytest.param(lambda anchor, slot: 1, [1] * 11, id="never"),
        pytest.param(lambda anchor, slot: slot == 2, [2] * 6, id="second-is-wrong"),
    ],
)
def test_stub_drafts(wrong: Any, verified: list[int]) -> None:
    pair = stub_pair(5, 4)
    prompt = torch.tensor([1, 2, 3])
    plain = autoregressive_generate(pair, [prompt], max_new_tokens=20)[0].tokens.tolist()
    pair.draft = ChainDraft(pair, 4, [[*prompt.tolist(), *plain]], wrong)
    output = speculative_generate(pair, [prompt], max_new_tokens=12)[0]
    assert output.tokens.tolist() == plain[:12]
    assert output.trace.verified_lengths == verified
    assert sum(output.acceptance_lengths) == 11
    assert output.trace.target_forwards == output.trace.draft_forwards == len(verified)
