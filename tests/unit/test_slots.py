"""All slots of the draft along a text, and the draft with layers taken away, against one uncached block at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from decode_tools import random_prompts
from guided_tools import plain_forward
from tiny import make_pair
from torch import Tensor

from dgd_lightning.decode.readouts.ablated_draft import AblatedDraft
from dgd_lightning.decode.readouts.draft import DraftReadout, DraftSlots
from dgd_lightning.decode.replay import replay
from dgd_lightning.errors import InputError
from dgd_lightning.methods.guided import guided_generate
from dgd_lightning.pair import Pair

SAME = 1e-9  # fp64 logits of up to 30, made by forwards of other shapes
LAYERS = (0, 2, 3)  # tapped


def changed(features: Tensor, known: int, ablate: Sequence[int], by: str) -> Tensor:
    """Features [1, S, F·H] with layers replaced: by zeros, or by their mean over the first ``known`` positions."""
    parts = list(features.chunk(len(LAYERS), dim=-1))
    for layer in ablate:
        at = LAYERS.index(layer)
        mean = sum(parts[at][0, p] for p in range(known)) / max(1, known) if by == "mean" else 0.0
        parts[at] = torch.zeros_like(parts[at]) + mean
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def naive_block(
    pair: Pair, text: Sequence[int], known: int = 0, ablate: Sequence[int] = (), by: str = "zero"
) -> Tensor:
    """Logits [K − 1, V] of slots 1 … K − 1 of one block anchored at the text's last token."""
    draft, model, at = pair.draft, pair.target.model, len(text) - 1
    assert draft is not None
    states = plain_forward(model, text).hidden_states
    features = torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1)[:, :at]
    features = changed(features, known, ablate, by)
    block = torch.tensor([[text[-1], *[draft.config.mask_token_id] * (draft.config.block_size - 1)]])
    hidden = draft.multi_anchor(features, model.get_input_embeddings()(block), torch.tensor([[at]]))
    return model.get_output_embeddings()(hidden[0, 1:])


@pytest.fixture
def pair() -> Pair:
    return make_pair(block_size=5, layer_ids=LAYERS)


@pytest.mark.parametrize("chunk", [3, 64])
def test_every_slot_is_that_of_a_block_alone(pair: Pair, chunk: int) -> None:
    prompt, answer = random_prompts(2, 5, longest=20)
    parts = list(replay(pair, prompt, [answer], [DraftReadout(), DraftSlots()], chunk=chunk))
    slots = torch.cat([part.readouts[1] for part in parts])
    assert slots.shape == (len(answer), 4, pair.target.vocab_size)
    for at in range(len(answer)):
        expected = naive_block(pair, [*prompt.tolist(), *answer.tolist()[:at]])
        assert (slots[at] - expected).abs().max() < SAME
    first = torch.cat([part.readouts[0] for part in parts])
    assert (slots[:, 0] - first).abs().max() < SAME  # what guided decoding reads


@pytest.mark.parametrize("by", ["zero", "mean"])
@pytest.mark.parametrize("ablate", [[2], [0, 3], [0, 2, 3]])
def test_ablated_draft_reads_replaced_states(pair: Pair, by: str, ablate: list[int]) -> None:
    prompt, answer = random_prompts(2, 6, longest=20)
    readout = AblatedDraft(ablate, by)  # type: ignore[arg-type]
    parts = list(replay(pair, prompt, [answer], [readout, DraftReadout()], chunk=4))
    found, whole = (torch.cat([part.readouts[i] for part in parts]) for i in (0, 1))
    for at in range(len(answer)):
        text = [*prompt.tolist(), *answer.tolist()[:at]]
        expected = naive_block(pair, text, len(prompt) - 1, ablate, by)[0]
        assert (found[at] - expected).abs().max() < SAME
    assert (found - whole).abs().max() > 0.1  # and it does something


def test_a_mean_knows_nothing_of_the_answer(pair: Pair) -> None:
    """Another answer, the same words on its first token; a prompt of one token has the mean zero."""
    prompt, answer = random_prompts(2, 6, longest=20)
    firsts = [
        next(iter(replay(pair, prompt, [text], [AblatedDraft([2])]))).readouts[0][0] for text in (answer, answer + 1)
    ]
    assert (firsts[0] - firsts[1]).abs().max() < SAME
    ablated = [AblatedDraft([2]), AblatedDraft([2], "zero")]
    means, zeros = next(iter(replay(pair, prompt[:1], [answer], ablated))).readouts
    assert torch.equal(means, zeros)


@pytest.mark.parametrize("by", ["zero", "mean"])
def test_decoding_with_an_ablated_draft_is_one_law(pair: Pair, by: str) -> None:
    """Rows of other lengths, several tokens per forward, and each prompt alone give the same tokens."""
    prompts = random_prompts(4, 9, longest=24)
    readout = AblatedDraft([0, 3], by)  # type: ignore[arg-type]
    knobs = {"beta": 0.6, "readout": readout, "max_new_tokens": 16, "stop_token_ids": ()}
    fast = [output.tokens.tolist() for output in guided_generate(pair, prompts, **knobs)]  # type: ignore[arg-type]
    slow = [
        guided_generate(pair, [prompt], speculative=False, **knobs)[0].tokens.tolist()  # type: ignore[arg-type]
        for prompt in prompts
    ]
    plain = [
        output.tokens.tolist()
        for output in guided_generate(pair, prompts, **{**knobs, "readout": "draft"})  # type: ignore[arg-type]
    ]
    assert fast == slow
    assert fast != plain


@pytest.mark.parametrize("ablate", [[], [1], [0, 7], "023", 2])
def test_only_tapped_layers_can_be_taken_away(pair: Pair, ablate: object) -> None:
    readout = AblatedDraft(ablate)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"readout\.ablate: expected some of .*\(0, 2, 3\)"):
        list(replay(pair, torch.tensor([7, 8]), [torch.tensor([3])], [readout]))


def test_unknown_replacement_and_missing_draft_are_told(pair: Pair) -> None:
    prompt, answer = torch.tensor([7, 8]), torch.tensor([3])
    with pytest.raises(InputError, match=r"readout\.by"):
        list(replay(pair, prompt, [answer], [AblatedDraft([0], "noise")]))  # type: ignore[arg-type]
    alone = Pair(pair.target, None, None)
    for readout in (DraftSlots(), AblatedDraft([0])):
        with pytest.raises(InputError, match="draft"):
            list(replay(alone, prompt, [answer], [readout]))
