"""Attention of blocks over one context, tile by tile of its keys, with a backward pass of its own.

For CPUs, where no fused kernel reads ragged prefixes. A tile of keys is looked at by the blocks whose anchors lie
behind it and by no other, so each key is read once for all of them. The forward pass has the running softmax of Milakov
and Gimelshein (arXiv 1805.02867) and keeps its terms while there is room; the backward pass (FlashAttention, arXiv
2205.14135, algorithm 4) reads them instead of making them again: one matrix product of seven less, and no exponential.
Letters: B rows, N blocks, K block size, g query heads per key head, M = N·g·K queries of one, S context, D width.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2**20  # scores that are worked on at a time: few enough for caches, and enough to hide Python's own time
KEPT = 2**28  # bytes of terms, per layer and row, that wait for the backward pass; it makes the others again
NARROW, WIDE = 64, 1024  # keys of a tile: fewer are many small products, and more are read in vain


class Tile(NamedTuple):
    """Neighbouring keys and who looks at them."""

    keys: slice  # of positions 0…S−1
    first: int  # the blocks from this one on, in the order of their limits
    hidden: Tensor | None  # [n, 1, width] bool, True: not seen by the n blocks that come first; None: all see all


class Plan(NamedTuple):
    """What one row's blocks look at, the same in all layers and heads."""

    blocks: int  # N
    order: Tensor | None  # [N], blocks by their limits; None where that is their order already
    tiles: list[Tile]


