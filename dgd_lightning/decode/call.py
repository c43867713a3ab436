"""What every decoder is asked with: one record of limits, sampling, seeds and stops, and its check against prompts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.decode.prefix_cache import PrefixCache, check_prefixes
from dgd_lightning.decode.random_source import RandomSource, row_seeds
from dgd_lightning.decode.sampling import GREEDY, SamplingParams, sampling_params
from dgd_lightning.decode.stop_strings import StopStrings, check_stop_strings
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair


class Progress(NamedTuple):
    """Where a batch is after a cycle; ``(tokens - rows) / verifications`` is the running τ."""

    tokens: int  # committed by all rows, first tokens included
    verifications: int  # by all rows
    rows: int
    active: int  # rows not yet finished
    note: str = ""  # where in its work a method is, for people


OnProgress = Callable[[Progress], None]


class CycleState(Protocol):
    """A :class:`CycleHook` at work on one prompt."""

    layer_ids: Sequence[int]  # of the target: the layers that the draft taps, and what else the hook wants to see

    def observe(self, taps: Tensor, positions: Tensor) -> Tensor:
        """Take note of what a forward gave, [1, Q, n·H] at positions [1, Q]; returns the draft's part, [1, Q, F·H]."""

    def after_cycle(self, ids: Tensor, prompt_length: int) -> Tensor | None:
        """Do what is to be done between two cycles, with all tokens [S] that the target has read.

        Returns:
            [1, S, F·H], features from which the draft's context is written anew; None where it stays as it is.
        """

    def close(self) -> None:
        """Leave the pair as it was."""


class CycleHook(Protocol):
    """What happens between the cycles of speculative decoding, such as online adaptation. Rows come one by one."""

    def begin(self, pair: Pair, capacity: int) -> CycleState:
        """For one row of at most ``capacity`` positions."""


class Call(NamedTuple):
    """What all ways to decode take beside a pair and prompts.

    ``max_new_tokens``: limit per row, the stop token included. ``stop_token_ids``: None for the target's own, an empty
    list for none. ``stop_strings``: a row ends with the first token that completes one of them in the text of its
    new tokens. ``seed``: one integer (row seeds are derived from it), one per row, or None for fresh entropy.
    ``num_return_sequences``: rows per prompt. ``prefixes``: what of each prompt has been read already, or None in its
    place. ``on_progress``: called after the prefill and after every cycle. ``log_probs``: report the log-probability
    of every token. ``random_source``: in place of the seeded one, for tests that enumerate every outcome. ``names``:
    what each prompt is called in errors; None for ``prompts[0]``, …
    """

    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    stop_token_ids: Sequence[int] | None = None
    stop_strings: Sequence[str] | None = None
    seed: int | Sequence[int] | None = None
    num_return_sequences: int = 1
    prefixes: Sequence[PrefixCache | None] | None = None
    on_progress: OnProgress | None = None
    log_probs: bool = False
    cycle_hook: CycleHook | None = None
    random_source: RandomSource | None = None
    names: Sequence[str] | None = None

    def names_of(self, count: int) -> list[str]:
        """What each of so many prompts is called in errors; a method may decode others than the call was made for."""
        given = self.names or ()
        return list(given) if len(given) == count else [f"prompts[{number}]" for number in range(count)]


class CallOptions(TypedDict, total=False):
    """The same as keyword arguments of the public functions, ``max_new_tokens`` apart."""

    temperature: float
    top_k: int | None
    top_p: float | None
    stop_token_ids: Sequence[int] | None
    stop_strings: Sequence[str] | None
    seed: int | Sequence[int] | None
    num_return_sequences: int
    prefixes: Sequence[PrefixCache | None] | None
    on_progress: OnProgress | None
    log_probs: bool
    random_source: RandomSource | None
    names: Sequence[str] | None


def call_of(
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    **options: Any,
) -> Call:
    """A call from keyword arguments."""
    return Call(max_new_tokens, sampling_params(temperature, top_k, top_p), **options)


