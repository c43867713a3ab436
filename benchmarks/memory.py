"""Peak memory of a prefill: tapped layers streamed in chunks, against all hidden states of one forward."""

from __future__ import annotations

import torch
from peak import peak_bytes

from dgd_lightning.pair import Pair

ARMS = ("tapped", "all_hidden_states")


@torch.no_grad()
def read(pair: Pair, ids: torch.Tensor, arm: str) -> None:
    """Prefill ids [1, S] and leave the draft's context behind, by one of `ARMS`."""
    assert pair.draft is not None
    draft = pair.draft
    layer_ids, length = draft.config.target_layer_ids, ids.shape[1]
    contexts = draft.new_cache(1, length)
    if arm == "tapped":
        cache = pair.target.new_cache(1, length)
        pair.target.prefill(
            ids, [length], cache, layer_ids=layer_ids, on_features=lambda f, p: draft.extend(contexts, f, p)
        )
        return
    output = pair.target.model(ids, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    features = torch.cat([output.hidden_states[i + 1] for i in layer_ids], dim=-1)  # [1, S, F·H]
    draft.extend(contexts, features, torch.arange(length, device=ids.device)[None])


def compare(pair: Pair, length: int) -> dict[str, int]:
    """Each arm's peak in a prefill of ``length`` tokens."""
    ids = torch.randint(pair.target.vocab_size, (1, length), device=pair.target.device)
    peaks = {}
    for arm in ARMS:
        read(pair, ids[:, :64], arm)  # libraries allocate their own on first use
        peaks[arm] = peak_bytes(lambda arm=arm: read(pair, ids, arm), pair.target.device)  # type: ignore[misc]
    return peaks