def width_of(queries: int) -> int:
    """Keys of a tile that so many queries look at, all heads together."""
    return min(WIDE, max(NARROW, TILE // queries))


def plan_of(limits: Sequence[int], heads: int, rows: int, device: torch.device) -> Plan:
    """Tiles of the keys that some of N blocks sees, each those before its limit; g·K = ``rows`` queries of a head."""
    order = sorted(range(len(limits)), key=limits.__getitem__)
    ascending = [limits[block] for block in order]
    width = width_of(heads * rows * len(limits))
    tiles = []
    for start in range(0, ascending[-1], width):
        end = min(start + width, ascending[-1])
        first, whole = bisect_right(ascending, start), bisect_left(ascending, end)
        hidden = None
        if whole > first:
            some = torch.tensor(ascending[first:whole], device=device)
            hidden = (torch.arange(start, end, device=device) >= some[:, None])[:, None]
        tiles.append(Tile(slice(start, end), first, hidden))
    sorted_already = order == list(range(len(limits)))
    return Plan(len(limits), None if sorted_already else torch.tensor(order, device=device), tiles)


def attend_in_tiles(
    queries: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], plans: Sequence[Plan]
) -> Tensor:
    """Attention of each block over the context before its limit and over its own slots, in the values' dtype.

    Half precision is widened to fp32 tile by tile.

    Args:
        queries: [B, heads, N·K, D].
        context: keys and values of positions 0…S−1, [B, kv heads, S, D] each.
        own: those of the blocks' slots, [B, kv heads, N·K, D] each.
        plans: of the B rows (:func:`plan_of`).
    """
    with torch.autocast(queries.device.type, enabled=False):  # it would round scores to half precision
        rows = zip(queries, *context, *own, plans, strict=True)
        return torch.stack([_row(*row) for row in rows]).to(context[1].dtype)


def _row(queries: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, plan: Plan) -> Tensor:
    """[heads, N·K, D]; keys and values of the context [kv heads, S, D], own ones [kv heads, N·K, D]."""
    blocks, kv_heads, (heads, slots, width) = plan.blocks, keys.shape[0], queries.shape
    wide = torch.promote_types(keys.dtype, torch.float32)
    # [heads, N·K, D] -> [kv heads, N, g·K, D]: so that the blocks which see a tile are neighbours
    asked = (queries.to(wide) / math.sqrt(width)).view(kv_heads, heads // kv_heads, blocks, -1, width).transpose(1, 2)
    mine, theirs = (x.to(wide).view(kv_heads, blocks, -1, width) for x in (own_keys, own_values))  # [kv heads, N, K, D]
    if plan.order is not None:
        asked, mine, theirs = (x.index_select(1, plan.order) for x in (asked, mine, theirs))
    asked = asked.flatten(2, 3)  # [kv heads, N, g·K, D]
    of_context, log_sum = _OverContext.apply(asked.flatten(1, 2), keys, values, plan.tiles, asked.shape[2])
    scores = asked @ mine.transpose(-1, -2)  # [kv heads, N, g·K, K]
    log_sum = log_sum.view(*asked.shape[:3], 1)
    whole = torch.logaddexp(log_sum, scores.logsumexp(-1, keepdim=True))  # [kv heads, N, g·K, 1]
    mixed = (log_sum - whole).exp() * of_context.view_as(asked) + (scores - whole).exp() @ theirs
    if plan.order is not None:
        mixed = mixed.index_select(1, plan.order.argsort())
    return mixed.unflatten(2, (heads // kv_heads, -1)).transpose(1, 2).reshape(heads, slots, width)


def _scores(queries: Tensor, keys: Tensor, tile: Tile, rows: int) -> Tensor:
    """Of the m queries that see some of a tile, [h, m, width]; −∞ at keys that are hidden from them."""
    seeing = queries[:, tile.first * rows :]
    scores = torch.bmm(seeing, keys[:, tile.keys].to(queries.dtype).transpose(1, 2))
    if tile.hidden is not None:
        partly = scores[:, : tile.hidden.shape[0] * rows].unflatten(1, (-1, rows))
        partly.masked_fill_(tile.hidden, -math.inf)
    return scores


class _OverContext(torch.autograd.Function):
    """What M queries find in the keys that their blocks see, and the log of the sum of their exponentials.

    queries [h, M, D], scaled and wide; keys and values [h, S, D] -> [h, M, D] and [h, M, 1] (0 and −∞ where no key is
    seen). ``rows`` is the number of queries of a block.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, tiles: list[Tile], rows: int
    ) -> tuple[Tensor, Tensor]:
        mixed, wide = torch.zeros_like(queries), queries.dtype
        largest = queries.new_full((*queries.shape[:2], 1), -math.inf)  # of the tiles so far
        total = torch.zeros_like(largest)
        wanted, room, kept = any(ctx.needs_input_grad), KEPT, list[Tensor]()
        for tile in tiles:
            seeing = slice(tile.first * rows, None)
            terms = _scores(queries, keys, tile, rows)
            before = largest[:, seeing]
            top = torch.maximum(before, terms.amax(-1, keepdim=True))  # finite: each of these blocks sees a key here
            terms.sub_(top).exp_()
            less = (before - top).exp()
            total[:, seeing].mul_(less).add_(terms.sum(-1, keepdim=True))
            mixed[:, seeing].mul_(less).add_(torch.bmm(terms, values[:, tile.keys].to(wide)))
            largest[:, seeing] = top
            room -= terms.nbytes
            if wanted and room >= 0:
                kept += [terms, top]
        mixed /= total.clamp_min(1)  # the largest counts 1; a sum of 0 saw nothing
        log_sum = largest + total.log()
        ctx.tiles, ctx.rows = tiles, rows
        ctx.save_for_backward(queries, keys, values, mixed, log_sum, *kept)
        return mixed, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor, log_slopes: Tensor) -> Any:
        queries, keys, values, mixed, log_sum, *kept = ctx.saved_tensors
        inputs = zip((queries, keys, values), ctx.needs_input_grad, strict=False)
        of_queries, of_keys, of_values = (torch.zeros_like(x) if wanted else None for x, wanted in inputs)
        wide, common = queries.dtype, (slopes * mixed).sum(-1, keepdim=True) - log_slopes  # [h, M, 1]
        for tile, terms, top in zip_longest(ctx.tiles, kept[::2], kept[1::2]):
            seeing = slice(tile.first * ctx.rows, None)
            if terms is None:  # there was no room: probabilities, made again
                terms = _scores(queries, keys, tile, ctx.rows).sub_(log_sum[:, seeing]).exp_()
                given, less = slopes[:, seeing], common[:, seeing]
            else:
                share = (top - log_sum[:, seeing]).exp()  # terms times it are probabilities
                given, less = slopes[:, seeing] * share, common[:, seeing] * share
            if of_values is not None:
                of_values[:, tile.keys] = torch.bmm(terms.transpose(1, 2), given)
            of_scores = torch.bmm(given, values[:, tile.keys].to(wide).transpose(1, 2))  # [h, m, width]
            of_scores.sub_(less).mul_(terms)
            if of_queries is not None:
                of_queries[:, seeing].add_(torch.bmm(of_scores, keys[:, tile.keys].to(wide)))
            if of_keys is not None:
                of_keys[:, tile.keys] = torch.bmm(of_scores.transpose(1, 2), queries[:, seeing])
        return of_queries, of_keys, of_values, None, None
