"""The rows of a batch: what they have committed, which are finished, which share a sequence of the caches.

A decoder is a loop of ``forward → verdict → Batch.commit → Batch.synchronise``. ``commit`` only enqueues work on the
device; ``synchronise`` is the cycle's one device-to-host synchronisation, after which the host knows who is done and
who is longest.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dgd_lightning.decode.call import Progress
from dgd_lightning.decode.finite import not_finite, peaks
from dgd_lightning.decode.random_source import TARGET, RandomSource, RandomTable, random_table
from dgd_lightning.decode.sampling import SamplingParams, log_normalisers, probabilities
from dgd_lightning.decode.session import OnFeatures, Session
from dgd_lightning.decode.stop_strings import GrowingText
from dgd_lightning.decode.verify import Verdict
from dgd_lightning.distributions import real_dtype, uniforms_on
from dgd_lightning.errors import InputError
from dgd_lightning.types import DecodeOutput, DecodeTrace, TargetStep


class Change(NamedTuple):
    """Rows that leave, and sequences that fork or end; numbers are those of before and of now."""

    stay: list[int]  # the rows now -> what their numbers were
    parents: list[int]  # the sequences now -> what they go on from
    sequence_of: list[int]  # the rows now -> their sequences; −1: finished


def to_host(values: Tensor) -> list[Any]:
    """The one place where a decoding cycle waits for the device."""
    return values.tolist()


class Batch:
    """The rows still being decoded. Committed tokens stay on the device; finished rows leave when half are done.

    Caches have a row per *sequence*, and forwards read sequences [t]. Every row [b] is a sequence of its own, unless
    rows share sequences: then those of one prompt (and one seed) are one sequence until they commit different tokens,
    and the sequence forks. So what several rows would compute alike is computed once.

    Args:
        session: with the prompts read; its caches have a row per prompt. A cycle commits its ``width`` at most.
        share_sequences: rows of one prompt, which then need the same seed, are one sequence until they differ.
        keep_finished: finished rows stay in the batch, so that :meth:`resume` may take them up again, until
            :meth:`drop_finished` is called.
        limit: new tokens at which rows end at first; None: the request's.
        on_change: called with a change from prompts to sequences, and whenever rows or sequences change.

    Attributes:
        anchors: [b] absolute position of each row's last committed token.
        last: [b] that token, not yet seen by the target.
        longest: the largest anchor, known on the host, so that a forward attends to no more than it must.
    """

    def __init__(
        self,
        session: Session,
        *,
        share_sequences: bool = False,
        keep_finished: bool = False,
        limit: int | None = None,
        on_change: Callable[[Change], None] | None = None,
    ) -> None:
        request, device, width = session.request, session.target.device, session.width
        batch, prompts, room = len(request.rows), len(request.lengths), request.max_new_tokens + width
        self.session, self.request, self.width, self.on_change = session, request, width, on_change
        self.share_sequences, self.keep_finished = share_sequences, keep_finished
        self.lengths = [request.lengths[prompt] for prompt in request.rows]  # R, of each row's prompt
        self.starts = torch.tensor(self.lengths, device=device)  # [b]
        # Greedy decoding has no table, so that reading it would fail.
        table = random_table(request.seeds or [0] * batch, 0 if request.seeds is None else room)
        self.random_source = request.random_source or RandomTable(uniforms_on(table, device), self.starts)
        self.stops = torch.tensor(request.stop_token_ids, dtype=torch.long, device=device)  # [n]
        self.slots = torch.arange(width, device=device)  # [K]
        self.tokens = torch.zeros(batch, room, dtype=torch.long, device=device)  # [B, T + K]
        scores = 2 if request.log_probs else 0  # log p and log Z of every token
        self.scores = torch.zeros(scores, batch, room, dtype=real_dtype(device), device=device)
        self.index = torch.arange(batch, device=device)  # [b] row of ``tokens``
        self.limits = self.starts + (limit or request.max_new_tokens)  # [b] first position that no token may take
        self.anchors = self.starts - 1
        prompt = torch.tensor(request.rows, device=device)  # [b]
        self.prompt_ends = request.ids.to(device)[prompt].gather(1, self.anchors[:, None])[:, 0]  # [B] last tokens
        self.last = self.prompt_ends  # [b]
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)  # [b]
        self.live = list(range(batch))  # original numbers of the rows in the tensors above
        self.active = list(range(batch))  # those not finished
        self.ends = [length - 1 for length in self.lengths]  # host copy of the anchors, for all rows
        self.note = ""  # for reports of progress: what the rows are at
        self.committed = 0  # tokens of all rows, those included that were taken back
        self.verified: list[list[int]] = [[] for _ in range(batch)]
        self.accepted: list[list[int]] = [[] for _ in range(batch)]
        self._read: Tensor | None = None  # the target's logits until tokens are committed
        self.watched: list[tuple[str, Tensor]] = []  # of this cycle: whose logits, and their `peaks` [b, Q]
        strings = request.stop_strings
        self.texts = [] if strings is None else [GrowingText(strings) for _ in range(batch)]  # of all rows, or of none
        self.completed: set[int] = set()  # rows that ended with a stop string
        self.sequence_of, self.count = list(range(prompts)), prompts  # each row's sequence; sequences in the caches
        sequences = (list(range(prompts)), request.rows) if share_sequences else (request.rows, list(range(batch)))
        self._change(Change(list(range(batch)), *sequences))

    @classmethod
    def after_prefill(cls, session: Session, on_features: OnFeatures | None = None, **options: Any) -> Self:
        """Read the prompts (see :meth:`Session.prefill`), and commit each row's first token."""
        logits = session.prefill(on_features)
        assert logits is not None, "every prompt goes on behind its prefix"
        batch = cls(session, **options)
        first = logits[torch.tensor(session.request.rows, device=logits.device), None]  # [b, 1, V]
        batch.watch("target", peaks(first))
        batch._read = first
        batch.begin(first)
        return batch

    def begin(self, logits: Tensor) -> None:
        """Choose and commit the first tokens, from logits [b, 1, V] after the prompts; with them the prefill ends."""
        first = choose(logits, self.request.sampling, self.random_source, self.starts[:, None])
        self.commit(Verdict(first, torch.ones_like(self.last)), logits)
        self.synchronise(first=True)
        self.prefilled()

    def prefilled(self) -> None:
        """The prefill ends here: what comes is timed as decoding, and a first token belongs to none of it."""
        self.committed = len(self.lengths)
        self.prefill_seconds = time.perf_counter() - self.session.began
        self.decode_began = self.decode_ended = time.perf_counter()

    @property
    def longest(self) -> int:
        """Largest anchor among the sequences, as of the last ``synchronise``."""
        rows = self.active if self.share_sequences and self.active else self.live
        return max(self.ends[row] for row in rows)

    def sequences(self, values: Tensor) -> Tensor:
        """Of values [b, ..] that rows of one sequence have in common, one per sequence [t, ..]."""
        return taken(values, self._leaders)

    def rows(self, values: Tensor) -> Tensor:
        """Values [t, ..] of sequences, for every row [b, ..]."""
        return taken(values, self._sequences)

    def positions(self, width: int) -> Tensor:
        """Absolute positions [b, width] of a block that begins with the last committed token."""
        return self.anchors[:, None] + self.slots[:width]

    def step(self, tokens: Tensor, positions: Tensor) -> TargetStep:
        """The target's forward on tokens [t, Q] at positions [t, Q], which begin with the last committed one."""
        forward = self.session.step(tokens, positions, max_length=self.longest + tokens.shape[1])
        self.watch("target", self.rows(peaks(forward.logits)))
        self._read = forward.logits
        return forward

    def watch(self, what: str, highest: Tensor, index: Tensor | None = None) -> None:
        """Have :meth:`synchronise` stop the run where a row is about to go on from logits that are no numbers.

        Args:
            what: whose logits they are.
            highest: their `peaks`, of all rows [b, Q] or of those at ``index`` [n]. Where Q is that of the tokens that
                the cycle commits, slots count that a row commits; else all of them count.
        """
        if index is not None:
            highest = highest.new_zeros(len(self.index), highest.shape[1]).index_copy(0, index, highest)
        self.watched.append((what, highest))

    def commit(self, verdict: Verdict, logits: Tensor) -> None:
        """Write a verdict's tokens, chosen from logits [b, Q, V], and advance the rows; the host is not told."""
        tokens, lengths = verdict
        if logits is not self._read:  # the target's own are watched already
            self.watch("distribution that tokens are chosen from", peaks(logits))
        self._read = None  # another forward's logits come before the next commit: no two are held
        slots = self.slots[: tokens.shape[1]]  # [Q]
        at = self.index[:, None], (self.anchors + 1 - self.starts)[:, None] + slots
        # Written whole: what lies beyond a row's committed length is never read, and the next cycle overwrites it.
        self.tokens[at] = tokens
        if self.request.log_probs:
            log_p = logits.to(self.scores.dtype).log_softmax(-1)  # [b, Q, V]
            self.scores[0][at] = log_p.gather(-1, tokens[..., None])[..., 0]
            self.scores[1][at] = log_normalisers(log_p, self.request.sampling)
        stop = (tokens[..., None] == self.stops).any(-1) & (slots < lengths[:, None])  # [b, Q]
        stop_slot = torch.where(stop, slots, self.width).amin(1)  # [b], width where there is none
        left = self.limits - 1 - self.anchors  # [b] tokens the row may still commit
        cut = torch.minimum(torch.minimum(lengths, stop_slot + 1), left).masked_fill(self.done, 0)
        self.done = self.done | (stop_slot < self.width) | (lengths >= left)
        newest = tokens.gather(1, (cut - 1).clamp(min=0)[:, None])[:, 0]
        self.last = torch.where(cut > 0, newest, self.last)
        self.anchors = self.anchors + cut
        self.watched = [(what, _of_committed(highest, cut, slots)) for what, highest in self.watched]
        sound = torch.stack([highest.sum(1) for _, highest in self.watched]).sum(0).isfinite()  # [b]: one tells of all
        news = torch.stack([lengths, cut, self.done.long(), sound.long()])  # [4, b]
        self._news = torch.cat([news, tokens.T]) if self.share_sequences or self.texts else news  # [4 + Q, b]

    def synchronise(self, *, first: bool = False) -> None:
        """Tell the host what was committed, and drop finished rows once they are half of the batch."""
        lengths, cuts, done, sound, *tokens = to_host(self._news)
        if not all(sound):
            raise self._not_finite(sound.index(0))
        self.watched = []
        if self.texts:
            self._end_at_strings(cuts, done, list(zip(*tokens, strict=True)))
        for row, length, cut, is_done in zip(self.live, lengths, cuts, done, strict=True):
            if cut == 0:  # finished in an earlier cycle
                continue
            self.ends[row] += cut
            self.committed += cut
            if not first:
                self.verified[row].append(length)
                self.accepted[row].append(cut)
            if is_done:
                self.active.remove(row)
        self.decode_ended = time.perf_counter()
        if self.request.on_progress is not None:
            verifications = sum(len(lengths) for lengths in self.verified)
            self.request.on_progress(
                Progress(self.committed, verifications, len(self.ends), len(self.active), self.note)
            )
        if self.share_sequences:
            self._fork([column[:cut] for column, cut in zip(zip(*tokens, strict=True), cuts, strict=True)])
        elif not self.keep_finished:
            self.drop_finished()

    def _not_finite(self, place: int) -> InputError:
        """Of the live row at this place: which logits were no numbers, and for which token."""
        row, found = self.live[place], [(what, highest[place]) for what, highest in self.watched]
        name = self.request.names[self.request.rows[row]]
        return not_finite(name, found, self.ends[row] + 1, self.session.target.dtype)

    def _end_at_strings(self, cuts: list[int], done: list[int], tokens: Sequence[Sequence[int]]) -> None:
        """End rows at their first token that completes a stop string: the host has their texts, and tells the device.

        Args:
            cuts, done: [b] of each row, tokens just committed and whether it is finished; changed where a row ends.
            tokens: [b][Q]
        """
        before, device = list(cuts), self.index.device
        ended = [self.texts[row].append(own[:cut]) for row, own, cut in zip(self.live, tokens, cuts, strict=True)]
        for place, kept in enumerate(ended):
            if kept is not None:
                cuts[place], done[place] = kept, 1
                self.completed.add(self.live[place])
        if any(kept is not None for kept in ended):
            over = [was - cut for was, cut in zip(before, cuts, strict=True)]
            self.anchors = self.anchors - torch.tensor(over, device=device)
            self.done = torch.tensor(done, dtype=torch.bool, device=device)
            self.last = self.tokens[self.index, self.anchors - self.starts]

    def ids_read(self) -> Tensor:
        """[S], of a batch of one row: prompt and committed tokens that the target has read, all but the last one."""
        return torch.cat([self.request.ids[0].to(self.tokens.device), self.tokens[0]])[: self.ends[0]]

    def resume(self, stay: Mapping[int, int], limits: Mapping[int, int]) -> None:
        """Have rows go on behind their first new tokens, wherever they are; those beyond are forgotten.

        Caches keep what they have: it lies beyond the rows' ends, hidden until it is overwritten.

        Args:
            stay: by row, how many new tokens stay, none of which ends it; with 0 the prompt alone is left, and a cycle
                gives the first token too.
            limits: by row, new tokens at which it ends; more than stay.
        """
        assert self.keep_finished, "rows that have left the caches can't come back"
        assert not self.share_sequences, "rows of one sequence go on together"
        given = [[int(row in stay), stay.get(row, 0), limits.get(row, 0)] for row in self.live]
        goes, count, limit = torch.tensor(given, device=self.index.device).unbind(1)  # [b] each
        goes = goes.bool()
        kept = self.tokens[self.index, (count - 1).clamp(min=0)]
        self.last = torch.where(goes, torch.where(count > 0, kept, self.prompt_ends[self.index]), self.last)
        self.anchors = torch.where(goes, self.starts + count - 1, self.anchors)
        self.limits = torch.where(goes, self.starts + limit, self.limits)
        self.done = self.done & ~goes
        for row, number in stay.items():
            self.ends[row] = self.lengths[row] + number - 1
            self.completed.discard(row)
            if self.texts:
                self.texts[row].go_back(number)
        active = {*self.active, *stay}
        self.active = [row for row in self.live if row in active]

    def renew(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Give rows random numbers of their own for what they draw from now on: a seed for each."""
        self.random_source = self.sequence_random = self.random_source.renewed(self.places(rows), seeds)

    def places(self, rows: Sequence[int]) -> Tensor:
        """Where rows are among those in the batch."""
        place = {row: number for number, row in enumerate(self.live)}
        return torch.tensor([place[row] for row in rows], device=self.index.device)

    def put(self, row: int, tokens: Tensor, scores: Tensor) -> None:
        """Write a row's new tokens [T] and their ``scores`` [2, T], as they were before; where it is, it stays.

        Its text, which stop strings are looked for in, becomes theirs.
        """
        self.tokens[row, : len(tokens)] = tokens.to(self.tokens.device)
        self.scores[:, row, : scores.shape[1]] = scores.to(self.scores.device)
        if self.texts:
            self.texts[row].go_back(0)
            self.texts[row].append(tokens.tolist())

    def copy_rows(self, parents: list[int]) -> None:
        """Row n becomes what row ``parents[n]`` is, tokens and caches; random numbers and counts stay its own."""
        assert len(self.live) == len(self.lengths), "rows have left"
        take = torch.tensor(parents, device=self.index.device)
        self.tokens, self.scores = self.tokens[take], self.scores[:, take]
        for name in ("limits", "anchors", "last", "done"):
            setattr(self, name, getattr(self, name)[take])
        self.ends = [self.ends[row] for row in parents]
        self.active = [row for row, parent in enumerate(parents) if parent in self.active]
        self.completed = {row for row, parent in enumerate(parents) if parent in self.completed}
        self.texts = [self.texts[row].copy() for row in parents] if self.texts else []
        self._change(Change(parents, parents, list(range(len(parents)))))

    def _fork(self, committed: list[tuple[int, ...]]) -> None:
        """Rows that have committed different tokens go on as different sequences; sequences without a row end."""
        sequences: dict[tuple[int, tuple[int, ...]], int] = {}  # (what it was, what it became) -> what it is
        sequence_of = [-1] * len(committed)
        for row in self.active:
            sequence_of[row] = sequences.setdefault((self.sequence_of[row], committed[row]), len(sequences))
        if sequences and sequence_of != self.sequence_of:
            self._change(Change(list(range(len(sequence_of))), [parent for parent, _ in sequences], sequence_of))

    def drop_finished(self) -> None:
        """Take finished rows out of the batch once they are half of it."""
        if not self.active or 2 * len(self.active) > len(self.live):
            return
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
            self.session.select(torch.tensor(change.parents, device=device))
        self.sequence_of, self.count = change.sequence_of, count
        leaders = [change.sequence_of.index(sequence) for sequence in range(count)]
        self._leaders = index_of(leaders, len(change.stay), device)  # [t]
        self._sequences = index_of([max(sequence, 0) for sequence in change.sequence_of], count, device)  # [b]
        self.sequence_random = self.random_source if self._leaders is None else self.random_source.select(self._leaders)
        if self.on_change is not None:
            self.on_change(change)

    def outputs(self, *, drafts: int | Sequence[int]) -> list[DecodeOutput]:
        """The finished rows, in the order of the prompts; ``drafts``: forwards per cycle, of all rows or of each."""
        tokens, scores = self.tokens.cpu(), self.scores.cpu()  # [B, T + K], [2, B, T + K]
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
                batch_tokens=self.committed - len(counts),
                seed=None if self.request.seeds is None else self.request.seeds[row],
                log_probs=scores[0, row, :count].clone() if self.request.log_probs else None,
                log_normalisers=scores[1, row, :count].clone() if self.request.log_probs else None,
            )
            row_tokens = tokens[row, :count].clone()
            stopped = row in self.completed or int(row_tokens[-1]) in self.request.stop_token_ids
            outputs.append(DecodeOutput(row_tokens, self.accepted[row], "stop" if stopped else "length", trace))
        return outputs


def index_of(numbers: list[int], count: int, device: torch.device) -> Tensor | None:
    """What :func:`taken` takes by; None where these are all of ``count``, in order: nothing is copied then."""
    return None if numbers == list(range(count)) else torch.tensor(numbers, device=device)


def taken(values: Tensor, index: Tensor | None) -> Tensor:
    """Values [n, ..] at an index [m], or all of them."""
    return values if index is None else values[index]


def _of_committed(highest: Tensor, cut: Tensor, slots: Tensor) -> Tensor:
    """`peaks` [b, Q] of the tokens that rows commit, [b] of them at ``slots`` [Q], and 0 elsewhere.

    Of another number of slots, as a draft's, all count: [b, 1].
    """
    if highest.shape[1] != len(slots):
        highest, slots = highest.sum(1, keepdim=True), slots[:1]
    return torch.where(slots < cut[:, None], highest, 0.0)


def choose(logits: Tensor, sampling: SamplingParams, random_source: RandomSource, positions: Tensor) -> Tensor:
    """Tokens [B, Q] for the absolute ``positions`` [B, Q], drawn from logits [B, Q, V] or their argmax."""
    if sampling.greedy:
        return logits.argmax(-1)
    return random_source.categorical(probabilities(logits, sampling), TARGET, positions)
