"""lm-evaluation-harness with a target, its draft and any method: the model ``dgd``, and the harness' own command line.

``python -m dgd_lightning.lm_eval --model dgd --model_args target=…,draft=…,method=Guided,beta=0.3 --tasks gsm8k``
"""

import difflib
import importlib
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jsonargparse
import torch
from torch import Tensor

from dgd_lightning import __version__
from dgd_lightning.checks import check_choice, check_integer, check_number
from dgd_lightning.commands.errors import from_parser_message, mistake_behind
from dgd_lightning.commands.mistakes import wrong_name
from dgd_lightning.decode.call import Call
from dgd_lightning.decode.readouts.draft import as_readout
from dgd_lightning.decode.replay import replay_rows
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.decode.stop_strings import answer_text
from dgd_lightning.distributions import wide
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Method
from dgd_lightning.methods.guided import Guided
from dgd_lightning.modules.arms import Arm, leaves_out_context, loaded_methods, pinned_models, row_seed
from dgd_lightning.pair import load_pair, resolve_commits

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
    from tqdm import tqdm
except ModuleNotFoundError as error:
    MISSING = InputError(
        "lm_eval",
        expected="lm-evaluation-harness, installed",
        received=f"no module {error.name}",
        hint="pip install 'dgd-lightning[lm-eval]'",
    )
    if __name__ != "__main__":
        raise MISSING from error
    print(f"dgd: error: {MISSING}", file=sys.stderr)
    sys.exit(2)

ROOMS = ("methods", "decode.readouts", "decode")  # of methods, and of what their settings name
OF_OTHERS = {"pretrained": "target", "model": "target", "assistant_model": "draft"}  # names that other models have
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed")


Score = tuple[float, bool]  # ln of a continuation's probability; whether each of its tokens is the likeliest


class Request(NamedTuple):
    """Texts to be scored: continuations [T], T ≥ 1, behind one context [S], S ≥ 1."""

    context: tuple[int, ...]
    continuations: list[list[int]]
    numbers: list[int]  # of the continuations, in the order of the results


