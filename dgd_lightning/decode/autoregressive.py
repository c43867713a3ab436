"""One token per target forward: the plain decoder, on the same engine as the speculative one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgd_lightning.decode.engine import Batch, OnProgress, Prefix, check_prefix, check_request, choose
from dgd_lightning.decode.prefix import PrefixCache
from dgd_lightning.decode.random_source import RandomSource
from dgd_lightning.decode.verify import Verdict
from dgd_lightning.types import DecodeOutput

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair


@torch.no_grad()
def autoregressive_generate(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    num_return_sequences: int = 1,
    on_progress: OnProgress | None = None,
    prefix: Prefix | None = None,
    prefixes: Sequence[PrefixCache | None] | None = None,
    random_source: RandomSource | None = None,
) -> list[DecodeOutput]:
    """Decode a batch of prompts token by token.

    Args:
        pair: its draft is not used and may be None.
        prompts: 1-D integer tensors of any lengths, B of them.
        max_new_tokens: limit per row, the stop token included.
        temperature: 0 for greedy decoding.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the smallest set of likeliest tokens with this mass only.
        stop_token_ids: None for the target's own; an empty list for none.
        seed: one integer (row seeds are derived from it), one per row, or None for fresh entropy (kept in the trace).
        num_return_sequences: rows per prompt, which share its prefill and draw from seeds of their own.
        on_progress: called after the prefill and after every cycle.
        prefix: what of a single prompt is read already, in caches that are written on.
        prefixes: what of each prompt is read already, to be copied, or None in its place.
        random_source: in place of the seeded one, for tests that enumerate every outcome.

    Returns:
        Outputs in the order of the prompts, ``num_return_sequences`` per prompt; every acceptance length is 1.

    Raises:
        InputError: an unusable argument, or a prompt that does not fit the target with its new tokens.
    """
    request = check_request(
        pair,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=stop_token_ids,
        seed=seed,
        num_return_sequences=num_return_sequences,
        prefixes=prefixes,
    )
    if prefix is not None:
        check_prefix(prefix, request, 1)
    batch = Batch(pair.target, request, width=1, prefix=prefix, random_source=random_source, on_progress=on_progress)
    while batch.active:
        positions = batch.positions(1)  # [b, 1]
        tokens = choose(
            batch.step(batch.last[:, None], positions).logits, request.sampling, batch.random_source, positions + 1
        )  # [b, 1]
        batch.commit(Verdict(tokens, torch.ones_like(batch.last)))
        batch.synchronise()
    return batch.outputs(drafts=0)
