"""Power sampling: answers drawn from p^α, the target's distribution of whole answers (or a blend's) made sharper.

Proposals are drawn at temperature 1/α: token v with q(v) = p(v)^α / Z, where Z = Σ_v p(v)^α at that place. So
p(x)^α / q(x) = Π_t Z_t for a whole answer or for its rest behind a cut, and beside its tokens the method needs one
number of each: log Z, from logits that decoding has computed anyway. As proposals are drawn exactly from q whatever
drafts them, several tokens come per forward of the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer, check_number
from dgd_lightning.decode.batch import to_host
from dgd_lightning.decode.blending import Blend, Constant, Schedule, Space
from dgd_lightning.decode.call import Call, CallOptions, Request, call_of, check_prompt, check_request
from dgd_lightning.decode.drafter import Scheme, check_block_size
from dgd_lightning.decode.nested import of_prompt
from dgd_lightning.decode.random_source import CUT, KEEP
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.draft import as_readout
from dgd_lightning.decode.sampling import SamplingParams, sampling_params
from dgd_lightning.decode.stop_strings import GrowingText
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.methods.base import Guidance, Method, check_single_beta, check_unused
from dgd_lightning.methods.guided import GuidedLoop, ReadoutGroup
from dgd_lightning.methods.particles import Population, power_smc
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.types import DecodeOutput, StopReason

Mode = Literal["mh", "reference", "smc"]
GUIDANCE = ("readout", "space", "candidates", "plausibility", "schedule")
PARTICLES = ("particles", "resample_below", "ramp", "runs", "at_once")
REFERENCE_TOP_K = 50  # what transformers' generate filters by where nothing is said, and so the published code does


@dataclass(frozen=True)
class Power(Method):
    """Answers x with probability ∝ p(x)^α, where p is the target at temperature 1, or its blend with a readout.

    - ``mh``: a Metropolis–Hastings chain. A step draws an answer anew from one of its own tokens on, chosen uniformly,
      and takes it with probability min(1, Π Z(x′) / Π Z(x) · length(x) / length(x′)), products over the tokens behind
      the cut. That is reversible for p^α over answers of every length up to the limit. The answer first grows block by
      block, with steps at every length: that finds a good place to begin. What leaves p^α invariant are the last steps.
    - ``reference``: the choices of the published code (Karan & Du, arXiv 2510.14901): new answers are never longer than
      the old one, a shorter one is compared with as much of the old one, tokens are drawn from the 50 likeliest, and
      the chain ends with the block that has a stop token. Where answers end early it leaves something else invariant.
    - ``smc``: a population of answers that grow together, weighted by Π Z and resampled where few hold most of the
      weight; the answer is drawn by weight (after Power-SMC, arXiv 2602.10273).

    Args:
        alpha: α.
        steps: of ``mh`` and ``reference``, at every length.
        blocks: so many lengths, equal parts of the limit. An answer that ends while it grows skips all lengths but the
            last.
        mode: see above.
        beta: β of the blend; 0 is the target alone.
        readout, space, candidates, plausibility, schedule: see :class:`~dgd_lightning.methods.guided.Guided`.
        speculative: proposals are drafted, several tokens per forward; False draws them token by token.
        block_size: K of the drafts.
        scheme: how drafts are verified; see :class:`~dgd_lightning.methods.speculative.Speculative`.
        particles: N, of ``smc``.
        resample_below: share of N; at a block's end the population is resampled where its effective sample size is
            less.
        ramp: blocks over which α rises from 1, so that early weights differ less; what is sampled is p^α all the same.
        runs: populations; a new one is taken with probability min(1, Ẑ′/Ẑ), which makes a chain that is exact for any N
            (Andrieu, Doucet & Holenstein 2010, particle independent Metropolis–Hastings).
        at_once: answers of a population that are in memory together; None for all, or as many as there is memory for.

    Raises:
        InputError: a setting that can't be, or that nothing would use.
    """

    alpha: float = 4.0
    steps: int = 10
    blocks: int = 16
    mode: Mode = "mh"
    beta: float = 0.0
    readout: Readout | str = "draft"
    speculative: bool = True
    block_size: int | None = None
    scheme: Scheme = "rejection"
    space: Space = "logits"
    candidates: int | None = None
    plausibility: float | None = None
    schedule: Schedule | None = None
    particles: int = 16
    resample_below: float = 0.5
    ramp: int = 0
    runs: int = 1
    at_once: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_number("alpha", self.alpha, above=0, most=1e4, hint="use e.g. 4.0")
        for name in ("steps", "blocks", "particles", "runs"):
            check_integer(name, getattr(self, name))
        check_integer("ramp", self.ramp, least=0, hint="use 0 for none")
        check_integer("at_once", self.at_once, optional=True, hint=LEAVE_OUT)
        check_number("resample_below", self.resample_below, least=0, most=1, hint="use 0.5")
        check_integer("block_size", self.block_size, least=2, optional=True)
        check_choice("scheme", self.scheme, get_args(Scheme))
        object.__setattr__(self, "readout", as_readout(self.readout))
        check_single_beta(self.beta)  # one per row would give each particle of a prompt another p
        self.blend()
        if not self.speculative:
            check_unused(
                self, ("block_size", "scheme"), "token by token nothing is proposed", "set speculative: true, or "
            )
        if not self.blends:
            check_unused(self, GUIDANCE, "with β 0 nothing is blended", "set beta, or ")
        if self.mode != "smc":
            check_unused(self, PARTICLES, f"mode {self.mode} has one answer", "set mode: smc, or ")
        else:
            check_unused(self, ("steps",), "a population makes no steps; runs says how many there are")

    def blend(self) -> Blend:
        """How target and readout are blended."""
        schedule = Constant() if self.schedule is None else self.schedule
        return Blend(self.beta, self.space, self.candidates, self.plausibility, schedule)

    @property
    def drawn_from(self) -> str:  # type: ignore[override]
        return f"drawn from {'the blend' if self.blends else 'p'}^{self.alpha:g}"

    @property
    def blends(self) -> bool:
        return self.beta != 0

    @property
    def needs_draft(self) -> bool:
        return self.speculative or (self.blends and super().needs_draft)

    def block(self, pair: Pair) -> int | None:
        return check_block_size(pair, self.block_size) if self.speculative else None

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return super().layers(pair) if self.blends or self.speculative else ()

    def check_sampling(self, sampling: SamplingParams) -> None:
        for name, value in sampling._asdict().items():
            if value:
                raise InputError(
                    name,
                    expected="nothing: tokens are drawn at temperature 1/α, and a filter would change what is sampled",
                    received=value,
                    hint=f"{LEAVE_OUT} (temperature: 0); alpha says how sharp answers are drawn",
                )

    def settings(self) -> dict[str, Any]:
        """Without what nothing uses."""
        idle = [*(() if self.blends else GUIDANCE), *(("steps",) if self.mode == "smc" else PARTICLES)]
        return {name: value for name, value in super().settings().items() if name not in idle}

    def guidance_of(self, record: dict[str, Any]) -> Guidance | None:
        return Guidance(self.blend(), as_readout(self.readout)) if self.blends else None

    def record(self, output: DecodeOutput) -> dict[str, Any]:
        """What the chain or the population did, under ``power``."""
        return {"power": output.trace.details}

    def levels(self, most: int) -> list[int]:
        """Lengths to which an answer of ``most`` new tokens grows, one after the other."""
        if self.blocks > most:
            raise InputError(
                "blocks",
                expected=f"at most {most}, the limit of new tokens: a block has one at least",
                received=self.blocks,
                hint="use fewer blocks, or raise max_new_tokens",
            )
        return [-(-most * number // self.blocks) for number in range(1, self.blocks + 1)]

    @torch.no_grad()
    def generate(
        self, pair: Pair, prompts: Sequence[Tensor], call: Call, start: Sequence[Tensor] | None = None
    ) -> list[DecodeOutput]:
        """See :func:`power_generate`."""
        self.check_sampling(call.sampling)
        top_k = REFERENCE_TOP_K if self.mode == "reference" else None
        request = check_request(
            pair, prompts, call._replace(sampling=sampling_params(1 / self.alpha, top_k), log_probs=True)
        )
        levels = self.levels(request.max_new_tokens)
        given = None if start is None else check_start(pair, start, request)
        if self.mode != "smc":
            return Chains(pair, request._replace(spare=request.max_new_tokens), self, levels, given).run()
        if call.num_return_sequences != 1 or given is not None or call.random_source is not None:
            raise InputError(
                "num_return_sequences" if call.num_return_sequences != 1 else "start",
                expected="1, and no start: a population of particles gives one answer",
                received=call.num_return_sequences if given is None else "answers",
                hint="leave them out, or use mode='mh'",
            )
        outputs = []
        for row in range(len(request.rows)):
            alone = request.alone(row)
            population = Population(
                alone, levels, self.alphas(), self.particles, self.resample_below, self.runs, self.at_once
            )
            readout = of_prompt(self.readout, row)
            outputs.append(power_smc(population, lambda part, **more: self.loop(pair, part, readout, **more)))  # noqa: B023
        return outputs

    def alphas(self) -> list[float]:
        """The exponent at each length: what is sampled at the last one is p^α."""
        ramp = min(self.ramp, self.blocks)
        shares = [min(1.0, number / max(ramp, 1)) for number in range(1, self.blocks + 1)]
        return [share * self.alpha + (1 - share) for share in shares]  # α itself, unrounded, where the share is 1

    def loop(self, pair: Pair, request: Request, readout: Readout | str, **options: Any) -> GuidedLoop:
        """The decoder that draws from q."""
        width, rows = self.block(pair) or 1, list(range(len(request.rows)))
        groups = []
        if self.blends:
            guidance = Guidance(self.blend(), readout)
            groups = [ReadoutGroup(pair, request, width, guidance, rows, self.blend().betas(len(rows)))]
        return GuidedLoop(pair, request, groups, width, scheme=self.scheme, keep_finished=True, **options)


def check_start(pair: Pair, start: Sequence[Tensor], request: Request) -> list[Tensor]:
    """Answers that chains begin at: each has ended, by a stop token or string or at the limit."""
    if isinstance(start, Tensor) or len(start) != len(request.rows):
        raise InputError(
            "start",
            expected=f"an answer for each of {len(request.rows)} chains",
            received=f"{len(start)}",
            hint="use start=None, and chains grow theirs",
        )
    answers = [check_prompt(f"start[{row}]", own, pair.target.vocab_size) for row, own in enumerate(start)]
    for row, answer in enumerate(answers):
        stops = [at for at, token in enumerate(answer.tolist()) if token in request.stop_token_ids]
        strings = request.stop_strings
        completed = None if strings is None else GrowingText(strings).append(answer.tolist())
        if completed is not None:
            stops.append(completed - 1)
        if min(stops, default=request.max_new_tokens - 1) != len(answer) - 1:
            raise InputError(
                f"start[{row}]",
                expected=f"an answer that ends with its first stop token, or string, or has {request.max_new_tokens}",
                received=f"{len(answer)} tokens",
                hint="give the tokens of an answer that was decoded with the same limit and stop tokens",
            )
    return answers


@dataclass
class Chain:
    """One row: the answer it is at, and what it is doing."""

    seed: int
    limit: int  # new tokens of the length it is at
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # [T] on the host
    scores: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))  # [2, T] log p and log Z
    ended: bool = False  # by a stop token or string
    level: int = 0
    left: int = 0  # steps still to be made at this length
    cut: int | None = None  # of the proposal being drawn; None: the answer grows
    over: bool = False
    draws: int = 0  # how often it has drawn tokens: each time with other random numbers
    states: list[Tensor] = field(default_factory=list)
    history: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in ("limit", "cut", "length", "accepted", "log_ratio", "log_p")}
    )


class Chains:
    """Chains of a batch, each at its own step: whenever one has drawn its proposal, it decides and goes on.

    What a proposal overwrites in the caches is copied into their spare slots first, and back where it is rejected.
    """

    def __init__(
        self, pair: Pair, request: Request, method: Power, levels: list[int], start: list[Tensor] | None
    ) -> None:
        seeds = request.seeds or []
        self.request, self.method, self.levels = request, method, levels
        first = levels[0] if start is None else levels[-1]
        self.chains = [Chain(seed, first) for seed in seeds]
        self.loop = method.loop(pair, request, method.readout, limit=first, start=start)
        self.batch = self.loop.batch
        if start is not None:
            for chain in self.chains:
                chain.level = len(levels) - 1

    def run(self) -> list[DecodeOutput]:
        """All chains to their ends."""
        batch = self.batch
        self._decide()
        while batch.active:
            self.loop.cycle()
            self._decide()
            batch.drop_finished()
        drawn = batch.outputs(drafts=self.loop.drafts)
        return [self._output(chain, output) for chain, output in zip(self.chains, drawn, strict=True)]

    def _decide(self) -> None:
        """Let all rows that have drawn what they were to draw take or leave it, and begin what comes next."""
        batch, chains = self.batch, self.chains
        active = set(batch.active)
        rows = [row for row in batch.live if row not in active and not chains[row].over]
        if not rows:
            return
        counts = {row: batch.ends[row] + 1 - batch.lengths[row] for row in rows}
        index = torch.tensor(rows, device=batch.tokens.device)
        longest = max(counts.values())
        tokens, scores = batch.tokens[index, :longest].cpu(), batch.scores[:, index, :longest].cpu()
        new = {row: (tokens[i, : counts[row]], scores[:, i, : counts[row]]) for i, row in enumerate(rows)}
        proposed = [row for row in rows if chains[row].cut is not None]
        ratios = {row: self._log_ratio(chains[row], new[row][1]) for row in proposed}
        kept = self._draw(proposed, KEEP, [min(1.0, ratios[row].exp().item()) for row in proposed])
        rejected = {row for row, keep in zip(proposed, kept, strict=True) if not keep}
        self._copy({row: self._overwritten(chains[row]) for row in rejected}, back=True)
        for row in rows:
            chain, (own, beside) = chains[row], new[row]
            accepted = row not in rejected
            if accepted:
                chain.tokens, chain.scores = own.clone(), beside.double()
                chain.ended = row in batch.completed or int(own[-1]) in self.request.stop_token_ids
            else:
                batch.put(row, chain.tokens, chain.scores)
            if chain.cut is None:
                chain.states.append(chain.tokens)
            else:
                step = (chain.limit, chain.cut, len(own), accepted, ratios[row].item(), chain.scores[0].sum().item())
                for column, value in zip(chain.history.values(), step, strict=True):
                    column.append(value)
                chain.states += [chain.tokens] * accepted
            self._next(chain)
        taken = [accepted for chain in chains for accepted in chain.history["accepted"]]
        batch.note = f"{len(taken)} steps, {sum(taken)} proposals taken"
        going = [row for row in rows if not chains[row].over]
        if not going:
            return
        for row in going:
            chains[row].draws += 1
        batch.renew(going, [mixed_seed(chains[row].seed, chains[row].draws) for row in going])
        stepping = [row for row in going if chains[row].left]
        cuts = self._cuts(stepping)
        for row, cut in zip(stepping, cuts, strict=True):
            chains[row].cut = cut
        self._copy({row: self._overwritten(chains[row]) for row in stepping})
        stay = {row: len(chains[row].tokens) for row in going}
        limits = {row: chains[row].limit for row in going}
        if self.method.mode == "reference":
            limits |= {row: stay[row] for row in stepping}
        batch.resume(stay | dict(zip(stepping, cuts, strict=True)), limits)

    def _next(self, chain: Chain) -> None:
        """What a chain does now: a step where some are left, else growing, else nothing."""
        reference, last = self.method.mode == "reference", len(self.levels) - 1
        if chain.cut is None:  # it has grown
            chain.left = self.method.steps
            if chain.ended and not reference:
                chain.level = last
        else:
            chain.left -= 1
            chain.cut = None
            if not chain.left:
                if chain.level == last or (reference and chain.ended):
                    chain.over = True
                    return
                chain.level += 1
                if chain.ended:  # it can't grow
                    chain.level, chain.left = last, self.method.steps
        chain.limit = self.levels[chain.level]

    def _log_ratio(self, chain: Chain, scores: Tensor) -> Tensor:
        """ln of what a proposal with scores [2, T′] is accepted with, before it is cut at 1."""
        new, old, cut = scores[1].double(), chain.scores[1], chain.cut
        if self.method.mode == "reference":
            return new[cut:].sum() - old[cut : len(new)].sum()
        lengths = torch.tensor([len(old), len(new)], dtype=torch.float64).log()
        return new[cut:].sum() - old[cut:].sum() + lengths[0] - lengths[1]

    def _cuts(self, rows: list[int]) -> list[int]:
        """One of each row's own tokens, uniformly."""
        lengths = [len(self.chains[row].tokens) for row in rows]
        places = torch.arange(max(lengths, default=0), dtype=torch.float64)
        chances = [(places < length).double().div(length) for length in lengths]
        return self._draw(rows, CUT, torch.stack(chances)) if rows else []

    def _draw(self, rows: list[int], stream: Any, chances: Any) -> list[Any]:
        """With each row's own random numbers: one of the outcomes [n, m], or yes with chances [n]."""
        if not rows:
            return []
        batch, places = self.batch, self.batch.places(rows)
        source, at = batch.random_source.select(places), batch.starts[places][:, None]
        chances = torch.as_tensor(chances, dtype=batch.scores.dtype, device=batch.index.device)[:, None]
        drawn = (source.bernoulli if stream == KEEP else source.categorical)(chances, stream, at)
        return to_host(drawn[:, 0])

    def _overwritten(self, chain: Chain) -> tuple[int, int]:
        """Where the new tokens begin that a proposal overwrites in the caches, and how many they are.

        The answer's last token is not in them: nothing has been read behind it.
        """
        cut = chain.cut or 0
        return cut, max(len(chain.tokens) - 1 - cut, 0)

    def _copy(self, parts: dict[int, tuple[int, int]], *, back: bool = False) -> None:
        """Copy parts of rows' answers, (first token, how many), into spare slots of every cache, or back from there."""
        batch, device = self.batch, self.batch.index.device
        longest = max((count for _, count in parts.values()), default=0)
        if not longest:
            return
        given = torch.tensor([parts.get(row, (0, 0)) for row in batch.live], device=device)  # [b, 2]
        offsets = torch.arange(longest, device=device)[None]  # [1, n]
        positions = (batch.starts + given[:, 0])[:, None] + offsets  # [b, n]
        for cache, shift in self.loop.caches():
            spare = (cache.capacity - self.request.spare + offsets).expand_as(positions)
            slots = positions if shift is None else positions - shift.to(device)[:, None]
            slots = torch.where(offsets < given[:, 1:], slots, spare)  # the others are copied onto themselves
            cache.move(spare, slots) if back else cache.move(slots, spare)

    def _output(self, chain: Chain, output: DecodeOutput) -> DecodeOutput:
        """What the batch knows of a row, with the answer that its chain is at."""
        trace, history = output.trace, chain.history
        log_p = chain.scores[0].sum().item()
        details = {
            "alpha": self.method.alpha,
            "log_p": log_p,
            "alpha_log_p": self.method.alpha * log_p,
            "log_weight": chain.scores[1].sum().item(),
            "acceptance_rate": sum(history["accepted"]) / max(len(history["accepted"]), 1),
            "tokens_drawn": sum(output.acceptance_lengths) + 1,
            "steps": history,
        }
        log_p, log_z = chain.scores
        trace = trace._replace(log_probs=log_p, log_normalisers=log_z, states=chain.states, details=details)
        reason: StopReason = "stop" if chain.ended else "length"
        return DecodeOutput(chain.tokens, output.acceptance_lengths, reason, trace)


