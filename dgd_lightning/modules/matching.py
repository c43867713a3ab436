"""Null controls as strong as what they control: the scale at which a control moves the target as far as its original.

Noise of the same norm does not have the same effect: it spreads over the vocabulary, where a draft agrees with the
target on most of it. So the scale is found at which the mean total variation between target and guided distribution,
or the share of changed top-1 tokens, is that of the controlled arm, on the target's own greedy answers.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dgd_lightning.checks import check_choice, check_integer
from dgd_lightning.data.contexts import ContextsData
from dgd_lightning.data.licence import CLBENCH
from dgd_lightning.data.prompts import PromptsData
from dgd_lightning.data.tasks import TaskData, by_context
from dgd_lightning.decode.readouts.base import scaled_logits
from dgd_lightning.decode.readouts.draft import as_readout
from dgd_lightning.decode.replay import replay
from dgd_lightning.distributions import real_dtype, total_variation, wide
from dgd_lightning.draft.checkpoint import Adapter
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.base import Guidance, Method
from dgd_lightning.methods.guided import Guided
from dgd_lightning.methods.power import Power
from dgd_lightning.modules.adaptation import ContextAdapter, SavedAdapters
from dgd_lightning.modules.arms import Arm, control_of
from dgd_lightning.modules.prompts import Prompts
from dgd_lightning.pair import Pair
from dgd_lightning.row_files import read_rows, require_file

Strength = Literal["tv", "argmax"]
FILE = "matched_controls.json"
WIDEST, ROUGH, FINE = (
    5.0,
    21,
    9,
)  # of the scales that are tried: powers of 2 up to ± this, their number, of a second look
UNMATCHED = 0.1  # relative difference of the effects from which on a control is called unmatched
WORDS = {"tv": "mean total variation", "argmax": "share of changed top-1 tokens"}
TASKS = 8  # of a context, at most
POLL = 2.0  # seconds between two looks of the other ranks


@dataclass(frozen=True)
class MatchControls:
    """How null controls are matched to what they control.

    Args:
        by: the effect that is made equal: ``tv``, the mean total variation of target and guided distribution, or
            ``argmax``, the share of tokens whose top-1 token changes.
        contexts: so many of the data's contexts, the first by sorted id, whatever ``limit`` and order are.
        tokens: of each greedy answer of the target that the effect is measured on.
        data: a file of contexts or prompts to take instead of the run's data; needed where these are CL-bench's.
        scales: an earlier run's folder or its ``matched_controls.json``: what was found there is used.

    Raises:
        InputError: a setting that can't be.
    """

    by: Strength = "tv"
    contexts: int = 8
    tokens: int = 64
    data: str | None = None
    scales: str | None = None

    def __post_init__(self) -> None:
        check_choice("model.match_controls.by", self.by, get_args(Strength))
        check_integer("model.match_controls.contexts", self.contexts)
        check_integer("model.match_controls.tokens", self.tokens)
        if self.data is not None and self.scales is not None:
            raise InputError(
                "model.match_controls.scales",
                expected="null beside model.match_controls.data",
                received=self.scales,
                hint="scales are either found or taken from an earlier run",
            )

    def fingerprint(self) -> dict[str, Any]:
        """All settings, files by what is in them, for the hash of a run."""
        found = asdict(self)
        for name in ("data", "scales"):
            if found[name] is not None:
                file = _file(found[name]) if name == "scales" else Path(found[name])
                require_file(file, f"model.match_controls.{name}")
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found


class Text(NamedTuple):
    """An answer of the target that effects are measured on."""

    prompt: Tensor  # [S]
    answer: Tensor  # [T]
    adapter: Adapter | None  # of the prompt's context, for the arms that adapt


class Effect(NamedTuple):
    """Means over tokens."""

    tv: float
    argmax: float


def answers(pair: Pair, prompts: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The target's greedy answers [T]."""
    return [autoregressive_generate(pair, [prompt], max_new_tokens=tokens)[0].tokens for prompt in prompts]


def effects(pair: Pair, texts: Sequence[Text], guidance: Guidance, scales: Sequence[float], ttt: bool) -> list[Effect]:
    """What a readout does to the target's distributions at each of its scales."""
    device, count = pair.target.device, 0
    sums = torch.zeros(len(scales), 2, dtype=real_dtype(device), device=device)
    readout = as_readout(guidance.readout)
    for text in texts:
        with pair.adapter(text.adapter) if ttt and text.adapter is not None else nullcontext():
            for part in replay(pair, text.prompt, [text.answer], [readout]):
                target = wide(part.target)
                log_t, top = target.log_softmax(-1), target.argmax(-1)
                for row, scale in enumerate(scales):
                    logits = part.readouts[0] if scale == 1 else scaled_logits(target, wide(part.readouts[0]), scale)
                    guided = guidance.blend.mix_along(part.target, logits, part.first)
                    changed = guided.argmax(-1) != top  # [Q]
                    sums[row] += torch.stack([total_variation(log_t, guided.log_softmax(-1)), changed]).to(sums).sum(1)
                count += len(part.tokens)
    return [Effect(*(row / max(count, 1)).tolist()) for row in sums]


