"""Arms: the ways to decode a task."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from dgd_lightning.decode.blending import Blend, Schedule, Space, as_schedule
from dgd_lightning.decode.readouts import Readout
from dgd_lightning.decode.rerank import RankBy
from dgd_lightning.target.model import Target

Method = Literal["autoregressive", "speculative", "guided", "rerank"]
GUIDANCE = ("beta", "readout", "space", "candidates", "plausibility", "schedule")
RERANK = ("rank_by", "num_answers", "betas")


@dataclass
class Arm:
    """One way to decode every task.

    Args:
        name: of its rows, curves and table line.
        method: ``autoregressive``; ``speculative``; ``guided``: (1 − β)·target + β·readout; or ``rerank``: several
            answers per task, of which the best is kept (see :func:`~dgd_lightning.rerank_generate`).
        temperature: 0 for greedy decoding.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the smallest set of likeliest tokens with this mass only.
        block_size: K of all that drafts; None for the draft's own.
        scheme: how speculative decoding verifies above temperature 0.
        ttt: draft with the adapter of the task's context (``model.ttt`` says how it is made).
        online_every: go on adapting while a task is decoded, every so many tokens, two steps of ``model.ttt`` each,
            from the context's adapter where ``ttt`` is on; None does not. Tasks are then decoded one at a time.
        beta: β of guided decoding; of reranking with ``rank_by: blend``, the β of the blend that ranks.
        readout: what is blended with the target: ``draft``, or a class path (``LogitLens``, ``WithoutContext``, … or
            your own).
        space, candidates, plausibility, schedule: how it is blended, see :class:`~dgd_lightning.Blend`. (``candidates``
            are tokens; the answers of reranking are ``num_answers``.)
        token_by_token: guided decoding without proposals: slower, the same distribution.
        rank_by: of reranking: ``target``, the log-probability that the target gives the whole answer; ``likelihood``,
            the same per token; ``blend``, per token under the guided distribution.
        num_answers: of reranking: so many are drawn from the target, at a temperature above 0.
        betas: of reranking: one answer per β instead, decoded with guidance; 0 is the target itself.
    """

    name: str
    method: Method = "speculative"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    block_size: int | None = None
    scheme: Literal["rejection", "exact_match"] = "rejection"
    ttt: bool = False
    online_every: int | None = None
    beta: float | None = None
    readout: Readout | str = "draft"
    space: Space = "logits"
    candidates: int | None = None
    plausibility: float | None = None
    schedule: Schedule | None = None
    token_by_token: bool = False
    rank_by: RankBy = "likelihood"
    num_answers: int = 8
    betas: list[float] | None = None

    @property
    def drafts(self) -> bool:
        """Whether blocks are proposed; by reranking, where there is a draft."""
        return self.method in ("speculative", "rerank") or (self.method == "guided" and not self.token_by_token)

    @property
    def blends(self) -> bool:
        """Whether a readout is blended with the target."""
        ranks = self.method == "rerank" and (self.rank_by == "blend" or self.betas is not None)
        return self.method == "guided" or ranks

    def blend(self) -> Blend:
        """How an arm blends.

        Raises:
            InputError: a number that can't be used.
        """
        schedule = as_schedule(self.schedule)
        return Blend(
            self.beta if self.beta is not None else 0.0, self.space, self.candidates, self.plausibility, schedule
        )

    def settings(self) -> dict[str, Any]:
        """All that distinguishes the arm, as YAML would have it; objects by their class paths.

        Where answers are reranked, what blends stands under ``guidance``: ``candidates`` of their rows are answers.
        """
        values = {field.name: plain(getattr(self, field.name)) for field in fields(self)}
        rerank = {name: values.pop(name) for name in RERANK}
        guidance = {name: values.pop(name) for name in GUIDANCE}
        slow = values.pop("token_by_token")
        if self.method == "guided":
            return {**values, **guidance, "token_by_token": slow}
        if self.method == "rerank":
            return {**values, **rerank, "guidance": guidance if self.blends else None}
        return values

    def sampling(self) -> dict[str, Any]:
        """The settings that shape the distribution of the output, whatever the method."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def plain(value: Any) -> Any:
    """A value as YAML would have it: a readout or schedule is ``{class_path, init_args}``."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Target):
        return value.model.name_or_path
    kind = type(value)
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value))
    inner = {name: plain(getattr(value, name)) for name in names}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": inner}


def row_seed(seed: int, idx: str, arm: Arm) -> int:
    """A 63-bit seed of a task: it depends on the run's seed, the task and the sampling, not on batch, rank or order."""
    text = json.dumps([seed, idx, arm.sampling()], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
