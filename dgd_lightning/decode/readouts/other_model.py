"""A second model as a readout (contrastive decoding), and what reads prompts of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, TargetOutput
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target


@dataclass(frozen=True)
class OtherModel(Readout):
    """A second causal LM with the same vocabulary, reading the same tokens; β < 0 is contrastive decoding.

    Args:
        model: loaded by `load_target`; an arm of a run names a folder, a Hub id or ``lab`` instead, and the run loads
            it once, with the target's dtype, on its device.
        revision: Hub revision of a model that is named: branch, tag or commit.
    """

    model: Target | str
    revision: str | None = None

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return ()

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        if isinstance(self.model, str):
            raise InputError(
                "readout.model",
                expected="a loaded model",
                received=repr(self.model),
                hint=f"give load_target({self.model!r}); names are for the arms of dgd predict",
            )
        if self.model.vocab_size != pair.target.vocab_size:
            raise InputError(
                "readout.model",
                expected=f"the target's vocabulary of {pair.target.vocab_size} tokens",
                received=self.model.vocab_size,
                hint="use a model of the same family",
            )
        return PromptState(self.model, request, width, request.ids, request.lengths)


class PromptState(ReadoutState):
    """A causal LM behind prompts of its own, which reads what the batch decodes."""

    shift: Tensor

    def __init__(self, model: Target, request: Request, width: int, ids: Tensor, lengths: list[int]) -> None:
        self.model, self.ids, self.lengths = model, ids.to(model.device), lengths
        if max(lengths) + request.max_new_tokens > model.max_positions:
            raise InputError(
                "readout",
                expected=f"prompts that leave {request.max_new_tokens} of the model's {model.max_positions} positions",
                received=f"{max(lengths)} tokens",
                hint="shorten them, or lower max_new_tokens",
            )
        self.cache = model.new_cache(len(lengths), request._replace(lengths=lengths).capacity(width))
        self.caches = [self.cache]
        ours = torch.tensor(lengths, device=model.device)
        self.shift = torch.tensor(request.lengths, device=model.device) - ours  # [b]
        self.most = max(own - theirs for own, theirs in zip(lengths, request.lengths, strict=True))
        self.ends = ours - 1  # [b] position of each prompt's last token,
        self.last = self.ids.gather(1, self.ends[:, None])  # [b, 1] which need not be the batch's own

    def ready(self) -> None:
        if (longest := max(self.lengths)) > 1:  # the last token of each prompt comes with the first forward
            known = torch.tensor([max(length - 1, 1) for length in self.lengths])
            self.model.prefill(self.ids[:, : longest - 1], known, self.cache)

    def logits(self, out: TargetOutput) -> Tensor:
        positions = out.positions.to(self.shift.device) - self.shift[:, None]
        tokens = torch.where(positions == self.ends[:, None], self.last, out.tokens.to(self.shift.device))
        longest = out.longest + 1 + self.most  # at least every position of ours
        step = self.model.step(tokens, positions, self.cache, max_length=min(longest, self.cache.capacity))
        return step.logits.to(out.logits.device)

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.shift.device)
        self.shift, self.ends, self.last = self.shift[rows], self.ends[rows], self.last[rows]
