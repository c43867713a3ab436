"""Stop strings: every method keeps what decoding token by token keeps, where all text is looked at after each token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decode_tools import dial, random_prompts, tokens_of
from host_waits import HostWaits
from tiny import make_pair
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.call import Call, check_request
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.decode.stop_strings import GrowingText, StopStrings, answer_text
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import Autoregressive, autoregressive_generate
from dgd_lightning.methods.base import Guidance
from dgd_lightning.methods.guided import Guided, guided_sweep
from dgd_lightning.methods.rerank import Rerank
from dgd_lightning.methods.speculative import Speculative, speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import DecodeOutput

END = 63  # the special token "</s>" of every vocabulary here


def tokenizer_of(vocabulary: Sequence[str], decoder: Any) -> PreTrainedTokenizerFast:
    """Of 64 tokens with these texts, special ones last."""
    words = [*vocabulary, *(f"w{i}" for i in range(64))][:END]
    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "</s>"])}, unk_token="w0"))
    rust.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """Tokens that end inside characters, as those of Qwen and Llama 3 do."""
    letters, dice = bytes_to_unicode(), random.Random(5)
    text = "a bé\n日c,ä😀 d".encode()
    pieces = [bytes([byte]) for byte in sorted(set(text))]
    while len(pieces) < END:
        at = dice.randrange(len(text) - 1)
        piece = text[at : at + dice.randint(2, 6)]
        pieces += [piece] if piece not in pieces else []
    return tokenizer_of(["".join(letters[byte] for byte in piece) for piece in pieces], decoders.ByteLevel())


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's: the text's first space is left out, and unknown characters come as bytes, as in Llama 2."""
    pieces = [f"<0x{byte:02X}>" for byte in "é日ß".encode()]
    pieces += ["▁", "▁a", "b", "▁▁▁", "ab", "▁the", "c", "\n", ".", "a▁", "ca", "é", "日"]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return tokenizer_of(list(dict.fromkeys(pieces)), decoders.Sequence(steps))


def word_pieces() -> PreTrainedTokenizerFast:
    """A piece that continues a word has no space before it."""
    return tokenizer_of(["a", "##b", "##c", "b", "##ab", "the", ".", "ca"], decoders.WordPiece(cleanup=False))


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level, "metaspace": metaspace, "word_pieces": word_pieces,
}  # fmt: skip