class DGD(TemplateLM):
    """A pair and a method as a model of the harness.

    Args:
        target, draft, dtype, attn_implementation, revision, draft_revision, device: see
            :func:`~dgd_lightning.pair.load_pair`.
        method: a method's class name, or the class path of one of your own.
        batch_size: prompts per batch.
        max_length: most positions, the target's own where it is left out; longer contexts lose their first tokens.
        max_gen_toks: limit of new tokens, where a task has none.
        enable_thinking: passed to the chat template.
        seed: from which the seeds of drawn answers are derived.
        settings: those of the method, such as ``beta``; of what they name, with dots (``readout.layer``).

    Raises:
        InputError: an argument that nothing takes or that can't be.
    """

    def __init__(
        self,
        target: str | None = None,
        draft: str | None = None,
        method: str = "Autoregressive",
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # the harness' own, for a batch size that is found by trying
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        draft_revision: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        enable_thinking: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.method = made_method(method, settings)
        if target is None:
            hint = "give it in --model_args: target=Qwen/Qwen3-8B"
            raise InputError("target", expected="a folder or Hub id", received="none", hint=hint)
        size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        self.batch_size = check_integer("batch_size", size, hint="use e.g. 8: none is found by trying")
        arm = Arm("dgd", self.method)
        if draft is None and self.method.needs_draft:
            raise InputError("draft", expected=f"a draft, for {method}", received="none", hint="add draft=…")
        if leaves_out_context(self.method):
            raise InputError(
                "readout",
                expected="one that needs nothing but the prompt",
                received="WithoutContext",
                hint="use `dgd predict`, which knows what of a prompt is its context",
            )
        if (ranks := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            expected = "one process: torchrun and accelerate would have each do all of the work"
            raise InputError("WORLD_SIZE", expected=expected, received=ranks, hint="start it with python -m")
        check_integer("seed", seed, least=0)
        check_integer("max_gen_toks", max_gen_toks)
        check_integer("max_length", max_length, optional=True)
        check_choice("enable_thinking", enable_thinking, (True, False))
        if device == "cuda:0" and not torch.cuda.is_available():
            device = "auto"  # the harness asks for cuda:0 wherever its user names no device
        commits = resolve_commits(target, draft, revision, draft_revision)
        self.pair = load_pair(
            target,
            draft,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            revision=commits.target,
            draft_revision=commits.draft,
        )
        if self.pair.tokenizer is None:
            expected = "a folder or Hub id with a tokenizer"
            raise InputError("target", expected=expected, received=target, hint="add the tokenizer's files")
        models = pinned_models([arm])
        self.method = loaded_methods([arm], models, self.pair.target)[arm.name]
        self.method.block(self.pair)
        room = self.pair.target.max_positions
        self.tokenizer, self._device = self.pair.tokenizer, self.pair.target.device
        self.max_length = check_integer("max_length", room if max_length is None else max_length)
        if self.max_length > room:
            raise InputError("max_length", expected=f"at most {room}", received=max_length, hint="leave it out")
        self.max_gen_toks, self.enable_thinking = check_integer("max_gen_toks", max_gen_toks), enable_thinking
        self.seed = seed
        self.info = {"dgd_lightning": __version__, "target_commit": commits.target, "draft_commit": commits.draft}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "DGD":
        """From ``--model_args``, whose own ``device`` and ``batch_size`` count before the harness' options."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "DGD":
        """The same of arguments that are known."""
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**more, **arg_dict})

    def get_model_info(self) -> dict[str, Any]:
        """What the harness' results say of the model beside its arguments."""
        return {**self.info, "method": self.method.name, "method_settings": self.method.settings()}

    # What the harness asks of tokenizers.

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before texts without a context: the tokenizer's first one, or its last one where it has none."""
        found = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise InputError(
                "target",
                expected="a tokenizer with a bos or eos token, which texts without a context begin with",
                received="one without",
                hint="use tasks with contexts, or add bos_token to tokenizer_config.json",
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                enable_thinking=self.enable_thinking,
            )
        except Exception as error:  # templates raise what they like
            raise InputError(
                "--apply_chat_template",
                expected="messages that the tokenizer's chat template accepts",
                received=f"{type(error).__name__}: {error}",
                hint="leave it out, or --system_instruction, or use an instruct model",
            ) from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; None adds special tokens as the tokenizer does, but no second bos token."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    # Requests.

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln of the probability of whole texts, each token behind at most ``max_length`` others, window by window."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            if ids and ids[0] == self.prefix_token_id:  # the windows add it
                ids = ids[1:]
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        """Of each (key, context, continuation); the key, if any, is what the harness' cache knows it by."""
        if self.method.blends and not isinstance(self.method, Guided):
            raise InputError(
                "method",
                expected="Guided, or one that leaves the target's distribution as it is, for tasks with likelihoods",
                received=self.method.name,
                hint="use tasks that generate answers, or method=Guided",
            )
        results: list[Score] = [(0.0, True)] * len(requests)
        grouped: dict[tuple[int, ...], Request] = {}  # what has one context is read behind one reading of it
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise InputError(
                    "continuation",
                    expected=f"at most {self.max_length} tokens",
                    received=len(continuation),
                    hint="use a target with a longer context",
                )
            # The last token is not read, so one more than `max_length` fits.
            kept = tuple(context[-(self.max_length + 1 - len(continuation)) :])
            own = grouped.setdefault(kept, Request(kept, [], []))
            own.continuations.append(continuation)
            own.numbers.append(number)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="dgd: log-likelihoods") as bar:
            for batch in self._batches(grouped.values()):
                for request, scores in zip(batch, self._scores(batch), strict=True):
                    for number, score in zip(request.numbers, scores, strict=True):
                        results[number] = score
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                    bar.update(len(scores))
        return results

    def _batches(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Longest first; the longest continuation of a batch must fit behind its longest context."""
        batch: list[Request] = []
        most = [0, 0]  # tokens of a context, of a continuation
        for request in sorted(requests, key=lambda one: (-len(one.context), -max(map(len, one.continuations)))):
            sizes = [len(request.context), max(map(len, request.continuations))]
            both = [max(pair) for pair in zip(most, sizes, strict=True)]
            if batch and (len(batch) == self.batch_size or sum(both) > self.pair.target.max_positions + 1):
                yield batch
                batch, both = [], sizes
            batch.append(request)
            most = both
        if batch:
            yield batch

    def _scores(self, batch: Sequence[Request]) -> list[list[Score]]:
        """Of every continuation, by the target's distribution at temperature 1, or by the blended one."""
        guidance = self.method.guidance_of({}) if isinstance(self.method, Guided) else None
        readouts = [] if guidance is None else [as_readout(guidance.readout)]
        contexts = [torch.tensor(one.context) for one in batch]
        continuations = [[torch.tensor(ids) for ids in one.continuations] for one in batch]
        scores: list[list[Score]] = [[(0.0, True)] * len(own) for own in continuations]
        for part in replay_rows(self.pair, contexts, continuations, readouts):
            logits = wide(part.target)  # [B, Q, V]
            if guidance is not None:
                betas = torch.tensor(guidance.blend.betas(len(batch)), dtype=logits.dtype, device=logits.device)
                step = torch.arange(part.first, part.first + logits.shape[1], device=logits.device)
                logits = guidance.blend.mix(logits, part.readouts[0], betas, step.expand(logits.shape[:2]))
            log_p = logits.log_softmax(-1).gather(-1, part.tokens[..., None])[..., 0].double().tolist()  # [B][Q]
            likeliest = (logits.argmax(-1) == part.tokens).tolist()
            for row, own in enumerate(continuations):
                if part.answer < len(own) and (left := len(own[part.answer]) - part.first) > 0:
                    total, greedy = scores[row][part.answer]
                    total, greedy = total + sum(log_p[row][:left]), greedy and all(likeliest[row][:left])
                    scores[row][part.answer] = total, greedy
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each before the first of its stop strings."""
        results = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # requests that can share a batch
        seen: dict[str, int] = {}
        repeats = []  # a prompt that is asked several times gets several answers, where they are drawn
        for number, request in enumerate(requests):
            context, options = request.args
            key = json.dumps(options, sort_keys=True)
            alike.setdefault(key, []).append(number)
            repeats.append(seen.get(key + context, 0))
            seen[key + context] = repeats[-1] + 1
        with tqdm(total=len(requests), disable=disable_tqdm, desc="dgd: answers") as bar:
            for key, numbers in alike.items():
                asked = normalize_gen_kwargs(json.loads(key), self.max_gen_toks)
                arm, call, seed = self._call(asked)
                prompts = {number: self._prompt(requests[number].args[0], call) for number in numbers}
                ordered = sorted(numbers, key=lambda number: -len(prompts[number]))
                for at in range(0, len(ordered), self.batch_size):
                    batch = ordered[at : at + self.batch_size]
                    seeds = [row_seed(seed, f"{repeats[i]} {requests[i].args[0]}", arm) for i in batch]
                    ids = [prompts[number] for number in batch]
                    outputs = self.method.generate(self.pair, ids, call._replace(seed=seeds))
                    for number, output in zip(batch, outputs, strict=True):
                        text = answer_text(self.tokenizer, output.tokens.tolist(), call.stop_strings)
                        results[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return results

    def _prompt(self, text: str, call: Call) -> Tensor:
        """Ids [S] of a context, without its first ones where it does not fit with its new tokens."""
        if (room := self.max_length - call.max_new_tokens) < 1:
            expected = f"less than the {self.max_length} positions of max_length"
            raise InputError("max_gen_toks", expected=expected, received=call.max_new_tokens, hint="lower it")
        return torch.tensor((self.tok_encode(text) or [self.prefix_token_id])[-room:])

    def _call(self, asked: Any) -> tuple[Arm, Call, int]:
        """What decoding is asked with, from a task's ``generation_kwargs``."""
        asked = {**asked}
        if asked.get("num_beams") == 1:
            del asked["num_beams"]
        if unknown := [name for name in asked if name not in GENERATION]:
            close = difflib.get_close_matches(unknown[0], GENERATION, n=1)
            raise InputError(
                f"generation_kwargs.{unknown[0]}",
                expected=f"one of {', '.join(GENERATION)}",
                received=asked[unknown[0]],
                hint=f"did you mean {close[0]!r}?" if close else "take it out of the task's YAML or of --gen_kwargs",
            )
        temperature = check_number("temperature", asked.get("temperature", 1.0 if asked["do_sample"] else 0.0), least=0)
        filters = {name: asked.get(name) for name in ("top_k", "top_p")} if temperature else {}
        arm = Arm("dgd", self.method, float(temperature), **filters)
        arm.check()
        limit = check_integer("max_gen_toks", asked["max_gen_toks"])
        strings = [string for string in asked["until"] if string]
        call = Call(limit, sampling_params(**arm.sampling()), stop_strings=strings)
        return arm, call, check_integer("seed", asked.get("seed", self.seed), least=0)


def made_method(name: str, settings: dict[str, Any]) -> Method:
    """A method by its class, with settings as YAML would have them, dots for those of what they name."""
    for room in ROOMS:  # only imported classes are known by their short names
        for module in pkgutil.iter_modules(importlib.import_module(f"dgd_lightning.{room}").__path__):
            importlib.import_module(f"dgd_lightning.{room}.{module.name}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--method", type=Method)
    given = [
        f"--method.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in sorted(settings.items(), key=lambda item: item[0].count("."))
    ]
    try:
        return parser.instantiate_classes(parser.parse_args([f"--method={name}", *given])).method
    except jsonargparse.ArgumentError as error:
        mistake = from_parser_message(str(error))
        key, hint = mistake.argument.removeprefix("method."), mistake.hint
        if key in ("class_path", "method"):
            for wrong in wrong_name(name, ["Method"], "method"):
                raise wrong.error from error
        if mistake.received == "nothing":
            hint = f"add {key}=… to --model_args"
        elif mistake.received.startswith("unknown key") and key in settings and "." not in key:
            own = [*inspect.signature(DGD.__init__).parameters][1:-1]
            close = [OF_OTHERS[key]] if key in OF_OTHERS else difflib.get_close_matches(key, own, n=1)
            mistake.expected = mistake.expected.replace("a key of", "an argument of the model or of")
            if close or "did you mean" not in hint:
                hint = f"did you mean {close[0]!r}?" if close else f"remove it; the model takes {', '.join(own)}"
        raise InputError(key, expected=mistake.expected, received=mistake.received, hint=hint) from error


def main() -> int:
    """Run the harness' own command line; 2 after a user's mistake, in one line."""
    register_model("dgd")(DGD)
    try:
        cli_evaluate()
    except Exception as error:
        if (mistake := mistake_behind(error)) is None:
            raise
        print(f"dgd: error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Under its own name, by which the harness may load it too.
    sys.exit(importlib.import_module("dgd_lightning.lm_eval").main())
