"""Divergences at every token: numbers against scipy and plain loops, rows against naive forwards, intervals."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from decode_tools import random_prompts
from guided_tools import naive_read, plain_forward, readout_of
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, rankdata
from tiny import make_pair
from torch import Tensor

from dgd_lightning.decode.blending import WarmUp
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.other_model import OtherModel
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import Autoregressive, autoregressive_generate
from dgd_lightning.methods.guided import Guided, guided_generate
from dgd_lightning.metrics.clustered import clustered_mean
from dgd_lightning.metrics.divergence import GroupedMeans, TokenDivergence, token_class, token_divergence
from dgd_lightning.modules.rows import DECIMALS, DivergenceSettings, divergence_record, token_texts
from dgd_lightning.pair import Pair

SAME = 1e-12  # fp64, sums over ten tokens
ROUNDED = 0.6 * 10.0**-DECIMALS
VOCAB = 10


def some_logits(seed: int, rows: int = 6) -> Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(target: Tensor, readout: Tensor, guided: Tensor, token: int) -> dict[str, float]:
    """One position, by scipy and by hand."""
    p, r, g = (np.exp(x.numpy()) / np.exp(x.numpy()).sum() for x in (target, readout, guided))
    return {
        "kl_target_readout": entropy(p, r),
        "kl_readout_target": entropy(r, p),
        "js": jensenshannon(p, r) ** 2,
        "tv": max(abs(sum(p[s]) - sum(r[s])) for s in subsets(p > r)),
        "agree": float(list(p).index(max(p)) == list(r).index(max(r))),
        "target_entropy": entropy(p),
        "readout_entropy": entropy(r),
        "target_rank": rankdata(-p, method="min")[token],
        "readout_rank": rankdata(-r, method="min")[token],
        "target_prob": p[token],
        "readout_prob": r[token],
        "guided_prob": g[token],
        "argmax_changed": float(list(g).index(max(g)) != list(p).index(max(p))),
        "tv_target_guided": sum(x - y for x, y in zip(p, g, strict=True) if x > y),
    }


def subsets(best: np.ndarray) -> list[list[int]]:
    """Events among which the one that two distributions differ most about: the best guess, and each token."""
    return [np.flatnonzero(best).tolist(), *([i] for i in range(len(best)))]


def test_numbers_are_those_of_scipy_and_of_loops() -> None:
    target, readout = some_logits(1), some_logits(2)
    target[2, 4] = target[2, 7] = target[2, 9]  # a tie
    guided = 0.4 * target + 0.6 * readout
    tokens = torch.tensor([0, 3, 7, 9, 1, 5])
    found = token_divergence(target, readout, guided, tokens)
    assert found.agree.any() != found.agree.all() or found.argmax_changed.any()
    for at, token in enumerate(tokens.tolist()):
        want = expected(target[at], readout[at], guided[at], token)
        assert want.keys() == found._asdict().keys()
        for name, value in want.items():
            assert float(getattr(found, name)[at]) == pytest.approx(value, abs=SAME), name


def test_half_precision_is_widened_and_impossible_tokens_are_infinitely_far() -> None:
    target, readout = some_logits(3), some_logits(4)
    exact = token_divergence(target, readout, target, torch.zeros(6, dtype=torch.long))
    half = token_divergence(target.bfloat16(), readout.bfloat16(), target.bfloat16(), torch.zeros(6, dtype=torch.long))
    assert half.js.dtype == torch.float32
    assert (half.js - exact.js).abs().max() < 0.01  # bf16 inputs keep 8 bits
    readout[:, 1:] = -math.inf
    found = token_divergence(target, readout, readout, torch.ones(6, dtype=torch.long))
    assert found.kl_target_readout.isinf().all()
    assert found.kl_readout_target.isfinite().all()
    assert (found.js < math.log(2) + SAME).all()
    assert found.readout_prob.eq(0).all()


def test_equal_laws_do_not_diverge() -> None:
    """Logits that differ by a constant are one distribution; the twin differs by one logit."""
    target = some_logits(5).float()
    tokens = target.argmin(-1)
    same = token_divergence(target, target + 3, target, tokens)
    for name in ("kl_target_readout", "kl_readout_target", "js", "tv"):
        assert getattr(same, name).min() >= 0
        assert getattr(same, name).max() < 1e-6  # fp32
    assert same.agree.all()
    assert not same.argmax_changed.any()
    assert torch.equal(same.target_rank, same.readout_rank)
    other = target.clone()
    other.scatter_(1, tokens[:, None], target.amax(-1, keepdim=True) + 1)
    twin = token_divergence(target, other, other, tokens)
    assert twin.js.min() > 0.05
    assert twin.argmax_changed.all()
    assert not twin.agree.any()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" tiger", "word"), ("é", "word"), ("中", "word"), ("v2", "word"), ("don't", "word"), ("7", "number"),
        (" 3.14", "number"), ("50%", "number"), ("½", "number"), (".", "punctuation"), (" —", "punctuation"),
        ("😀", "punctuation"), ("<", "punctuation"), ("\n\n", "whitespace"), (" ", "whitespace"),
        ("<|im_end|>", "special"), ("</s>", "special"), ("<s>", "special"), ("< s>", "word"), ("", "partial"),
        ("\ufffd", "partial"),
    ],
)  # fmt: skip
def test_token_classes(text: str, kind: str) -> None:
    assert token_class(text) == kind


def test_grouped_means_are_those_of_a_loop_whatever_the_ranks() -> None:
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 4, (40,), generator=generator)
    ranks = [GroupedMeans(5, 3), GroupedMeans(5, 3)]
    for rank, metric in enumerate(ranks):
        for start in range(rank, 40, 8):
            metric.update(values[start::8][:3], groups[start::8][:3])
    seen = [i for rank in (0, 1) for start in range(rank, 40, 8) for i in range(start, 40, 8)[:3]]
    one = GroupedMeans(5, 3)
    one.update(values[:0], groups[:0])
    one.sums, one.counts = ranks[0].sums + ranks[1].sums, ranks[0].counts + ranks[1].counts  # what "sum" reduces to
    for group in range(5):
        members = [values[i].tolist() for i in seen if int(groups[i]) == group]
        want = [sum(column) / len(members) for column in zip(*members, strict=True)] if members else [math.nan] * 3
        assert one.compute()[group].tolist() == pytest.approx(want, abs=SAME, nan_ok=True)
    assert one.compute()[4].isnan().all()


def test_an_interval_over_contexts_is_wider_than_one_over_tokens() -> None:
    two = clustered_mean([1.0, 0.0, 30.0], [10, 0, 20])  # a context without tokens does not count
    assert two.value == pytest.approx(31 / 30)
    assert not two.bounded  # by two contexts
    rng = np.random.default_rng(7)
    own = rng.normal(size=30)
    tokens = own[:, None] + 0.1 * rng.normal(size=(30, 50))
    by_context = clustered_mean(tokens.sum(1).tolist(), [50] * 30)
    by_token = clustered_mean(tokens.ravel().tolist(), [1] * 1500)
    assert by_context.value == pytest.approx(by_token.value) == pytest.approx(tokens.mean())
    assert by_context.high - by_context.low > 4 * (by_token.high - by_token.low)
    width = 2 * 2.045 * tokens.mean(1).std(ddof=1) / math.sqrt(30)  # equal sizes: the mean of the contexts' means
    assert by_context.high - by_context.low == pytest.approx(width, rel=0.1)
    assert not clustered_mean([2.0] * 9, [1] * 9).bounded  # all alike
    assert all(map(math.isnan, clustered_mean([], [])))
    assert math.isnan(clustered_mean([3.0], [2]).low)
    assert clustered_mean([math.inf, 1], [2, 2]).value == math.inf


class Letters:
    """A tokenizer with a character per token; 60 and above are specials, and 50, 51 are the two halves of one."""

    def decode(self, ids: list[int], **_: Any) -> str:
        raw = b"".join(
            f"<|{i}|>".encode() if i >= 60 else {50: b"\xc3", 51: b"\xa9"}.get(i, bytes([65 + i])) for i in ids
        )
        return raw.decode(errors="replace")


@pytest.fixture(scope="module")
def written() -> Pair:
    pair = make_pair(block_size=4, layers=6)
    return Pair(pair.target, pair.draft, Letters())


def test_token_texts_add_up_to_the_text() -> None:
    ids = [1, 50, 51, 60, 2, 50, 3, 50]
    texts = token_texts(Letters(), ids)
    assert texts == ["B", "", "é", "<|60|>", "C", "", "\ufffdD", "\ufffd"]
    assert "".join(texts) == Letters().decode(ids)


class Pieces:
    """A tokenizer whose tokens are words with a blank before them, which is left out where the text begins."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" w{i}" for i in ids)[1:]