def guided_controls(arms: Sequence[Arm]) -> dict[str, str]:
    """The null controls whose strength is known at every token, by name, with the arms that they control."""
    guided = {arm.name for arm in arms if isinstance(arm.method, Guided | Power)}
    return {name: original for name, original in control_of(arms).items() if name in guided}


def find_scale(effect: Callable[[Sequence[float]], list[float]], wanted: float) -> float:
    """The scale whose effect, which grows with it, is ``wanted``; the end of what is tried where none has it."""
    middle = 0.0
    for width, number in ((WIDEST, ROUGH), (2 * WIDEST / (ROUGH - 1), FINE)):
        tried = np.linspace(middle - width, middle + width, number)
        found = np.maximum.accumulate(effect([float(2**one) for one in tried]))
        middle = float(np.interp(wanted, found, tried))
    return float(2**middle)


def match(
    pair: Pair,
    arms: Sequence[Arm],
    methods: Mapping[str, Any],
    texts: Sequence[Text],
    by: Strength,
    on_step: Callable[[str], None] = lambda what: None,
) -> dict[str, dict[str, Any]]:
    """What is known of each null control, by its arm's name; JSON-able. Those without a scale are measured alone."""
    by_name = {arm.name: arm for arm in arms}
    known: dict[str, dict[str, Any]] = {}
    strengths: dict[str, Effect] = {}  # of the controlled arms, which may have several controls
    for name, original in guided_controls(arms).items():
        arm, guidance = by_name[name], Guidance(methods[name].blend(), methods[name].readout)

        def effect(scales: Sequence[float], guidance: Guidance = guidance, ttt: bool = arm.ttt) -> list[Effect]:
            return effects(pair, texts, guidance, scales, ttt)

        on_step(name)
        if original not in strengths:
            theirs = Guidance(methods[original].blend(), methods[original].readout)
            (strengths[original],) = effect([1.0], theirs)
        wanted, given = strengths[original], getattr(guidance.readout, "scale", None)
        factor = 1.0  # on what the readout is: a scale that is not 1 is the user's
        if given == 1.0:
            factor = find_scale(lambda scales: [getattr(one, by) for one in effect(scales)], getattr(wanted, by))
        (own,) = effect([factor])
        ratio = getattr(own, by) / getattr(wanted, by) if getattr(wanted, by) else float("inf")
        known[name] = {
            "controls": original,
            "settings": arm.settings(),
            "scale": None if given is None else given * factor,
            "by": by,
            "words": f"{WORDS[by]} {getattr(own, by):.3f}, {original}'s {getattr(wanted, by):.3f}",
            "tv": [own.tv, wanted.tv],
            "argmax_changed": [own.argmax, wanted.argmax],
            "matched": bool(abs(ratio - 1) <= UNMATCHED),
            "tokens": sum(len(text.answer) for text in texts),
        }
    return known


