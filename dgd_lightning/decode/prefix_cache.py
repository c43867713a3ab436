"""Prefix caches: what several prompts begin with, read once by the target and used by every batch that needs it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.model import Target

CHUNK = 1024  # positions whose features are handed on together, as in a prefill


class PrefixCache(NamedTuple):
    """What several prompts begin with, as the target read it. It is copied into the rows that need it.

    It holds features instead of a draft's keys and values: these depend on the adapter that the draft has, and other
    readouts read the same features. Making them again costs a draft's share of a prefill.

    With ``draft_cache`` nothing is copied: a single row goes on in the two caches themselves, which must be large
    enough, and writes behind the prefix only. So the caches serve one prompt after the other.
    """

    ids: Tensor  # [S] on CPU, positions 0 … S − 1
    cache: PositionCache  # of the target, one row
    layer_ids: tuple[int, ...] = ()
    features: Tensor | None = None  # [1, S, F·H] of these layers; None where there are none
    draft_cache: PositionCache | None = None  # of the draft, one row

    def taps(self, layer_ids: Sequence[int], low: int, high: int) -> Tensor:
        """Features of some of its layers at positions low … high − 1 that it has, [1, C, F·H]."""
        if self.features is None or not set(layer_ids) <= set(self.layer_ids):
            raise InputError(
                "prefixes",
                expected=f"features of layers {', '.join(map(str, layer_ids))}, which draft or readout tap",
                received=f"those of layers {', '.join(map(str, self.layer_ids))}" if self.layer_ids else "none",
                hint=f"make_prefix_cache(target, ids, {list(layer_ids)})",
            )
        parts = dict(zip(self.layer_ids, self.features[:, low:high].chunk(len(self.layer_ids), dim=-1), strict=True))
        return torch.cat([parts[layer] for layer in layer_ids], dim=-1)


def make_prefix_cache(target: Target, ids: Tensor, layer_ids: Sequence[int] = ()) -> PrefixCache:
    """Read a prefix [S], for batches that need at most these layers."""
    cache = target.new_cache(1, len(ids))
    read = target.prefill(
        ids[None].to(target.device), [len(ids)], cache, layer_ids=layer_ids, keep_features=bool(layer_ids)
    )
    return PrefixCache(ids, cache, tuple(layer_ids), read.features)


def check_prefixes(
    prefixes: Sequence[PrefixCache | None] | None, prompts: Sequence[Tensor], rows_per_prompt: int = 1
) -> list[PrefixCache | None]:
    """One per prompt [S] or None.

    A prompt must begin with its prefix and go on, and only a single row can write into the caches of its prefix.
    """
    if prefixes is None:
        return [None] * len(prompts)
    if len(prefixes) != len(prompts):
        raise InputError(
            "prefixes",
            expected=f"one per prompt, {len(prompts)}, or None in its place",
            received=len(prefixes),
            hint="give [None] for a prompt that shares nothing",
        )
    for number, (prefix, prompt) in enumerate(zip(prefixes, prompts, strict=True)):
        if prefix is None:
            continue
        known = len(prefix.ids)
        if len(prompt) <= known or not torch.equal(prompt[:known], prefix.ids):
            raise InputError(
                f"prefixes[{number}]",
                expected=f"a prompt that begins with these {known} tokens and has more",
                received=f"another one, of {len(prompt)} tokens",
                hint="give None for it",
            )
        if prefix.draft_cache is not None and len(prompts) * rows_per_prompt > 1:
            raise InputError(
                f"prefixes[{number}]",
                expected="a single row where it goes on in the caches of a prefix",
                received=f"{len(prompts)} prompts, {rows_per_prompt} rows each",
                hint="leave draft_cache out: the prefix is copied then",
            )
    return list(prefixes)


def cache_for(network: Target | DFlashDraft, rows: int, need: int, own: PositionCache | None) -> PositionCache:
    """A new cache of ``need`` positions, or the ``own`` one of a prefix, which must be as large."""
    if own is None:
        return network.new_cache(rows, need)
    if own.capacity < need:
        raise InputError(
            "prefixes[0]",
            expected=f"caches of {need} positions, for prompt, new tokens and a block",
            received=own.capacity,
            hint="allocate larger ones, or lower max_new_tokens",
        )
    return own


def fill_from_prefixes(
    prefixes: Sequence[PrefixCache | None],
    cache: PositionCache,
    layer_ids: Sequence[int],
    on_features: Callable[[Tensor, Tensor], None] | None,
) -> None:
    """Copy prefixes into the rows of a batch, and hand on their features as a prefill would.

    Rows whose prefix is shorter are padded at the cache's last position, which lies behind every row's prompt.
    Prefixes in whose own caches a row goes on need nothing. ``on_features`` is called with features [B, C, F·H] of the
    layers and positions [B, C].
    """
    found: dict[int, tuple[PrefixCache, list[int]]] = {}  # each with its rows
    for row, prefix in enumerate(prefixes):
        if prefix is not None and prefix.draft_cache is None:
            found.setdefault(id(prefix), (prefix, []))[1].append(row)
    kinds = list(found.values())
    for prefix, members in kinds:
        cache.fill(members, prefix.cache, len(prefix.ids))
    if on_features is None or not layer_ids:
        return
    longest = max((len(prefix.ids) for prefix, _ in kinds), default=0)
    for low in range(0, longest, CHUNK):
        taps = [prefix.taps(layer_ids, low, min(low + CHUNK, longest)) for prefix, _ in kinds]
        count = min(CHUNK, longest - low)
        features = taps[0].new_zeros(len(prefixes), count, taps[0].shape[-1])  # [B, C, F·H]
        positions = torch.full(features.shape[:2], cache.capacity - 1, device=features.device)  # [B, C]
        for part, (_, members) in zip(taps, kinds, strict=True):
            length = part.shape[1]
            features[members, :length] = part
            positions[members, :length] = torch.arange(low, low + length, device=features.device)
        on_features(features, positions)
