"""The decoders on tiny real pairs: equal to each other, to the oracles and to a row alone; limits, stops, bad input."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decode_tools import dial, random_prompts, tokens_of
from host_waits import HostWaits
from reference_decoding import reference_autoregressive, reference_speculative
from tiny import make_draft, make_pair, make_target
from torch import Tensor

from dgd_lightning.decode import call
from dgd_lightning.decode.drafter import Proposal
from dgd_lightning.decode.random_source import ACCEPT, DRAFT, TARGET, RandomTable, Stream, random_table
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.errors import InputError
from dgd_lightning.methods import speculative
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput

NEAR_TIE = 1e-4  # fp32 logits of a model of width 32 differ by about 1e-6 between shapes of one forward
HAIR = 4e-6  # of a logit: well above fp32's rounding of it, and a tenth of a near tie for logits of about 2
KNOBS = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}


@torch.no_grad()
def transformers_tokens(pair: Pair, prompt: Tensor, new: int) -> list[int]:
    ids = prompt[None]  # the mask is given, or generate takes the pad id inside the prompt for padding
    model = pair.target.model
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def check_consistent(outputs: list[DecodeOutput], block_size: int, limit: int) -> None:
    for output in outputs:
        verified, accepted = output.trace.verified_lengths, output.acceptance_lengths
        assert sum(accepted) == len(output.tokens) - 1 < limit
        assert verified[:-1] == accepted[:-1]  # only the last verification can be cut
        assert all(1 <= cut <= length <= block_size for cut, length in zip(accepted, verified, strict=True))
        assert output.trace.target_forwards == output.trace.draft_forwards == len(verified)
        assert output.trace.batch_tokens == sum(len(other.tokens) - 1 for other in outputs)


def lossless(pair: Pair, batch: int, block_size: int, new: int, seed: int) -> Iterator[int]:
    """Check that all greedy ways agree on one random batch; yields the tokens that were compared."""
    prompts = random_prompts(batch, seed)
    plain = autoregressive_generate(pair, prompts, max_new_tokens=new)
    acceptances = (0.0, 0.5, 0.8, 1.0)
    for drafted in (pair, dial(pair, prompts, plain, acceptances[seed % 4], seed)):
        outputs = speculative_generate(drafted, prompts, max_new_tokens=new, block_size=block_size)
        assert tokens_of(outputs) == tokens_of(plain)
        check_consistent(outputs, block_size, new)
        yield batch * new
    if seed % 4 == 3 and block_size > 2:
        assert max(outputs[0].acceptance_lengths) == block_size  # the dial does dial


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_greedy_ways_agree(family: str) -> None:
    pair, total = make_pair(family, block_size=8), 0
    shapes = [(4, 8), (1, 5), (3, 2), (5, 3)] if family == "qwen3" else [(4, 8)]
    for seed, (batch, block_size) in enumerate(shapes, start=3):
        total += sum(lossless(pair, batch, block_size, new=40, seed=seed))
    assert total == 2 * 40 * sum(batch for batch, _ in shapes)
    prompts = random_prompts(2 if family == "qwen3" else 1, seed=50)
    plain = autoregressive_generate(pair, prompts, max_new_tokens=12)
    for prompt, output in zip(prompts, plain, strict=True):
        expected = output.tokens.tolist()
        assert transformers_tokens(pair, prompt, 12) == expected
        assert reference_autoregressive(pair, prompt, max_new_tokens=12).tokens == expected
        reference = reference_speculative(pair, prompt, max_new_tokens=12, block_size=5)
        fast = speculative_generate(pair, [prompt], max_new_tokens=12, block_size=5)[0]
        assert reference.tokens == expected
        assert reference.verified_lengths == fast.trace.verified_lengths


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_greedy_ways_agree_over_100k_tokens() -> None:
    total, seed = 0, 0
    while total < 100_000:
        seed += 1
        pair = make_pair("qwen3" if seed % 3 else "llama", block_size=16, seed=seed, num_layers=1 + seed % 3)
        prompts = random_prompts(1 + seed % 8, seed)
        new = 100 + 37 * (seed % 5)
        for compared in lossless(pair, len(prompts), 2 + seed % 15, new, seed):
            total += compared
        row = prompts[0]
        plain = autoregressive_generate(pair, [row], max_new_tokens=new)[0].tokens.tolist()
        assert transformers_tokens(pair, row, new) == plain
        assert reference_autoregressive(pair, row, max_new_tokens=40).tokens == plain[:40]
    print(f"{total} tokens over {seed} random pairs, all equal")


@torch.no_grad()
def last_logits(pair: Pair, prompt: Tensor, tokens: list[int]) -> Tensor:
    """[V] for the token after the prompt and these."""
    return pair.target.model(torch.tensor([[*prompt.tolist(), *tokens]])).logits[0, -1]


def differing_margins(pair: Pair, prompts: list[Tensor], ones: list[list[int]], others: list[list[int]]) -> list[float]:
    """For every row that differs: by how much the target prefers one choice to the other, where they first part."""
    margins = []
    for prompt, a, b in zip(prompts, ones, others, strict=True):
        at = next((i for i, (one, other) in enumerate(zip(a, b, strict=True)) if one != other), None)
        if at is not None:
            logits = last_logits(pair, prompt, a[:at])
            margins.append(float((logits[a[at]] - logits[b[at]]).abs()))
    return margins


def fp32_pair() -> Pair:
    return make_pair(dtype=torch.float32, block_size=8)


def test_fp32_differs_only_at_near_ties() -> None:
    pair, prompts = fp32_pair(), random_prompts(6, seed=1)
    plain = autoregressive_generate(pair, prompts, max_new_tokens=60)
    fast = speculative_generate(dial(pair, prompts, plain, 0.8), prompts, max_new_tokens=60)
    margins = differing_margins(pair, prompts, tokens_of(plain), tokens_of(fast))
    print(f"fp32: {len(margins)} of {len(prompts)} rows differ, margins {margins}")
    assert all(margin < NEAR_TIE for margin in margins)

    # A twin of the commonest token, which the head prefers by a hair: a difference that must come, and must pass.
    common = Counter(token for tokens in tokens_of(plain) for token in tokens).most_common()
    token, twin = common[0][0], next(i for i in range(64) if i not in dict(common))
    twins = fp32_pair()
    head = twins.target.model.get_output_embeddings().weight
    with torch.no_grad():
        head[twin] = head[token] * (1 + HAIR)
    flipped = speculative_generate(dial(twins, prompts, plain, 0.8), prompts, max_new_tokens=60)
    margins = differing_margins(twins, prompts, tokens_of(plain), tokens_of(flipped))
    assert len(margins) >= len(prompts) // 2
    assert all(0 < margin < NEAR_TIE for margin in margins)


def test_near_ties_do_not_excuse_a_wrong_token() -> None:
    pair, prompts = fp32_pair(), random_prompts(6, seed=1)
    plain = tokens_of(autoregressive_generate(pair, prompts, max_new_tokens=60))
    assert differing_margins(pair, prompts, plain, plain) == []
    for at, (row, prompt) in itertools.product((0, 1, 30, 59), enumerate(prompts)):
        wrong = [list(tokens) for tokens in plain]
        wrong[row][at] = int(last_logits(pair, prompt, plain[row][:at]).topk(2).indices[1])  # the runner-up
        (margin,) = differing_margins(pair, prompts, plain, wrong)
        assert margin > NEAR_TIE


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("scheme", ["rejection", "exact_match", None])
def test_a_row_alone_is_the_row_in_a_batch(scheme: str | None, temperature: float) -> None:
    pair, prompts, seeds = make_pair(block_size=6), random_prompts(4, seed=2), [11, 12, 13, 14]
    knobs: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "stop_token_ids": [7, 21]}

    def run(rows: list[int]) -> list[DecodeOutput]:
        mine, own = [prompts[i] for i in rows], [seeds[i] for i in rows]
        if scheme is None:
            return autoregressive_generate(pair, mine, seed=own, **knobs)
        return speculative_generate(pair, mine, seed=own, scheme=scheme, **knobs)  # type: ignore[arg-type]

    together, shuffled = run([0, 1, 2, 3]), run([3, 1, 0, 2])
    for row, output in enumerate(together):
        for other in (run([row])[0], shuffled[[3, 1, 0, 2].index(row)]):
            assert other.tokens.tolist() == output.tokens.tolist()
            assert other.trace.verified_lengths == output.trace.verified_lengths
    if temperature:
        assert [output.trace.seed for output in together] == seeds
        assert len({tuple(tokens) for tokens in tokens_of(run([0]) + run([0]))}) == 1


@pytest.mark.parametrize("knobs", [{"temperature": 1.0}, KNOBS])
def test_sampled_ways_agree(knobs: dict[str, Any]) -> None:
    pair = make_pair(block_size=4)
    pair.draft = make_draft(pair.target, block_size=4, seed=9)
    prompts, seeds, new = random_prompts(3, seed=3), [5, 6, 7], 16
    plain = autoregressive_generate(pair, prompts, max_new_tokens=new, seed=seeds, **knobs)
    match = speculative_generate(pair, prompts, max_new_tokens=new, seed=seeds, scheme="exact_match", **knobs)
    assert tokens_of(match) == tokens_of(plain)  # the target's draws come from the same numbers
    reject = speculative_generate(pair, prompts, max_new_tokens=new, seed=seeds, **knobs)
    assert tokens_of(reject) != tokens_of(plain)
    for outputs, scheme in ((match, "exact_match"), (reject, "rejection")):
        check_consistent(outputs, 4, new)
        for prompt, seed, output in zip(prompts, seeds, outputs, strict=True):
            reference = reference_speculative(
                pair,
                prompt,
                max_new_tokens=new,
                block_size=4,
                sampling=sampling_params(**knobs),
                scheme=scheme,
                row_seed=seed,
            )
            assert reference.tokens == output.tokens.tolist()
            assert reference.verified_lengths == output.trace.verified_lengths
    assert sum(map(sum, (o.trace.verified_lengths for o in reject))) > len(reject) * len(reject[0].acceptance_lengths)
    for row, output in enumerate(plain):
        reference = reference_autoregressive(
            pair, prompts[row], max_new_tokens=new, sampling=sampling_params(**knobs), row_seed=seeds[row]
        )
        assert reference.tokens == output.tokens.tolist()


class Streams(RandomTable):
    """RandomSource that remembers which streams were read."""

    def __init__(self, table: Tensor, starts: Tensor, read: set[Stream]) -> None:
        super().__init__(table, starts)
        self.read = read

    def _uniform(self, stream: Stream, positions: Tensor) -> Tensor:
        self.read.add(stream)
        return super()._uniform(stream, positions)


@pytest.mark.parametrize(("scheme", "wanted"), [("exact_match", {TARGET}), ("rejection", {DRAFT, ACCEPT, TARGET})])
def test_streams_that_a_scheme_reads(scheme: Any, wanted: set[Stream]) -> None:
    """``exact_match`` proposes the draft's likeliest tokens and draws the target's alone."""
    pair, prompt, read = make_pair(), torch.tensor([3, 1, 4]), set[Stream]()
    random_source = Streams(random_table([7], 24), torch.tensor([3]), read)
    knobs: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "scheme": scheme, "seed": [7]}
    (output,) = speculative_generate(pair, [prompt], random_source=random_source, **knobs)
    assert read == wanted
    assert tokens_of([output]) == tokens_of(speculative_generate(pair, [prompt], **knobs))


@pytest.mark.parametrize("generate", [autoregressive_generate, speculative_generate])
def test_seeds(generate: Any) -> None:
    pair, prompts = make_pair(), [torch.tensor([3, 1, 4])] * 3
    outputs = generate(pair, prompts, max_new_tokens=12, temperature=1.0, seed=5)
    rows = tokens_of(outputs)
    assert len({tuple(row) for row in rows}) == 3  # equal prompts draw differently
    recorded = [output.trace.seed for output in outputs]
    assert tokens_of(generate(pair, prompts, max_new_tokens=12, temperature=1.0, seed=recorded)) == rows
    longer = tokens_of(generate(pair, prompts, max_new_tokens=20, temperature=1.0, seed=5))
    assert [row[:12] for row in longer] == rows
    fresh = generate(pair, prompts, max_new_tokens=12, temperature=1.0)
    again = [output.trace.seed for output in fresh]
    assert again != recorded
    assert tokens_of(generate(pair, prompts, max_new_tokens=12, temperature=1.0, seed=again)) == tokens_of(fresh)
    assert generate(pair, prompts, max_new_tokens=2)[0].trace.seed is None


def test_stop_tokens_and_limits() -> None:
    pair, prompts = make_pair(block_size=8), random_prompts(5, seed=4)
    free = autoregressive_generate(pair, prompts, max_new_tokens=40)
    fast = dial(pair, prompts, free, 0.9)
    for stop in (free[0].tokens[0], free[1].tokens[9], free[2].tokens[39]):  # at once, inside a block, at the limit
        stops = [int(stop)]
        plain = autoregressive_generate(pair, prompts, max_new_tokens=40, stop_token_ids=stops)
        outputs = speculative_generate(fast, prompts, max_new_tokens=40, stop_token_ids=stops)
        check_consistent(outputs, 8, 41)
        for base, slow, output in zip(free, plain, outputs, strict=True):
            text = base.tokens.tolist()
            expected = text[: text.index(stops[0]) + 1] if stops[0] in text else text
            assert slow.tokens.tolist() == output.tokens.tolist() == expected
            assert slow.stop_reason == output.stop_reason == ("stop" if stops[0] in text else "length")
    for new in range(1, 12):
        assert tokens_of(speculative_generate(fast, prompts, max_new_tokens=new)) == [t[:new] for t in tokens_of(free)]
    one = speculative_generate(fast, prompts, max_new_tokens=1)[0]
    assert (one.acceptance_lengths, one.trace.target_forwards) == ([], 0)


def test_default_stop_tokens() -> None:
    pair, prompts = make_pair(), [torch.tensor([3, 1, 4])]
    text = autoregressive_generate(pair, prompts, max_new_tokens=12)[0].tokens.tolist()
    pair.tokenizer = type("Tokenizer", (), {"eos_token_id": text[4]})()
    assert (
        autoregressive_generate(pair, prompts, max_new_tokens=12)[0].tokens.tolist() == text[: text.index(text[4]) + 1]
    )
    pair.target.stop_token_ids = (text[0],)  # what the target names comes first
    assert speculative_generate(pair, prompts, max_new_tokens=12)[0].tokens.tolist() == text[:1]
    assert len(speculative_generate(pair, prompts, max_new_tokens=12, stop_token_ids=[])[0].tokens) == 12


def test_progress_and_plain_trace() -> None:
    pair, prompts = make_pair(), random_prompts(3, seed=6)
    seen: list[call.Progress] = []
    outputs = autoregressive_generate(pair, prompts, max_new_tokens=6, on_progress=seen.append)
    assert [p.tokens for p in seen] == [3, 6, 9, 12, 15, 18]
    assert [p.active for p in seen] == [3, 3, 3, 3, 3, 0]
    assert seen[-1].verifications == 15
    for output in outputs:
        assert output.acceptance_lengths == output.trace.verified_lengths == [1] * 5
        assert (output.trace.target_forwards, output.trace.draft_forwards) == (5, 0)
        assert output.trace.decode_seconds > 0 < output.trace.prefill_seconds
    alone = Pair(pair.target, None, None)
    assert tokens_of(autoregressive_generate(alone, prompts, max_new_tokens=6)) == tokens_of(outputs)


def test_a_prompt_may_fill_the_model() -> None:
    pair = make_pair(block_size=8)
    prompts = [*random_prompts(1, seed=7, longest=1), torch.arange(500) % 64]
    plain = autoregressive_generate(pair, prompts, max_new_tokens=12)
    assert tokens_of(speculative_generate(pair, prompts, max_new_tokens=12)) == tokens_of(plain)
    with pytest.raises(InputError, match=r"^prompts\[1\]: expected .* 512 positions, received 500 \+ 13 = 513"):
        speculative_generate(pair, prompts, max_new_tokens=13)


def test_a_long_row_beside_a_short_one() -> None:
    """The long prompt crosses prefill's chunk of 1,024; the short one is padding for most of it."""
    target = make_target(max_position_embeddings=2048)
    pair = Pair(target, make_draft(target, block_size=8), None)
    prompts = [*random_prompts(1, seed=9, longest=1), torch.arange(1500) * 7 % 61]
    plain = autoregressive_generate(pair, prompts, max_new_tokens=24)
    assert transformers_tokens(pair, prompts[1], 24) == plain[1].tokens.tolist()
    for drafted in (pair, dial(pair, prompts, plain, 0.8)):
        fast = speculative_generate(drafted, prompts, max_new_tokens=24)
        assert tokens_of(fast) == tokens_of(plain)
    reference = reference_speculative(pair, prompts[1], max_new_tokens=4, block_size=8)
    assert reference.tokens == plain[1].tokens.tolist()[:4]


