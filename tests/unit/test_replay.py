"""Replay of given texts: the logits are those that guided decoding mixes, whatever the stretches."""

from __future__ import annotations

import pytest
import torch
from decode_tools import random_prompts
from guided_tools import READOUTS, Record, naive_read, plain_forward, readout_of
from tiny import make_pair

from dgd_lightning.decode.replay import replay
from dgd_lightning.errors import InputError
from dgd_lightning.methods.guided import guided_generate

SAME = 1e-9  # fp64 logits of up to 30, made by forwards of other shapes


@pytest.mark.parametrize("chunk", [3, 64])
def test_replay_gives_what_decoding_mixed(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(block_size=8)
    prompt = random_prompts(1, 5, longest=24)
    for name in READOUTS:
        readout = readout_of(name, pair, prompt)
        record = Record(monkeypatch)
        with record:
            output = guided_generate(
                pair, prompt, beta=0.5, readout=readout, max_new_tokens=20, stop_token_ids=(), speculative=False
            )[0]
        mixed = record.of(1, 20)
        parts = list(replay(pair, prompt[0], [output.tokens], [readout], chunk=chunk))
        assert [part.first for part in parts] == list(range(0, 20, chunk))
        assert torch.equal(torch.cat([part.tokens for part in parts]), output.tokens)
        assert (torch.cat([part.target for part in parts]) - mixed.target[0]).abs().max() < SAME
        assert (torch.cat([part.readouts[0] for part in parts]) - mixed.readout[0]).abs().max() < SAME


def test_several_readouts_read_one_forward_and_a_prompt_of_one_token_will_do() -> None:
    pair = make_pair(block_size=4)
    prompt, answer = torch.tensor([7]), torch.tensor([3, 9, 4, 4, 11])
    names = ("draft", "lens")
    (part,) = replay(pair, prompt, [answer], [readout_of(name, pair, [prompt]) for name in names])
    for at in range(len(answer)):
        text = [*prompt.tolist(), *answer.tolist()[:at]]
        assert (part.target[at] - plain_forward(pair.target.model, text).logits[0, -1]).abs().max() < SAME
        for name, readout in zip(names, part.readouts, strict=True):
            if len(text) > 1:
                assert (readout[at] - naive_read(name, pair, prompt)(text)).abs().max() < SAME


def test_answers_behind_one_prompt_do_not_see_each_other() -> None:
    pair, names = make_pair(block_size=4), READOUTS
    prompt = random_prompts(1, 5, longest=24)[0]
    answers = [torch.arange(3, 3 + length) for length in (9, 14, 1, 6)]
    readouts = [readout_of(name, pair, [prompt]) for name in names]
    together: dict[int, list] = {number: [] for number in range(4)}
    for part in replay(pair, prompt, answers, readouts, chunk=5):
        together[part.answer].append(part)
    for number, answer in enumerate(answers):
        (alone,) = replay(pair, prompt, [answer], readouts)
        parts = together[number]
        assert torch.equal(torch.cat([part.tokens for part in parts]), answer)
        assert (torch.cat([part.target for part in parts]) - alone.target).abs().max() < SAME
        for at in range(len(names)):
            assert (torch.cat([part.readouts[at] for part in parts]) - alone.readouts[at]).abs().max() < SAME


def test_without_readouts_the_target_alone_is_read() -> None:
    pair = make_pair(block_size=4)
    (part,) = replay(pair, torch.tensor([7, 8]), [torch.tensor([3])], [])
    assert part.readouts == []
    assert part.target.shape == (1, pair.target.vocab_size)


def test_unusable_answers_are_named() -> None:
    pair = make_pair(block_size=4)
    with pytest.raises(InputError, match="answer"):
        list(replay(pair, torch.tensor([7]), [torch.tensor([], dtype=torch.long)], []))
    with pytest.raises(InputError, match="answer"):
        list(replay(pair, torch.tensor([7]), [torch.tensor([pair.target.vocab_size])], []))
