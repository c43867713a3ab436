"""What a prediction row tells of target and readout at every token: made by replay, written into ``dgd.divergence``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.guided import as_readout
from dgd_lightning.decode.readouts import DraftReadout, Readout
from dgd_lightning.decode.replay import Replayed, replay
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.divergence import TokenDivergence, token_divergence
from dgd_lightning.modules.arms import Arm
from dgd_lightning.pair import Pair

DECIMALS = 5


@dataclass
class DivergenceSettings:
    """Record, for every token of every answer, how target and readout differ and what guidance changed.

    Each answer is read once more for it (its prompt too), after it was decoded.

    Args:
        top: so many of the likeliest tokens are kept where it says most, see ``large``; 0 keeps none.
        large: they are kept where guidance changed the top-1 token, and where JS(target, readout) is at least so many
            nats (0 … ln 2); elsewhere they are left out, so that rows stay small.
        guided_only: record it for guided arms alone; otherwise other arms tell what the draft would have said.

    Raises:
        InputError: a number that can't be used.
    """

    top: int = 5
    large: float = 0.2
    guided_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 0:
            raise InputError(
                "divergence.top", expected="an integer of at least 0", received=repr(self.top), hint="use 5"
            )
        real = isinstance(self.large, int | float) and not isinstance(self.large, bool)
        if not real or not self.large >= 0:  # NaN is not
            raise InputError(
                "divergence.large", expected="nats, at least 0", received=repr(self.large), hint="use e.g. 0.2"
            )


def compared_with(pair: Pair, arm: Arm) -> tuple[Readout, Blend] | None:
    """What an arm's target is compared with, and how the two were blended.

    A guided arm has its own readout and blend. Any other arm is compared with the draft at β = 0: what the draft would
    have said. None where there is neither.
    """
    if arm.method == "guided":
        return as_readout(arm.readout), arm.blend()
    return None if pair.draft is None else (DraftReadout(), Blend(0.0))


def divergence_record(
    pair: Pair, arm: Arm, prompt: Tensor, answer: Tensor, settings: DivergenceSettings
) -> dict[str, Any] | None:
    """A row's ``dgd.divergence``: a list per number of `TokenDivergence`, the tokens' texts, and ``top``.

    The draft is read as it stands: an arm with an adapter needs it in place. Numbers are rounded to 5 decimals;
    infinite ones are null.

    Args:
        pair: has a tokenizer.
        arm: that decoded the answer.
        prompt: [S] as the target read it.
        answer: [T] tokens.
        settings: what is kept.

    Returns:
        None where the arm has neither readout nor draft.
    """
    found = compared_with(pair, arm)
    if found is None:
        return None
    readout, blend = found
    betas = blend.betas(1)
    beta = torch.tensor(betas, dtype=torch.float64, device=pair.target.device)
    numbers: dict[str, list[Any]] = {name: [] for name in TokenDivergence._fields}
    top: list[dict[str, Any]] = []
    for part in replay(pair, prompt, answer, [readout]):
        steps = torch.arange(part.first, part.first + len(part.tokens), device=part.target.device)[None]
        guided = blend.mix(part.target[None], part.readouts[0][None], beta, steps)[0]  # [Q, V]
        values = token_divergence(part.target, part.readouts[0], guided, part.tokens)
        for name, column in values._asdict().items():
            numbers[name] += _plain(column)
        if settings.top:
            top += _top(pair.tokenizer, part, guided if betas != [0.0] else None, values, settings)
    return {"beta": betas[0], "tokens": token_texts(pair.tokenizer, answer.tolist()), **numbers, "top": top}


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds, special tokens included; together they are the text of all.

    A token that ends inside a character adds nothing, and the one that completes it adds the character.
    """

    def text(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    start = done = 0  # what is before `start` no longer matters; what is before `done` has its text
    for end in range(1, len(ids) + 1):
        whole = text(ids[start:end])
        if whole.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(text(ids[start:done])) :])
        start, done = done, end
    return texts


def _plain(column: Tensor) -> list[Any]:
    """Numbers for JSON, which knows no infinity; yes and no as 1 and 0."""
    if not column.is_floating_point():
        return column.long().tolist()
    return [round(number, DECIMALS) if math.isfinite(number) else None for number in column.tolist()]


def _top(
    tokenizer: Any, part: Replayed, guided: Tensor | None, values: TokenDivergence, settings: DivergenceSettings
) -> list[dict[str, Any]]:
    """The likeliest tokens of each distribution, where guidance changed something or target and readout differ much."""
    distributions = {
        "target": part.target,
        "readout": part.readouts[0],
        **({} if guided is None else {"guided": guided}),
    }
    entries: list[dict[str, Any]] = []
    for at in (values.argmax_changed | (values.js >= settings.large)).nonzero()[:, 0].tolist():
        entry: dict[str, Any] = {"at": part.first + at}
        for name, logits in distributions.items():
            kind = torch.promote_types(logits.dtype, torch.float32)
            best = logits[at].to(kind).softmax(-1).topk(min(settings.top, logits.shape[-1]))
            words = [tokenizer.decode([token], skip_special_tokens=False) for token in best.indices.tolist()]
            entry[name] = [[w, p] for w, p in zip(words, _plain(best.values), strict=True)]
        entries.append(entry)
    return entries
