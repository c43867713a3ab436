"""What all decoders share: checked input, the batch on its position-addressed caches, stops.

A decoder is a loop of ``forward → verdict → Batch.commit → Batch.synchronise``. ``commit`` only enqueues work on the
device; ``synchronise`` is the cycle's single wait for it, after which the host knows who is done and who is longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.prefix import PrefixCache, check_prefixes, fill_from_prefixes
from dgd_lightning.decode.random_source import TARGET, RandomSource, RandomTable, random_table, row_seeds
from dgd_lightning.decode.sampling import SamplingParams, probabilities, sampling_params
from dgd_lightning.decode.verify import Verdict
from dgd_lightning.errors import InputError
from dgd_lightning.types import DecodeOutput, DecodeTrace

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair
    from dgd_lightning.target.cache import PositionCache
    from dgd_lightning.target.model import Target


class Request(NamedTuple):
    """Checked input of one batch: B prompts, and R rows that go on from them."""

    ids: Tensor  # [B, S] on CPU, padded on the right with 0
    lengths: list[int]  # B
    max_new_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    seeds: list[int] | None  # one per row; None for greedy decoding
    rows: list[int]  # R numbers of prompts, prompt by prompt: rows of one prompt share its prefill
    prefixes: list[PrefixCache | None]  # B, what of each prompt is read already


class Progress(NamedTuple):
    """Where a batch stands after a cycle; ``(tokens - rows) / verifications`` is the running τ."""

    tokens: int  # committed by all rows, first tokens included
    verifications: int  # by all rows
    rows: int
    active: int  # rows not yet finished


OnProgress = Callable[[Progress], None]


class Prefix(NamedTuple):
    """The beginning of a prompt, read already: decoding goes on in these caches and writes behind it only.

    So one prefix serves many prompts, one after the other.
    """

    ids: Tensor  # [S] on CPU, positions 0 … S − 1
    cache: PositionCache  # of the target, one row
    draft_cache: PositionCache | None  # of the draft; None where only the target decodes


def check_request(
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
    prefixes: Sequence[PrefixCache | None] | None = None,
) -> Request:
    """Check a decoder's arguments and pad the prompts.

    Args:
        prompts: 1-D integer tensors, none empty.
        stop_token_ids: tokens that end a row; None for those the target names, else the tokenizer's end of sequence.
        seed: as in ``row_seeds``; unused for greedy decoding.
        num_return_sequences: rows per prompt.
        prefixes: what of each prompt is read already, or None in its place.

    Raises:
        InputError: an argument is unusable, or a prompt with its new tokens exceeds the target's positions.
    """
    target = pair.target
    sampling = sampling_params(temperature, top_k, top_p)
    _check_count("max_new_tokens", max_new_tokens)
    _check_count("num_return_sequences", num_return_sequences)
    if isinstance(prompts, Tensor) or len(prompts) == 0:
        raise InputError(
            "prompts",
            expected="a non-empty list of 1-D integer tensors",
            received=f"a tensor of shape {list(prompts.shape)}" if isinstance(prompts, Tensor) else "an empty list",
            hint="pass e.g. [torch.tensor([1, 2, 3])]",
        )
    rows = [check_prompt(f"prompts[{i}]", prompt, target.vocab_size) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        if len(row) + max_new_tokens > target.max_positions:
            raise InputError(
                f"prompts[{i}]",
                expected=f"prompt + max_new_tokens of at most {target.max_positions} positions",
                received=f"{len(row)} + {max_new_tokens} = {len(row) + max_new_tokens}",
                hint="shorten the prompt or lower max_new_tokens",
            )
    return Request(
        ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        lengths=[len(row) for row in rows],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_token_ids=_stop_tokens(pair, stop_token_ids),
        seeds=None if sampling.greedy else row_seeds(seed, len(rows) * num_return_sequences),
        rows=[i for i in range(len(rows)) for _ in range(num_return_sequences)],
        prefixes=check_prefixes(prefixes, rows),
    )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(name, expected="an integer of at least 1", received=repr(value), hint=f"use e.g. {name}=4")


def check_prompt(name: str, prompt: Any, vocab_size: int) -> Tensor:
    """The prompt [S] as int64 on CPU.

    Raises:
        InputError: it is no 1-D integer tensor of at least one of the vocabulary's ids.
    """
    hint = "pass the token ids of one prompt, e.g. torch.tensor([1, 2, 3])"
    if not isinstance(prompt, Tensor):
        raise InputError(name, expected="a 1-D integer tensor", received=type(prompt).__name__, hint=hint)
    if prompt.dim() != 1 or prompt.dtype == torch.bool or prompt.is_floating_point() or prompt.is_complex():
        received = f"shape {list(prompt.shape)}, {prompt.dtype}"
        raise InputError(name, expected="a 1-D integer tensor", received=received, hint=hint)
    if len(prompt) == 0:
        raise InputError(name, expected="at least one token", received="an empty prompt", hint=hint)
    prompt = prompt.detach().cpu().long()
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            name,
            expected=f"token ids in 0 … {vocab_size - 1}",
            received=low if low < 0 else high,
            hint="encode the prompt with the target's own tokenizer",
        )
    return prompt


def _stop_tokens(pair: Pair, stop_token_ids: Sequence[int] | None) -> tuple[int, ...]:
    if stop_token_ids is None:
        end = getattr(pair.tokenizer, "eos_token_id", None)
        return tuple(pair.target.stop_token_ids) or (() if end is None else (end,))
    if isinstance(stop_token_ids, int | str) or any(
        isinstance(i, bool) or not isinstance(i, int) for i in stop_token_ids
    ):
        raise InputError(
            "stop_token_ids", expected="a list of integers or None", received=repr(stop_token_ids), hint="use e.g. [2]"
        )
    return tuple(stop_token_ids)


def to_host(values: Tensor) -> list[Any]:
    """The one place where a decoding cycle waits for the device."""
    return values.tolist()


def check_prefix(prefix: Prefix, request: Request, width: int) -> None:
    """Raises:
    InputError: the batch is not one prompt that begins with the prefix and goes on, it has shared prefixes too, or the
        caches are too small.
    """
    ids, need = prefix.ids, capacity(request, width)
    own = request.ids[0, : request.lengths[0]]
    if (
        len(request.rows) != 1
        or request.prefixes != [None]
        or len(own) <= len(ids)
        or not torch.equal(own[: len(ids)], ids)
    ):
        raise InputError(
            "prefix",
            expected=f"one row whose prompt begins with the prefix's {len(ids)} tokens and has more",
            received=f"{len(request.rows)} rows, the first prompt of {len(own)} tokens",
            hint="decode other prompts without it",
        )
    smallest = min(cache.capacity for cache in (prefix.cache, prefix.draft_cache) if cache is not None)
    if smallest < need:
        raise InputError(
            "prefix",
            expected=f"caches of {need} positions, for prompt, new tokens and a block",
            received=smallest,
            hint="allocate larger ones, or lower max_new_tokens",
        )


class Forward(NamedTuple):
    """What a step gives a decoder, of every sequence."""

    logits: Tensor  # [t, Q, V]
    features: Tensor  # [t, Q, F·H]; empty where no layer is tapped


class Change(NamedTuple):
    """Rows that leave, and sequences that part or end; numbers are those of before and of now."""

    stay: list[int]  # the rows now -> what their numbers were
    parents: list[int]  # the sequences now -> what they go on from
    sequence_of: list[int]  # the rows now -> their sequences; −1: finished


def capacity(request: Request, width: int) -> int:
    """Positions per row that a cache needs when cycles write ``width`` tokens: the last may reach past the limit."""
    return max(request.lengths) + request.max_new_tokens + width


def _table(request: Request, width: int) -> Tensor:
    """[B, P, 3]; for greedy decoding P is 0, so that reading it would fail."""
    if request.seeds is None:
        return random_table([0] * len(request.rows), 0)
    return random_table(request.seeds, request.max_new_tokens + width)


class Batch:
    """The rows still being decoded. Committed tokens stay on the device; finished rows leave when half are done.

    What is read is a *sequence*: caches have a row per sequence, and forwards read sequences [t]. Every row [b] is a
    sequence of its
    own, unless rows share sequences: then those of one prompt (and one seed) are one sequence until they commit
    different tokens, and the sequence parts in two. What several rows would compute alike is so computed once.

    Attributes:
        cache: the sequences' target cache.
        random_source: what the rows' draws are made of.
        anchors: [b] absolute position of each row's last committed token.
        last: [b] that token, not yet seen by the target.
        longest: the largest anchor, known on the host, so that a forward attends to no more than it must.
    """

    def __init__(
        self,
        target: Target,
        request: Request,
        *,
        width: int,
        layer_ids: Sequence[int] = (),
        on_features: Callable[[Tensor, Tensor], None] | None = None,
        companions: Sequence[PositionCache] = (),
        prefix: Prefix | None = None,
        hold_last: bool = False,
        share_sequences: bool = False,
        on_prompts: Callable[[], None] | None = None,
        on_change: Callable[[Change], None] | None = None,
        random_source: RandomSource | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Read the prompts and commit each row's first token.

        Args:
            width: most tokens that a cycle may commit per row (K).
            layer_ids: layers whose features every forward gives.
            on_features: called with the prompts' features [B, C, F·H] and positions [B, C], chunk by chunk.
            companions: other caches, made for the prompts like ``cache``; their rows become and stay the sequences.
            prefix: what is read already (see :func:`check_prefix`).
            hold_last: leave each prompt's last token to the caller, who reads it and calls :meth:`begin`.
            share_sequences: rows of one prompt, which then need the same seed, are one sequence until they differ.
            on_prompts: called once the prompts are read, while all caches still have a row per prompt.
            on_change: called next, with a change from prompts to sequences, and whenever rows or sequences change.
            random_source: instead of the one made of the request's seeds.
        """
        began = time.perf_counter()
        device, batch, prompts = target.device, len(request.rows), len(request.lengths)
        self.lengths = [request.lengths[prompt] for prompt in request.rows]  # R, of each row's prompt
        self.target, self.request, self.width, self.layer_ids = target, request, width, layer_ids
        self.on_progress, self.on_change, self.share_sequences = on_progress, on_change, share_sequences
        self.starts = torch.tensor(self.lengths, device=device)  # [b]
        self.random_source: RandomSource = random_source or RandomTable(_table(request, width).to(device), self.starts)
        self.cache = target.new_cache(prompts, capacity(request, width)) if prefix is None else prefix.cache
        self.caches = [self.cache, *companions]
        known = [0 if one is None else len(one.ids) for one in (request.prefixes if prefix is None else [prefix])]
        fill_from_prefixes(request.prefixes, self.cache, layer_ids, on_features)
        ends = [length - int(hold_last) for length in request.lengths]
        rows = [request.ids[row, start:end] for row, (start, end) in enumerate(zip(known, ends, strict=True))]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [B, S], what is still to be read
        logits = None
        if ids.shape[1]:
            logits = target.prefill(
                ids,
                [max(len(row), 1) for row in rows],
                self.cache,
                start=known[0] if len(set(known)) == 1 else known,
                layer_ids=layer_ids,
                on_features=on_features,
            ).logits  # [B, V]
        if on_prompts is not None:
            on_prompts()
        prompt = torch.tensor(request.rows, device=device)  # [b]
        self.stops = torch.tensor(request.stop_token_ids, dtype=torch.long, device=device)  # [n]
        self.slots = torch.arange(width, device=device)  # [K]
        self.tokens = torch.zeros(batch, request.max_new_tokens + width, dtype=torch.long, device=device)  # [B, T + K]
        self.index = torch.arange(batch, device=device)  # [b] row of ``tokens``
        self.limits = self.starts + request.max_new_tokens  # [b] first position that no token may take
        self.anchors = self.starts - 1
        self.last = torch.zeros(batch, dtype=torch.long, device=device)  # [b]
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)  # [b]
        self.live = list(range(batch))  # original numbers of the rows in the tensors above
        self.active = list(range(batch))  # those not finished
        self.ends = [length - 1 for length in self.lengths]  # host copy of the anchors, for all rows
        self.verified: list[list[int]] = [[] for _ in range(batch)]
        self.accepted: list[list[int]] = [[] for _ in range(batch)]
        self.began = began
        numbers = list(range(batch))
        self.sequence_of, self.count = (
            list(range(prompts)),
            prompts,
        )  # each row's sequence, and how many sequences the caches hold
        sequences = (list(range(prompts)), request.rows) if share_sequences else (request.rows, numbers)
        self._change(Change(numbers, *sequences))
        if hold_last:
            self.last = request.ids.to(device)[prompt].gather(1, self.anchors[:, None])[:, 0]
        else:
            assert logits is not None
            self.begin(choose(logits[prompt, None], request.sampling, self.random_source, self.starts[:, None]))

    def begin(self, first: Tensor) -> None:
        """Commit the first tokens [B, 1]; with them the prefill ends."""
        self.commit(Verdict(first, torch.ones_like(self.last)))
        self.synchronise(first=True)
        self.prefill_seconds = time.perf_counter() - self.began
        self.decode_began = self.decode_ended = time.perf_counter()

    @property
    def longest(self) -> int:
        """Largest anchor among the sequences, as of the last ``synchronise``."""
        rows = self.active if self.share_sequences and self.active else self.live
        return max(self.ends[row] for row in rows)

    def sequences(self, values: Tensor) -> Tensor:
        """Of values [b, ..] that rows of one sequence have in common, one per sequence [t, ..]."""
        return values if self._leaders is None else values[self._leaders]

    def rows(self, values: Tensor) -> Tensor:
        """Values [t, ..] of sequences, for every row [b, ..]."""
        return values if self._sequences is None else values[self._sequences]

    def positions(self, width: int) -> Tensor:
        """Absolute positions [b, width] of a block that begins with the last committed token."""
        return self.anchors[:, None] + self.slots[:width]

    def step(self, tokens: Tensor, positions: Tensor) -> Forward:
        """The target's forward on tokens [t, Q] at positions [t, Q], which begin with the last committed one."""
        logits, features = self.target.step(
            tokens, positions, self.cache, max_length=self.longest + tokens.shape[1], layer_ids=self.layer_ids
        )
        return Forward(logits, logits.new_empty(0) if features is None else features)

    def commit(self, verdict: Verdict) -> None:
        """Write a verdict's tokens [b, Q] and advance the rows, cut at stop tokens and limits; no word to the host."""
        tokens, lengths = verdict
        slots = self.slots[: tokens.shape[1]]  # [Q]
        # Written whole: what lies beyond a row's committed length is never read, and the next cycle overwrites it.
        self.tokens[self.index[:, None], (self.anchors + 1 - self.starts)[:, None] + slots] = tokens
        stop = (tokens[..., None] == self.stops).any(-1) & (slots < lengths[:, None])  # [b, Q]
        stop_slot = torch.where(stop, slots, self.width).amin(1)  # [b], width where there is none
        left = self.limits - 1 - self.anchors  # [b] tokens the row may still commit
        cut = torch.minimum(torch.minimum(lengths, stop_slot + 1), left).masked_fill(self.done, 0)
        self.done = self.done | (stop_slot < self.width) | (lengths >= left)
        newest = tokens.gather(1, (cut - 1).clamp(min=0)[:, None])[:, 0]
        self.last = torch.where(cut > 0, newest, self.last)
        self.anchors = self.anchors + cut
        news = torch.stack([lengths, cut, self.done.long()])  # [3, b]
        self._news = torch.cat([news, tokens.T]) if self.share_sequences else news  # [3 + Q, b]

    def synchronise(self, *, first: bool = False) -> None:
        """Tell the host what was committed, and drop finished rows once they are half of the batch."""
        lengths, cuts, done, *tokens = to_host(self._news)
        for row, length, cut, is_done in zip(self.live, lengths, cuts, done, strict=True):
            if cut == 0:  # finished in an earlier cycle
                continue
            self.ends[row] += cut
            if not first:
                self.verified[row].append(length)
                self.accepted[row].append(cut)
            if is_done:
                self.active.remove(row)
        self.decode_ended = time.perf_counter()
        if self.on_progress is not None:
            committed = sum(end + 1 - length for end, length in zip(self.ends, self.lengths, strict=True))
            verifications = sum(len(lengths) for lengths in self.verified)
            self.on_progress(Progress(committed, verifications, len(self.ends), len(self.active)))
        if self.share_sequences:
            self._fork([column[:cut] for column, cut in zip(zip(*tokens, strict=True), cuts, strict=True)])
        elif self.active and 2 * len(self.active) <= len(self.live):
            self._drop_finished()

    def _fork(self, committed: list[tuple[int, ...]]) -> None:
        """Rows that have committed different tokens go on as different sequences; sequences without a row end."""
        sequences: dict[tuple[int, tuple[int, ...]], int] = {}  # (what it was, what it became) -> what it is
        sequence_of = [-1] * len(committed)
        for row in self.active:
            sequence_of[row] = sequences.setdefault((self.sequence_of[row], committed[row]), len(sequences))
        if sequences and sequence_of != self.sequence_of:
            self._change(Change(list(range(len(sequence_of))), [parent for parent, _ in sequences], sequence_of))

    def _drop_finished(self) -> None:
        active = set(self.active)
        stay = [i for i, row in enumerate(self.live) if row in active]
        self.live = [self.live[i] for i in stay]
        keep = torch.tensor(stay, device=self.index.device)  # [r]
        self.random_source = self.random_source.select(keep)
        for name in ("starts", "index", "limits", "anchors", "last", "done"):
            setattr(self, name, getattr(self, name)[keep])
        self._change(Change(stay, stay, list(range(len(stay)))))

    def _change(self, change: Change) -> None:
        """Have caches, and whoever else keeps something per row or sequence, follow."""
        device, count = self.index.device, len(change.parents)
        if change.parents != list(range(self.count)):
            parents = torch.tensor(change.parents, device=device)
            for cache in self.caches:
                cache.select(parents)
        self.sequence_of, self.count = change.sequence_of, count
        leaders = [change.sequence_of.index(sequence) for sequence in range(count)]
        own = change.sequence_of == list(range(count))  # every row has a sequence of its own
        self._leaders = None if own else torch.tensor(leaders, device=device)  # [t]
        self._sequences = None if own else torch.tensor(change.sequence_of, device=device).clamp(min=0)  # [b]
        self.sequence_random = (
            self.random_source if own else self.random_source.select(torch.tensor(leaders, device=device))
        )
        if self.on_change is not None:
            self.on_change(change)

    def outputs(self, *, drafts: int | Sequence[int]) -> list[DecodeOutput]:
        """The finished rows, in the order of the prompts.

        Args:
            drafts: forwards of the draft per cycle, of all rows or of each.
        """
        tokens = self.tokens.cpu()  # [B, T + K]
        counts = [end + 1 - length for end, length in zip(self.ends, self.lengths, strict=True)]
        outputs = []
        per_cycle = [drafts] * len(counts) if isinstance(drafts, int) else drafts
        for row, count in enumerate(counts):
            forwards = len(self.verified[row])
            trace = DecodeTrace(
                verified_lengths=self.verified[row],
                target_forwards=forwards,
                draft_forwards=forwards * per_cycle[row],
                prefill_seconds=self.prefill_seconds,
                decode_seconds=self.decode_ended - self.decode_began,
                batch_tokens=sum(counts) - len(counts),
                seed=None if self.request.seeds is None else self.request.seeds[row],
            )
            row_tokens = tokens[row, :count].clone()
            stopped = int(row_tokens[-1]) in self.request.stop_token_ids
            outputs.append(DecodeOutput(row_tokens, self.accepted[row], "stop" if stopped else "length", trace))
        return outputs


def choose(logits: Tensor, sampling: SamplingParams, random_source: RandomSource, positions: Tensor) -> Tensor:
    """The target's own tokens [B, Q] for the absolute ``positions`` [B, Q], from its logits [B, Q, V]."""
    if sampling.greedy:
        return logits.argmax(-1)
    return random_source.categorical(probabilities(logits, sampling), TARGET, positions)
