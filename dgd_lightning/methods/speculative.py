"""Speculative decoding with a DFlash draft: one block and one verifying target forward a cycle, exact for any draft."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack, get_args

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer
from dgd_lightning.decode.batch import Batch
from dgd_lightning.decode.call import Call, CallOptions, CycleHook, Request, call_of, check_request
from dgd_lightning.decode.drafter import Drafter, Scheme, check_block_size, check_draft, judge, propose
from dgd_lightning.decode.session import Session
from dgd_lightning.methods.base import Method
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput


@dataclass(frozen=True)
class Speculative(Method):
    """The draft proposes blocks, the target verifies them; answers have the target's own distribution.

    Greedy decoding accepts while draft and target have the same argmax. With a temperature, ``rejection`` accepts with
    probability min(1, p/q) (Leviathan et al. 2023, Chen et al. 2023), and ``exact_match`` draws the target's token at
    each slot and accepts while it is the draft's argmax (z-lab/dflash): slower, but the tokens are those of
    ``Autoregressive`` for the same seed.

    Args:
        block_size: K, tokens per verification with the anchor, from 2 to the size the draft was trained with (default).
        scheme: how blocks are verified when the temperature is above 0.

    Raises:
        InputError: a setting that can't be.
    """

    block_size: int | None = None
    scheme: Scheme = "rejection"

    lossless = True
    online = True

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, least=2, optional=True)
        check_choice("scheme", self.scheme, get_args(Scheme))

    @property
    def needs_draft(self) -> bool:
        return True

    def block(self, pair: Pair) -> int | None:
        return check_block_size(pair, self.block_size)

    @torch.no_grad()
    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        size, request = check_block_size(pair, self.block_size), check_request(pair, prompts, call)
        if call.cycle_hook is None:
            return self._decode(pair, request, size, None)
        rows = range(len(request.rows))
        return [out for row in rows for out in self._decode(pair, request.alone(row), size, call.cycle_hook)]

    def _decode(self, pair: Pair, request: Request, size: int, online: CycleHook | None) -> list[DecodeOutput]:
        draft = check_draft(pair)
        hook = None if online is None else online.begin(pair, request.capacity(size))
        try:
            drafter = Drafter(pair.target, draft, request, size)

            def extend(features: Tensor | None, positions: Tensor) -> None:
                assert features is not None, "the draft taps layers"
                drafter.extend(features if hook is None else hook.observe(features, positions), positions)

            layer_ids = draft.config.target_layer_ids if hook is None else hook.layer_ids
            session = Session(pair.target, request, width=size, layer_ids=layer_ids, companions=[drafter.cache])
            batch = Batch.after_prefill(session, extend)
            while batch.active:
                # Rejected positions are written too: they lie at or beyond the next anchor, which hides them until
                # they are overwritten.
                positions = batch.positions(size)  # [b, K]
                proposal = propose(drafter, batch, positions, self.scheme)
                forward = batch.step(torch.cat([batch.last[:, None], proposal.tokens], dim=1), positions)
                batch.commit(judge(batch, proposal, forward.logits, positions + 1), forward.logits)
                extend(forward.features, positions)
                batch.synchronise()
                if hook is not None and batch.active:
                    features = hook.after_cycle(batch.ids_read(), request.lengths[0])
                    if features is not None:
                        drafter.extend(features, torch.arange(features.shape[1], device=features.device)[None])
            return batch.outputs(drafts=1)
        finally:
            if hook is not None:
                hook.close()


def speculative_generate(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    block_size: int | None = None,
    scheme: Scheme = "rejection",
    online: CycleHook | None = None,
    **options: Unpack[CallOptions],
) -> list[DecodeOutput]:
    """Decode a batch of prompts with drafted blocks; the output has the distribution of ``autoregressive_generate``.

    Args:
        pair: target and draft.
        prompts, max_new_tokens, options: as in ``autoregressive_generate``.
        block_size, scheme: see :class:`Speculative`.
        online: go on adapting the draft to what was verified (:class:`~dgd_lightning.OnlineTTT`), and forget it all at
            the end of each row; rows are decoded one by one. The output keeps the target's distribution, whatever the
            draft becomes.

    Returns:
        Outputs in the order of the prompts, ``num_return_sequences`` per prompt.

    Raises:
        InputError: an unusable argument, a pair without a draft or in two dtypes, or a prompt that does not fit.
    """
    call = call_of(max_new_tokens, **options, cycle_hook=online)
    return Speculative(block_size, scheme).generate(pair, prompts, call)