def count_waits(new: int, monkeypatch: pytest.MonkeyPatch, **knobs: Any) -> tuple[list[str], int, int]:
    """(waits that are not ``to_host``, calls of it, cycles) of one run."""
    pair, prompts, cycles = make_pair(block_size=4), random_prompts(3, seed=8), [0]

    def on_progress(_: call.Progress) -> None:
        cycles[0] += 1

    with monkeypatch.context() as patches, HostWaits(patches) as host:
        speculative_generate(pair, prompts, max_new_tokens=new, seed=0, on_progress=on_progress, **knobs)
    return host.seen, host.synchronised, cycles[0]


@pytest.mark.parametrize("knobs", [{}, {"temperature": 1.0}, {"scheme": "exact_match", **KNOBS}])
def test_one_synchronisation_per_cycle(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    few, synchronised, cycles = count_waits(10, monkeypatch, **knobs)
    assert cycles > 5
    assert synchronised == cycles
    many, *_ = count_waits(20, monkeypatch, **knobs)
    assert len(many) == len(few), many  # whatever else waits does so once per call, not per cycle


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("tolist", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        ("numpy", lambda x: x.numpy()),
        ("to", lambda x: x.to("cpu")),
        ("to", lambda x: x.to(device="cpu")),
        ("item", lambda x: x.sum().item()),
        ("__bool__", lambda x: bool(x.any())),
        ("__int__", lambda x: int(x.max())),
        ("index", lambda x: x[x > 3]),
        ("nonzero", lambda x: x.nonzero()),
    ],
)
def test_a_planted_wait_is_seen(name: str, wait: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    propose = speculative.propose

    def waiting(*arguments: Any) -> Proposal:
        proposal = propose(*arguments)
        wait(proposal.tokens)
        return proposal

    monkeypatch.setattr(speculative, "propose", waiting)
    (few, _, fewer), (many, _, more) = count_waits(3, monkeypatch), count_waits(10, monkeypatch)
    assert many.count(name) - few.count(name) == more - fewer > 5


BAD = [
    ("prompts", {"prompts": []}),
    ("prompts", {"prompts": torch.ones(2, 3).long()}),
    (r"prompts\[0\]", {"prompts": [[1, 2]]}),
    (r"prompts\[1\]", {"prompts": [torch.tensor([1]), torch.tensor([], dtype=torch.long)]}),
    (r"prompts\[0\]", {"prompts": [torch.tensor([[1]])]}),
    (r"prompts\[0\]", {"prompts": [torch.tensor([1.0])]}),
    (r"prompts\[0\]", {"prompts": [torch.tensor([True])]}),
    (r"prompts\[0\]", {"prompts": [torch.tensor([64])]}),
    (r"prompts\[0\]", {"prompts": [torch.tensor([-1])]}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": 2.0}),
    ("max_new_tokens", {"max_new_tokens": True}),
    ("temperature", {"temperature": -0.1}),
    ("top_p", {"top_p": 0.0}),
    ("top_k", {"top_k": 0}),
    ("seed", {"temperature": 1.0, "seed": [1, 2, 3]}),
    ("stop_token_ids", {"stop_token_ids": 3}),
    ("stop_token_ids", {"stop_token_ids": ["a"]}),
]


@pytest.mark.parametrize("generate", [autoregressive_generate, speculative_generate])
@pytest.mark.parametrize(("name", "change"), BAD)
def test_bad_input(generate: Any, name: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"prompts": [torch.tensor([1, 2])], "max_new_tokens": 4, **change}
    prompts = arguments.pop("prompts")
    with pytest.raises(InputError, match=f"^{name}: expected .*, received .*Hint: ") as error:
        generate(make_pair(), prompts, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [("block_size", {"block_size": size}) for size in (0, 1, 5, 2.0, True)] + [("scheme", {"scheme": "typical"})],
)
def test_bad_speculative_input(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected"):
        speculative_generate(make_pair(block_size=4), [torch.tensor([1])], max_new_tokens=4, **change)


def test_speculative_needs_a_draft() -> None:
    with pytest.raises(InputError, match=r"^pair: expected a pair with a draft"):
        speculative_generate(Pair(make_target(), None, None), [torch.tensor([1])], max_new_tokens=4)