class Request(NamedTuple):
    """Checked input of one batch: B prompts, and R rows that go on from them."""

    ids: Tensor  # [B, S] on CPU, padded on the right with 0
    lengths: list[int]  # B
    max_new_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    stop_strings: StopStrings | None  # None for none
    seeds: list[int] | None  # one per row; None for greedy decoding
    rows: list[int]  # R numbers of prompts, prompt by prompt: rows of one prompt share its prefill
    prefixes: list[PrefixCache | None]  # B, what of each prompt has been read already
    on_progress: OnProgress | None
    log_probs: bool
    random_source: RandomSource | None
    names: list[str]  # B, what prompts are called in errors
    spare: int = 0  # slots of every cache behind all positions, where what a row may come back to is kept

    def alone(self, row: int) -> "Request":
        """The request of one of the rows."""
        prompt = self.rows[row]
        length = self.lengths[prompt]
        return self._replace(
            ids=self.ids[prompt : prompt + 1, :length],
            lengths=[length],
            seeds=self.seeds and [self.seeds[row]],
            rows=[0],
            prefixes=[self.prefixes[prompt]],
            names=[self.names[prompt]],
        )

    def capacity(self, width: int) -> int:
        """Slots per row that a cache needs where cycles write ``width`` tokens: the last may pass the limit."""
        return max(self.lengths) + self.max_new_tokens + width + self.spare


def check_request(pair: Pair, prompts: Sequence[Tensor], call: Call, *, unread: int = 0) -> Request:
    """Check a call with its prompts, and pad them; a prompt with its new tokens must fit the target's positions.

    ``unread``: how many of the last new tokens need no position, since no forward will read them.
    """
    target, new = pair.target, check_integer("max_new_tokens", call.max_new_tokens)
    count = check_integer("num_return_sequences", call.num_return_sequences)
    if isinstance(prompts, Tensor) or len(prompts) == 0:
        raise InputError(
            "prompts",
            expected="a non-empty list of 1-D integer tensors",
            received=f"a tensor of shape {list(prompts.shape)}" if isinstance(prompts, Tensor) else "an empty list",
            hint="pass e.g. [torch.tensor([1, 2, 3])]",
        )
    names = call.names_of(len(prompts))
    rows = [check_prompt(name, prompt, target.vocab_size) for name, prompt in zip(names, prompts, strict=True)]
    for name, row in zip(names, rows, strict=True):
        if len(row) + new - unread > target.max_positions:
            raise InputError(
                name,
                expected=f"prompt + max_new_tokens of at most {target.max_positions} positions",
                received=f"{len(row)} + {new} = {len(row) + new}",
                hint="shorten the prompt or lower max_new_tokens",
            )
    return Request(
        ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        lengths=[len(row) for row in rows],
        max_new_tokens=new,
        sampling=call.sampling,
        stop_token_ids=_stop_tokens(pair, call.stop_token_ids),
        stop_strings=check_stop_strings(pair.tokenizer, call.stop_strings),
        seeds=None if call.sampling.greedy else row_seeds(call.seed, len(rows) * count),
        rows=[i for i in range(len(rows)) for _ in range(count)],
        prefixes=check_prefixes(call.prefixes, rows, rows_per_prompt=count),
        on_progress=call.on_progress,
        log_probs=call.log_probs,
        random_source=call.random_source,
        names=names,
    )


def check_prompt(name: str, prompt: Any, vocab_size: int) -> Tensor:
    """The prompt [S] as int64 on CPU: a 1-D integer tensor of at least one of the vocabulary's ids."""
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
    if isinstance(stop_token_ids, int | str) or any(type(i) is not int for i in stop_token_ids):
        raise InputError(
            "stop_token_ids", expected="a list of integers or None", received=repr(stop_token_ids), hint="use e.g. [2]"
        )
    return tuple(stop_token_ids)