def scaled_arms(arms: Sequence[Arm], found: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
    """The arms, controls at the scales that were found."""
    methods = scaled_methods({arm.name: arm.method for arm in arms}, found)
    return [replace(arm, method=methods[arm.name]) for arm in arms]


def scaled_methods(methods: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The methods by their arms' names, those of controls with their readouts at the scales that were found."""
    scales = {name: one["scale"] for name, one in found.items() if one["scale"] is not None}
    return {
        name: replace(method, readout=replace(method.readout, scale=scales[name])) if name in scales else method
        for name, method in methods.items()
    }


def in_words(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each control."""
    lines = []
    for name, one in found.items():
        how = "has no scale" if one["scale"] is None else f"scale {one['scale']:.3g}"
        verdict = "matched" if one["matched"] else "unmatched: it is another in strength"
        lines.append(f"control {name} ({how}): {one['words']}, {verdict}")
    return lines


def matched_controls(
    module: Any,
    pair: Pair,
    methods: Mapping[str, Method],
    prompts: Prompts,
    adapt: ContextAdapter | SavedAdapters | None,
) -> dict[str, dict[str, Any]]:
    """What is known of the null controls of a run's module: from another run, an earlier session, or found now.

    Rank 0 finds it and writes it into the run folder; the others wait for the file.
    """
    settings, folder = module.match_controls, Path(module.trainer.log_dir or ".")  # a collective: every rank asks
    if settings.scales is not None:
        return saved(_file(settings.scales), module.arms)
    if not (folder / FILE).is_file() and not module.trainer.is_global_zero:
        wait_for(folder)
    if not (folder / FILE).is_file():
        texts = texts_of(module, pair, prompts, adapt)
        with tqdm(guided_controls(module.arms), desc="matching null controls", leave=False, disable=None) as bar:
            write(folder, match(pair, module.arms, methods, texts, settings.by, lambda _: bar.update()))
    return saved(folder / FILE, module.arms)


def texts_of(module: Any, pair: Pair, prompts: Prompts, adapt: ContextAdapter | SavedAdapters | None) -> list[Text]:
    """The target's answers that effects are measured on, with their contexts' adapters where arms adapt."""
    settings, own = module.match_controls, module.trainer.datamodule
    data = own if settings.data is None else calibration_data(settings.data)
    refuse_clbench(data, module.accept_clbench_license)
    adapts, contexts, texts = any(arm.ttt for arm in module.arms), by_context(data.read()), []
    chosen = sorted(contexts)[: settings.contexts]
    for context in tqdm(chosen, desc="reading, to match null controls", leave=False, disable=None):
        ids = [one for one in map(prompts.of, contexts[context]) if len(one) <= prompts.limit]
        adapter = None
        if adapts and ids and isinstance(adapt, ContextAdapter):
            adapted = adapt(context, lambda ids=ids: ids)  # type: ignore[misc]
            if data is own and len(prompts.contexts.get(context, ())) == len(contexts[context]):
                adapt.kept[context] = adapted  # its turn comes
            adapter = adapted.adapter
        elif adapts and isinstance(adapt, SavedAdapters) and data is own:
            adapter = adapt(context).adapter  # a saved one
        few = ids[:TASKS]
        texts += [
            Text(prompt, answer, adapter)
            for prompt, answer in zip(few, answers(pair, few, settings.tokens), strict=True)
        ]
    if not texts:
        expected = "prompts that leave room for new tokens"
        raise InputError("model.match_controls", expected=expected, received="none", hint="lower model.max_new_tokens")
    return texts


def _file(path: str) -> Path:
    """Where scales are kept: in a run's folder, or the file itself."""
    place = Path(path).expanduser()
    return place / FILE if place.is_dir() else place


def saved(file: Path, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """What an earlier run found, for the same controls."""
    argument, hint = "model.match_controls.scales", f"name a run's folder, or its {FILE}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            argument, expected="scales of an earlier run", received=f"{file}: {error}", hint=hint
        ) from error
    settings = {arm.name: arm.settings() for arm in arms}
    controls = guided_controls(arms)
    for name in controls:
        if name not in found or found[name]["settings"] != json.loads(json.dumps(settings[name])):
            received = "other settings" if name in found else f"none: it has {', '.join(found) or 'no control'}"
            raise InputError(argument, expected=f"a scale for arm {name}", received=f"{file}: {received}", hint=hint)
    return {name: found[name] for name in controls}


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Keeps what was found in the run folder, where a resumed run and the other ranks read it."""
    with whole_files(folder, FILE) as scratch:
        (scratch / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def calibration_data(path: str) -> TaskData:
    """The tasks of a file: chats, with contexts where the rows name them, or prompts."""
    first = next(iter(read_rows(Path(path))), None)
    chat = first is not None and first.value.get("messages") is not None
    return ContextsData(path) if chat else PromptsData(path)


def wait_for(folder: Path, seconds: float = 86400.0) -> None:
    """Until rank 0 has written what it found."""
    until = time.monotonic() + seconds
    while not (folder / FILE).is_file():
        if time.monotonic() > until:
            expected = f"scales of rank 0 within {seconds / 3600:g} h"
            raise InputError("model.match_controls", expected=expected, received="none", hint="look at rank 0's output")
        time.sleep(POLL)


def refuse_clbench(data: Any, accepted: bool) -> None:
    """CL-bench's rows may not be calibrated on."""
    if getattr(data, "is_clbench", False) and not accepted:
        raise InputError(
            "model.match_controls",
            expected="other rows to find the controls' scales on",
            received=f"CL-bench's. {CLBENCH}",
            hint="name a file of other contexts in model.match_controls.data, an earlier run's scales in "
            "model.match_controls.scales, or set the controls' readout.scale and leave model.match_controls out",
        )