def test_token_texts_keep_the_blanks_of_tokenizers_that_drop_the_first() -> None:
    assert token_texts(Pieces(), [1, 2, 3]) == ["w1", " w2", " w3"]


ARMS = {
    "plain": Autoregressive(),
    "draft": Guided(0.1),
    "lens": Guided(-0.5, readout=LogitLens(3), candidates=5),
    "warm": Guided(0.8, schedule=WarmUp(12)),
}


@pytest.mark.parametrize("name", ARMS)
def test_a_row_tells_what_naive_forwards_say(written: Pair, name: str) -> None:
    arm, (prompt,) = ARMS[name], random_prompts(1, 8, longest=20)
    answer = torch.randint(64, (9,), generator=torch.Generator().manual_seed(9))
    record = divergence_record(written, arm.guidance_of({}), prompt, answer, DivergenceSettings(top=3, large=0.2))
    assert record is not None
    read = naive_read("lens" if name == "lens" else "draft", written, prompt)
    beta = getattr(arm, "beta", 0.0)
    tops = {entry["at"]: entry for entry in record["top"]}
    for at, token in enumerate(answer.tolist()):
        text = [*prompt.tolist(), *answer.tolist()[:at]]
        target, readout = plain_forward(written.target.model, text).logits[0, -1], read(text)
        strength = beta * min(1, at / 12) if name == "warm" else beta
        guided = (1 - strength) * target + strength * readout
        if name == "lens":
            guided = guided.where(target >= target.topk(5).values[-1], -torch.tensor(math.inf))
        want = expected(target.detach(), readout.detach(), guided.detach(), token)
        for number, value in want.items():
            assert record[number][at] == pytest.approx(value, abs=ROUNDED), number
        assert (at in tops) == bool(want["argmax_changed"] or want["js"] >= 0.2)
        if at in tops:
            distributions = {"target": target, "readout": readout, "guided": guided}
            if name == "plain":
                assert "guided" not in tops[at]
                del distributions["guided"]
            for distribution, logits in distributions.items():
                best = logits.softmax(-1).sort(descending=True)
                assert [word for word, _ in tops[at][distribution]] == [
                    Letters().decode([i]) for i in best.indices[:3].tolist()
                ]
                assert [p for _, p in tops[at][distribution]] == pytest.approx(best.values[:3].tolist(), abs=ROUNDED)
    assert record["beta"] == beta
    assert 0 < len(tops) < 9
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_emitted_tokens_are_first_choices_of_what_decoded_them(written: Pair) -> None:
    """A greedy answer is the guided distribution's top-1 token: the likeliest one, with the target's rank."""
    (prompt,) = random_prompts(1, 11, longest=20)
    (output,) = guided_generate(written, [prompt], beta=0.1, max_new_tokens=40, stop_token_ids=())
    record = divergence_record(
        written, ARMS["draft"].guidance_of({}), prompt, output.tokens, DivergenceSettings(large=0.0)
    )
    assert record is not None
    assert [entry["at"] for entry in record["top"]] == list(range(40))
    for entry, prob, token in zip(record["top"], record["guided_prob"], output.tokens.tolist(), strict=True):
        assert entry["guided"][0] == [Letters().decode([token]), prob]
    assert [rank > 1 for rank in record["target_rank"]] == [bool(changed) for changed in record["argmax_changed"]]
    assert 0 < sum(record["argmax_changed"]) < 40