def power_generate(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    alpha: float = 4.0,
    steps: int = 10,
    blocks: int = 16,
    mode: Mode = "mh",
    beta: float = 0.0,
    readout: Readout | str = "draft",
    speculative: bool = True,
    block_size: int | None = None,
    scheme: Scheme = "rejection",
    blend: Blend | None = None,
    particles: int = 16,
    resample_below: float = 0.5,
    ramp: int = 0,
    runs: int = 1,
    at_once: int | None = None,
    start: Sequence[Tensor] | None = None,
    **options: Unpack[CallOptions],
) -> list[DecodeOutput]:
    """Draw an answer of p^α for every prompt: one chain per row, with a seed of its own.

    Args:
        pair, prompts, max_new_tokens, options: as in ``autoregressive_generate``, without temperature and filters.
        alpha, steps, blocks, mode, beta, readout, speculative, block_size, scheme: see :class:`Power`.
        particles, resample_below, ramp, runs, at_once: see :class:`Power`; of ``smc``.
        blend: how the readout is blended, but for β.
        start: answers [T] that the chains of ``mh`` begin at, one per row, instead of growing theirs; each has ended.

    Returns:
        Outputs in the order of the prompts. Lengths and forwards are those of all that was drawn; ``trace.states`` are
        the answers that a chain was at, ``trace.details`` what it did.

    Raises:
        InputError: an unusable argument, or a readout that the pair or the prompts can't serve.
    """
    guidance: dict[str, Any] = {}
    if blend is not None:
        guidance = {"space": blend.space, "candidates": blend.candidates, "plausibility": blend.plausibility}
        guidance |= {"schedule": blend.schedule}
    method = Power(
        alpha,
        steps,
        blocks,
        mode,
        beta,
        readout,
        speculative,
        block_size,
        scheme,
        particles=particles,
        resample_below=resample_below,
        ramp=ramp,
        runs=runs,
        at_once=at_once,
        **guidance,
    )
    return method.generate(pair, prompts, call_of(max_new_tokens, **options), start)