def kept(tokenizer: Any, ids: Sequence[int], strings: Sequence[str]) -> int:
    """The oracle: after each token the text of all is looked at."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False)
        if any(string in text for string in strings):
            return count
    return len(ids)


def strings_from(tokenizer: Any, ids: Sequence[int], dice: random.Random) -> list[str]:
    """Pieces of a text without unfinished characters, wherever tokens end, and one that hardly comes."""
    text, found = tokenizer.decode(ids, skip_special_tokens=False), ["never seen"]
    while len(found) < 3:
        at = dice.randrange(len(text) // 3, len(text))
        piece = text[at : at + dice.randint(1, 9)]
        found += [piece] if "\ufffd" not in piece else []
    return found


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_growing_text_ends_where_the_whole_text_does(kind: str) -> None:
    tokenizer, dice, ended = TOKENIZERS[kind](), random.Random(0), 0
    few = 40 if kind == "byte_level" else 20  # of which longer strings are rare
    for _ in range(60):
        ids = [dice.randrange(few) if dice.random() < 0.98 else END for _ in range(dice.randint(20, 250))]
        strings = strings_from(tokenizer, ids, dice)[: dice.randint(1, 3)]
        text, rest, taken = GrowingText(StopStrings(tokenizer, tuple(strings))), list(ids), 0
        while rest:
            block, rest = rest[: (size := dice.randint(1, 9))], rest[size:]
            count = text.append(block)
            taken += len(block) if count is None else count
            if count is not None:
                ended += 1
                break
        expected = kept(tokenizer, ids, strings)
        assert taken == expected
        whole = tokenizer.decode(ids[:taken], skip_special_tokens=False)
        places = [whole.find(string) for string in strings if string in whole]
        if END not in ids[:taken]:
            assert answer_text(tokenizer, ids[:taken], strings) == whole[: min(places, default=None)]
    assert ended > 20


def test_little_is_read_again() -> None:
    """A long answer costs no more per token than a short one; tokens without a text make the window longer."""
    lengths: list[int] = []
    tokenizer = byte_level()

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            lengths.append(len(ids))
            return tokenizer.decode([i for i in ids if i != END], **options)

    stops = StopStrings(Counting(), ("x" * 40,))
    for ids in ([i % 40 for i in range(3000)], [END] * 400 + [i % 40 for i in range(600)]):
        lengths.clear()
        text = GrowingText(stops)
        for at in range(0, len(ids), 3):
            assert text.append(ids[at : at + 3]) is None
        assert max(lengths[-50:]) < 200


def test_special_tokens_are_text_for_stop_strings_and_none_of_answers() -> None:
    tokenizer = word_pieces()
    assert kept(tokenizer, [0, END, 5], ["</s>"]) == 2
    assert GrowingText(StopStrings(tokenizer, ("</s>",))).append([0, END, 5]) == 2
    assert answer_text(tokenizer, [0, END, 5], ["the"]) == "a "
    assert answer_text(tokenizer, [0, END]) == "a"
    assert answer_text(tokenizer, [0, 5, 6], ["he", "the"]) == "a "
    assert answer_text(tokenizer, [0, 5, 6], ["e ."]) == "a th"  # what the token has before the string stays


# Decoding.


def tiny(seed: int = 0) -> Pair:
    pair = make_pair(block_size=4, seed=seed, layers=2, num_layers=1)
    return Pair(pair.target, pair.draft, byte_level())


def check_ends(pair: Pair, outputs: list[DecodeOutput], free: list[DecodeOutput], strings: Sequence[str]) -> int:
    """Against the same answers decoded on: tokens, lengths, reasons; returns how many were cut inside a block."""
    inside = 0
    for output, full in zip(outputs, free, strict=True):
        ids = full.tokens.tolist()
        count = kept(pair.tokenizer, ids, strings)
        assert output.tokens.tolist() == ids[:count]
        found = kept(pair.tokenizer, [*ids, 0], strings) <= len(ids)  # else it would say one more
        assert output.stop_reason == ("stop" if found else "length")
        lengths, left = [], count - 1
        for length in full.acceptance_lengths:
            lengths += [min(length, left)] if left > 0 else []
            left -= length
        assert output.acceptance_lengths == lengths
        assert output.trace.verified_lengths == full.trace.verified_lengths[: len(lengths)]
        assert output.trace.target_forwards == len(lengths)
        inside += found and lengths[-1:] != full.acceptance_lengths[len(lengths) - 1 : len(lengths)]
    return inside


METHODS: dict[str, Any] = {
    "autoregressive": Autoregressive(),
    "speculative": Speculative(),
    "exact_match": Speculative(scheme="exact_match"),
    "guided": Guided(0.2),
    "guided_slow": Guided(0.2, speculative=False),
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_method_keeps_what_token_by_token_decoding_keeps(temperature: float) -> None:
    dice, inside, seen, sampling = random.Random(1), dict.fromkeys(METHODS, 0), 0, sampling_params(temperature)
    for seed, batch in enumerate((1, 4)):
        pair, prompts = tiny(seed), random_prompts(batch, seed, longest=12)
        call = Call(16, sampling, stop_token_ids=[], seed=seed)
        plain = Autoregressive().generate(pair, prompts, call)
        # the draft is told what to propose, so that blocks are long
        dialled = Pair(pair.target, dial(pair, prompts, plain, 0.8, seed).draft, pair.tokenizer)
        for name, method in METHODS.items():
            used = dialled if name in ("speculative", "exact_match") else pair
            free = method.generate(used, prompts, call)
            rows = [dice.choice(free) for _ in range(2)]
            strings = [one for row in rows for one in strings_from(pair.tokenizer, row.tokens.tolist(), dice)]
            outputs = method.generate(used, prompts, call._replace(stop_strings=strings))
            inside[name] += check_ends(pair, outputs, free, strings)
            seen += sum(one.stop_reason == "stop" for one in outputs)
            if temperature == 0 and not method.blends:
                expected = [ids[: kept(pair.tokenizer, ids, strings)] for ids in tokens_of(plain)]
                assert tokens_of(outputs) == expected
    assert seen > 15
    assert inside["speculative"] + inside["exact_match"] >= 2  # cut in the middle of an accepted block


def test_arms_that_share_a_batch_and_answers_to_choose_among() -> None:
    pair, dice = tiny(), random.Random(2)
    prompts, betas = random_prompts(3, 3, longest=12), (0.0, 0.4)
    variants = [Guidance(Blend(beta)) for beta in betas]
    options: dict[str, Any] = {"max_new_tokens": 16, "stop_token_ids": []}
    free = guided_sweep(pair, prompts, variants, **options)
    strings = strings_from(pair.tokenizer, dice.choice(free[0]).tokens.tolist(), dice)
    for outputs, full in zip(guided_sweep(pair, prompts, variants, stop_strings=strings, **options), free, strict=True):
        check_ends(pair, outputs, full, strings)
    alone = [Guided(beta).generate(pair, prompts, Call(16, stop_token_ids=[], stop_strings=strings)) for beta in betas]
    ranked = Rerank("target", betas=betas).generate(pair, prompts, Call(16, stop_token_ids=[], stop_strings=strings))
    for number, output in enumerate(ranked):
        assert output.trace.answers is not None
        assert [one.tokens.tolist() for one in output.trace.answers] == [own[number].tokens.tolist() for own in alone]
        assert [one.stop_reason for one in output.trace.answers] == [own[number].stop_reason for own in alone]


def test_a_draft_that_goes_on_learning() -> None:
    pair, dice = tiny(), random.Random(3)
    (prompt,) = random_prompts(1, 3, longest=12)
    options: dict[str, Any] = {"max_new_tokens": 24, "stop_token_ids": [], "online": OnlineTTT(8, TTTConfig(steps=1))}
    full = speculative_generate(pair, [prompt], **options)
    strings = strings_from(pair.tokenizer, full[0].tokens.tolist(), dice)
    check_ends(pair, speculative_generate(pair, [prompt], stop_strings=strings, **options), full, strings)


def test_stop_tokens_limits_and_strings_together() -> None:
    """Whatever comes first ends a row."""
    pair = tiny()
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 4}  # greedy answers of random models repeat themselves
    (full,) = tokens_of(
        autoregressive_generate(pair, random_prompts(1, 3), max_new_tokens=40, stop_token_ids=[], **drawn)
    )
    text, new = pair.tokenizer.decode, [i for i in range(10, 40) if full[i] not in full[:i]]  # type: ignore[union-attr]
    at, string = next(
        (end, piece)
        for end in new
        for start in range(end)
        if "\ufffd" not in (piece := text(full[start : end + 1])) and kept(pair.tokenizer, full, [piece]) == end + 1
    )

    def length(limit: int, tokens: list[int], strings: list[str]) -> tuple[int, str]:
        options: dict[str, Any] = {"max_new_tokens": limit, "stop_token_ids": tokens, "stop_strings": strings, **drawn}
        (plain,) = autoregressive_generate(pair, random_prompts(1, 3), **options)
        (fast,) = speculative_generate(pair, random_prompts(1, 3), scheme="exact_match", **options)
        assert fast.tokens.tolist() == plain.tokens.tolist()
        assert fast.stop_reason == plain.stop_reason
        return len(fast.tokens), fast.stop_reason

    assert length(40, [], [string]) == (at + 1, "stop")
    assert length(at + 1, [], [string]) == (at + 1, "stop")
    assert length(at, [], [string]) == (at, "length")
    assert length(40, [full[at]], [string]) == (at + 1, "stop")
    assert length(40, full[:1], [string]) == (1, "stop")


def test_the_host_waits_no_oftener(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = tiny(), random_prompts(4, 3, longest=12)
    options: dict[str, Any] = {"max_new_tokens": 16, "stop_token_ids": []}
    waits = HostWaits(monkeypatch)
    with waits:
        full = speculative_generate(pair, prompts, **options)
    strings, seen = strings_from(pair.tokenizer, full[0].tokens.tolist(), random.Random(1)), len(waits.seen)
    before = waits.synchronised
    with waits:
        outputs = speculative_generate(pair, prompts, stop_strings=strings, **options)
    assert any(out.stop_reason == "stop" for out in outputs)
    assert waits.synchronised - before == 1 + max(out.trace.target_forwards for out in outputs)
    assert len(waits.seen) - seen <= seen


@pytest.mark.parametrize("strings", ["a", [""], [1], ["\ufffd"], 5, [None]])
def test_what_is_no_list_of_texts_is_refused(strings: Any) -> None:
    with pytest.raises(InputError, match="stop_strings: expected a list of texts"):
        check_request(tiny(), [torch.tensor([1])], Call(4, stop_strings=strings))


def test_text_needs_a_tokenizer() -> None:
    pair = make_pair()
    with pytest.raises(InputError, match="stop_strings: expected a pair with a tokenizer"):
        autoregressive_generate(pair, [torch.tensor([1])], max_new_tokens=4, stop_strings=["a"])
    assert check_request(pair, [torch.tensor([1])], Call(4, stop_strings=[])).stop_strings is None