def test_beta_of_zero_changes_nothing_and_the_target_as_readout_is_no_divergence(written: Pair) -> None:
    (prompt,) = random_prompts(1, 12, longest=20)
    (output,) = autoregressive_generate(written, [prompt], max_new_tokens=40, stop_token_ids=())

    def record(beta: float, readout: Readout | str) -> dict[str, Any]:
        guidance = Guided(beta, readout).guidance_of({})
        found = divergence_record(written, guidance, prompt, output.tokens, DivergenceSettings())
        assert found is not None
        return found

    nothing = record(0.0, "draft")
    assert set(nothing["argmax_changed"]) == {0}
    assert set(nothing["tv_target_guided"]) == {0.0}
    assert nothing["guided_prob"] == nothing["target_prob"]
    assert set(nothing["target_rank"]) == {1}
    assert sum(nothing["js"]) > 1  # the draft does say something else
    assert sum(record(0.7, "draft")["argmax_changed"]) > 0
    itself = record(0.7, OtherModel(written.target))
    for name in ("js", "tv", "kl_target_readout", "kl_readout_target", "tv_target_guided", "argmax_changed"):
        assert set(itself[name]) == {0}, name
    assert set(itself["agree"]) == {1}
    assert itself["top"] == []
    other = record(0.7, readout_of("other", written, [prompt]))
    assert min(other["js"]) > 0.01


def test_arms_without_draft_and_readout_tell_nothing(written: Pair) -> None:
    alone = Pair(written.target, None, written.tokenizer)
    prompt, answer = torch.tensor([5, 6]), torch.tensor([7])
    assert divergence_record(alone, None, prompt, answer, DivergenceSettings()) is None
    lens = Guided(0.1, readout=LogitLens(2), speculative=False)
    record = divergence_record(alone, lens.guidance_of({}), prompt, answer, DivergenceSettings(top=0))
    assert record is not None
    assert record["tokens"] == ["H"]
    assert record["top"] == []
    assert set(TokenDivergence._fields) < record.keys()


def test_bad_settings_are_named() -> None:
    for settings, name in (({"top": -1}, "top"), ({"top": True}, "top"), ({"large": math.nan}, "large")):
        with pytest.raises(InputError, match=rf"^divergence\.{name}: "):
            DivergenceSettings(**settings)  # type: ignore[arg-type]
