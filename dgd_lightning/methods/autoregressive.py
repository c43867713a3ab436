"""One token per target forward: the plain decoder, slow, short and obvious, which every other one is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from dgd_lightning.decode.batch import Batch, choose
from dgd_lightning.decode.call import Call, CallOptions, call_of, check_request
from dgd_lightning.decode.session import Session
from dgd_lightning.decode.verify import Verdict
from dgd_lightning.methods.base import Method
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput


@dataclass(frozen=True)
class Autoregressive(Method):
    """The target alone, token by token. It has no settings."""

    lossless = True
    baseline = True

    @torch.no_grad()
    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        request = check_request(pair, prompts, call)
        batch = Batch.after_prefill(Session(pair.target, request, width=1))
        while batch.active:
            positions = batch.positions(1)  # [b, 1]
            logits = batch.step(batch.last[:, None], positions).logits  # [b, 1, V]
            tokens = choose(logits, request.sampling, batch.random_source, positions + 1)  # [b, 1]
            batch.commit(Verdict(tokens, torch.ones_like(batch.last)), logits)
            batch.synchronise()
        return batch.outputs(drafts=0)


def autoregressive_generate(
    pair: Pair, prompts: Sequence[Tensor], *, max_new_tokens: int, **options: Unpack[CallOptions]
) -> list[DecodeOutput]:
    """Decode a batch of prompts token by token.

    Args:
        pair: its draft is not used and may be None.
        prompts: 1-D integer tensors of any lengths, B of them.
        max_new_tokens: limit per row, the stop token included.
        options: ``temperature`` (0, the default: greedy), ``top_k``, ``top_p``, and what
            :class:`~dgd_lightning.decode.call.Call` explains: ``stop_token_ids``, ``stop_strings``, ``seed``,
            ``num_return_sequences``, ``prefixes``, ``on_progress``, ``log_probs``, ``random_source``.

    Returns:
        Outputs in the order of the prompts, ``num_return_sequences`` per prompt; every acceptance length is 1.

    Raises:
        InputError: an unusable argument, or a prompt that does not fit the target with its new tokens.
    """
    return Autoregressive().generate(pair, prompts, call_of(max_new_tokens, **options))
