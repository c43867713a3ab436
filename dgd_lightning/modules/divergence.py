"""A prediction row's ``dgd.divergence``: target and readout at every token of an answer, made by replay."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer, check_number
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.readouts.draft import DraftReadout, as_readout
from dgd_lightning.decode.replay import Replayed, replay
from dgd_lightning.methods.base import Guidance
from dgd_lightning.metrics.divergence import TokenDivergence, token_divergence
from dgd_lightning.modules.adaptation import finite
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
        guided_only: record it for arms that blend alone; otherwise other arms record what the draft would have said.
    """

    top: int = 5
    large: float = 0.2
    guided_only: bool = False

    def __post_init__(self) -> None:
        check_integer("divergence.top", self.top, least=0, hint="use 5")
        check_number("divergence.large", self.large, least=0, hint="use e.g. 0.2, in nats")


def divergence_record(
    pair: Pair, guidance: Guidance | None, prompt: Tensor, answer: Tensor, settings: DivergenceSettings
) -> dict[str, Any] | None:
    """A row's ``dgd.divergence``: a list per number of `TokenDivergence`, the tokens' texts, and ``top``.

    The draft is read as it is: an arm with an adapter needs it in place. Numbers are rounded to 5 decimals; infinite
    ones are null.

    Args:
        pair: has a tokenizer.
        guidance: what the answer was drawn from; None for the target itself, which is compared with the draft at β = 0:
            what the draft would have said.
        prompt: [S] as the target read it.
        answer: [T] tokens.
        settings: what is kept.

    Returns:
        None where there is neither guidance nor a draft.
    """
    if guidance is None and pair.draft is None:
        return None
    blend, readout = guidance or Guidance(Blend(0.0), DraftReadout())
    betas = blend.betas(1)
    numbers: dict[str, list[Any]] = {name: [] for name in TokenDivergence._fields}
    top: list[dict[str, Any]] = []
    for part in replay(pair, prompt, [answer], [as_readout(readout)]):
        guided = blend.mix_along(part.target, part.readouts[0], part.first)  # [Q, V]
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
    return [finite(round(number, DECIMALS)) for number in column.tolist()]


def _top(
    tokenizer: Any, part: Replayed, guided: Tensor | None, values: TokenDivergence, settings: DivergenceSettings
) -> list[dict[str, Any]]:
    """The likeliest tokens of each distribution, where guidance changed something or target and readout differ much."""
    distributions = {"target": part.target, "readout": part.readouts[0]}
    distributions |= {} if guided is None else {"guided": guided}
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
