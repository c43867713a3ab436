"""The target without the context as a readout: context-aware decoding."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request, check_prompt
from dgd_lightning.decode.readouts.base import Readout, ReadoutState
from dgd_lightning.decode.readouts.other_model import PromptState
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair


@dataclass(frozen=True)
class WithoutContext(Readout):
    """The target on the same answer behind a prompt without the context; β = −α is context-aware decoding (CAD).

    Args:
        prompts: [S'] each, one per prompt of the batch (Shi et al. 2024, arXiv 2305.14739). An arm of a run names none:
            the run makes them from its tasks (`data.without_context` says how).
    """

    prompts: Sequence[Tensor] = field(default_factory=tuple)

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return ()

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        if isinstance(self.prompts, Tensor) or len(self.prompts) != len(request.lengths):
            raise InputError(
                "readout.prompts",
                expected=f"{len(request.lengths)} prompts without their contexts, in a list",
                received=len(self.prompts),
                hint="give what is left of each prompt when its context is taken out",
            )
        vocab = pair.target.vocab_size
        rows = [check_prompt(f"readout.prompts[{i}]", prompt, vocab) for i, prompt in enumerate(self.prompts)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return PromptState(pair.target, request, width, ids, [len(row) for row in rows])
