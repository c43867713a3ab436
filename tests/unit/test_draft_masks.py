"""The draft's masks, against the rule spelt out in loops; the FlexAttention rule against the dense one."""

from __future__ import annotations

import pytest
import torch
from tiny import make_pair
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from dgd_lightning.draft import attention as network
from dgd_lightning.draft import tiles
from dgd_lightning.draft.attention import (
    Attention,
    attend,
    attend_in_groups,
    choose_attention,
    groups_of,
    multi_anchor_mask,
    multi_anchor_mask_mod,
    single_block_mask,
)
from dgd_lightning.errors import InputError

ANCHORS = torch.tensor([[0, 3, 5], [2, 2, 0]])
KEEP = torch.tensor([[True, True, True], [True, True, False]])
SUMS = 1e-12  # fp64 sums in another order, of the largest number


def test_multi_anchor_mask_in_words() -> None:
    length, size = 5, 2
    mask = multi_anchor_mask(ANCHORS, length, size, KEEP)
    assert mask.shape == (2, 1, 6, 11)
    for b in range(2):
        for query in range(6):
            for key in range(11):
                block = query // size
                if key < length:
                    wanted = bool(KEEP[b, block]) and key < int(ANCHORS[b, block])
                else:
                    wanted = (key - length) // size == block
                assert bool(mask[b, 0, query, key]) == wanted, (b, query, key)


def test_single_block_mask_in_words() -> None:
    mask = single_block_mask(torch.tensor([[1], [3]]), 2, 6)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert mask.shape == (2, 1, 2, 6)


def test_flex_rule_is_the_dense_rule() -> None:
    rule = multi_anchor_mask_mod(ANCHORS, 5, 2, KEEP)
    found = create_mask(rule, 2, 1, 6, 11, device="cpu")
    assert torch.equal(found, multi_anchor_mask(ANCHORS, 5, 2, KEEP))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_mixes_as_attend() -> None:
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 6, 16, generator=draw)
    keys, values = torch.randn(2, 2, 2, 11, 16, generator=draw).unbind(0)
    mask = create_block_mask(multi_anchor_mask_mod(ANCHORS, 5, 2, KEEP), 2, None, 6, 11, device="cpu")
    mixed = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(mixed, attend(queries, keys, values, multi_anchor_mask(ANCHORS, 5, 2, KEEP)))


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_folded_query_groups_are_repeated_keys(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(2, heads, 6, 8, generator=draw, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 2, 11, 8, generator=draw, dtype=torch.float64).unbind(0)
    mask = multi_anchor_mask(ANCHORS, 5, 2, KEEP)
    folded = attend(queries, keys, values, mask)
    monkeypatch.setattr(network, "FOLD_QUERIES", 0)
    torch.testing.assert_close(folded, attend(queries, keys, values, mask), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    ("attention", "at_once"), [("sdpa", 1), ("sdpa", 3), ("sdpa", 16), ("tiles", 1), ("tiles", 7), ("tiles", 64)]
)
def test_groups_and_tiles_are_the_dense_mask(
    heads: int, attention: Attention, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all gradients; anchors in no order, with none before them, dropped, and behind the context's end."""
    monkeypatch.setattr(network, "GROUP_BLOCKS", at_once)
    monkeypatch.setattr(tiles, "NARROW", at_once)
    monkeypatch.setattr(tiles, "WIDE", at_once)
    draft = make_pair(num_heads=heads, num_kv_heads=2).draft
    assert draft is not None
    draw = torch.Generator().manual_seed(0)
    size, hidden = draft.config.block_size, draft.config.hidden_size
    anchors = torch.tensor([[1, 9, 30, 30, 12, 0, 4], [0, 0, 7, 25, 28, 31, 29]])
    keep = torch.tensor([[True] * 4 + [False] + [True] * 2, [False, True, True, False] + [True] * 3])
    inputs = {
        "features": torch.randn(2, 30, draft.config.num_features, generator=draw, dtype=torch.float64),
        "embeddings": torch.randn(2, 7 * size, hidden, generator=draw, dtype=torch.float64),
    }
    found = []
    for kind in (attention, "dense"):
        draft.zero_grad()
        given = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        states = draft.multi_anchor(**given, anchors=anchors, keep=keep, attention=kind)
        states.sin().sum().backward()
        slopes = {name: value.grad for name, value in (*given.items(), *draft.named_parameters())}
        found.append({"value": states.detach()} | slopes)
    fast, slow = found
    assert min(value.abs().max() for value in slow.values()) > 0
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, atol=SUMS * float(value.abs().max()), rtol=0, msg=name)


def test_groups_read_nothing_behind_their_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "GROUP_BLOCKS", 2)
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, 6, 8, generator=draw)
    context, own = torch.randn(2, 1, 2, 9, 8, generator=draw), torch.randn(2, 1, 2, 6, 8, generator=draw)
    context[:, :, :, 5:] = torch.nan  # 0 · NaN is NaN: a hidden key that is read would be seen
    groups = groups_of(torch.tensor([[2, 5, 8]]), 9, 2, None, query_groups=2, dtype=torch.float32)
    assert [(group.rows, group.limit, tuple(group.bias.shape)) for group in groups] == [
        (slice(0, 4), 5, (1, 1, 8, 9)),
        (slice(4, 6), 8, (1, 1, 4, 10)),
    ]
    mixed = attend_in_groups(queries, context.unbind(0), own.unbind(0), groups)
    assert mixed[:, :, :4].isfinite().all()
    assert mixed[:, :, 4:].isnan().all()


def test_flex_off_cuda_is_refused() -> None:
    pair = make_pair(dtype=torch.float32)
    assert pair.draft is not None
    features, embeddings = torch.zeros(1, 8, 64), torch.zeros(1, 4, 32)
    with pytest.raises(
        InputError, match="attention: expected 'sdpa', 'tiles', or 'flex' on a CUDA device, received 'flex' on cpu"
    ):
        pair.draft.multi_anchor(features, embeddings, torch.tensor([[3]]), attention="flex")


def test_attention_is_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(network, "has_triton", lambda: True)
    for kind, expected in (("cuda", "flex"), ("cpu", "tiles"), ("mps", "sdpa")):
        assert choose_attention("auto", torch.device(kind)) == expected
    assert choose_attention("sdpa", cuda) == "sdpa"
    monkeypatch.setattr(network, "has_triton", lambda: False)
    with pytest.warns(UserWarning, match="needs Triton"):
        assert choose_attention("auto", cuda) == "sdpa"
    assert choose_attention("flex", cuda) == "flex"  # whoever asks for it gets its own error
    with pytest.raises(InputError, match=r"ttt.attention: expected .* received 'flex' on cpu"):
        choose_attention("flex", torch.device("cpu"), "ttt.attention")
    with pytest.raises(InputError, match=r"received 'flax'.*did you mean flex\?"):
        choose_attention("flax", cuda)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_flex_on_cuda_is_sdpa() -> None:
    pair = make_pair(dtype=torch.float32, num_heads=4, num_kv_heads=2, head_dim=16)
    draft = pair.draft
    assert draft is not None
    draft.cuda()
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 200, draft.config.num_features, generator=draw).cuda()
    anchors = torch.randint(1, 190, (2, 40), generator=draw).cuda()
    keep = torch.rand(2, 40, generator=draw).cuda() > 0.2
    embeddings = torch.randn(2, 160, 32, generator=draw).cuda()
    found = []
    for attention in ("sdpa", "flex"):
        draft.zero_grad()
        hidden = draft.multi_anchor(features, embeddings, anchors, keep, attention=attention)
        hidden[keep.repeat_interleave(4, dim=1)].square().sum().backward()
        found.append((hidden.detach(), draft.fc.weight.grad.clone()))
    for dense, flex in zip(*found, strict=True):
        torch.testing.assert_close(flex, dense, atol=1e-3, rtol=1e-3)  # TF32-free fp32, another summation order
