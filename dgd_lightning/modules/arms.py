"""Arms: a method with sampling and adaptation, under a name; which share a batch, and what their readouts need.

Second models that readouts name are pinned and loaded once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.decode.nested import changed, held, nested, readout_key
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.readouts.other_model import OtherModel
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.methods.base import Method
from dgd_lightning.pair import Pair
from dgd_lightning.target.folder import bundled, resolve_commit
from dgd_lightning.target.load import load_target
from dgd_lightning.target.model import Target


@dataclass
class Arm:
    """One way to decode every task.

    Args:
        name: of its rows, curves and table line.
        method: ``Autoregressive``, ``Speculative``, ``Guided``, ``Rerank``, or the class path of a method of your own;
            with settings: ``{class_path: Guided, init_args: {beta: 0.3}}``.
        temperature: 0 for greedy decoding.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the smallest set of likeliest tokens with this mass only.
        ttt: draft with the adapter of the task's context (``model.ttt`` says how it is made, ``model.adapters`` where
            saved ones are).
        online_every: go on adapting while a task is decoded, every so many tokens, two steps of ``model.ttt`` each,
            from the context's adapter where ``ttt`` is on; None does not. Tasks are then decoded one at a time.
    """

    name: str
    method: Method
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ttt: bool = False
    online_every: int | None = None

    @property
    def adapts(self) -> bool:
        """Whether its draft is trained on the context, while it decodes, or both."""
        return self.ttt or self.online_every is not None

    def sampling(self) -> dict[str, Any]:
        """The settings that shape the distribution of the output, whatever the method."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def settings(self) -> dict[str, Any]:
        """All that distinguishes the arm, its name apart, as its rows have it."""
        method = {"method": self.method.name, "settings": self.method.settings()}
        facts = {"lossless": self.method.lossless, "baseline": self.method.baseline, "blends": self.method.blends}
        return {**method, **facts, **self.sampling(), "ttt": self.ttt, "online_every": self.online_every}

    def describe(self) -> str:
        """What was resolved, in one line: ``guided: Guided, beta 0.3, readout draft; greedy; ttt``."""
        given = unusual(self.method)
        names = [name for name in self.method.settings() if name in given or name == "readout"]
        words = [f"{name} {in_words(getattr(self.method, name))}" for name in names]
        drawn = [f"{name} {value:g}" for name, value in self.sampling().items() if value]
        more = ["ttt"] * self.ttt
        if self.online_every is not None:
            more.append(f"adapts every {self.online_every} tokens")
        return f"{self.name}: " + "; ".join(
            [", ".join([self.method.name, *words]), ", ".join(drawn) or self.method.drawn_from or "greedy", *more]
        )

    def check(self) -> None:
        """Refuses sampling, adaptation or a setting of the method that can't be; errors name it as the arm does."""
        if not isinstance(self.method, Method) or not is_dataclass(self.method):
            raise InputError(
                "method",
                expected="a method, a frozen dataclass on Method such as Guided(0.3)",
                received=repr(self.method),
                hint="name its class: {class_path: Guided, init_args: {beta: 0.3}}",
            )
        check_integer("online_every", self.online_every, optional=True, hint="use e.g. 64")
        if self.adapts and not self.method.uses_draft:
            raise InputError(
                "ttt" if self.ttt else "online_every",
                expected=f"no adaptation: {self.method.name} uses no draft",
                received=f"ttt {self.ttt}, online_every {self.online_every}",
                hint="set it to false" if self.ttt else LEAVE_OUT,
            )
        if self.online_every is not None and not self.method.online:
            raise InputError(
                "online_every",
                expected=f"null: {self.method.name} needs a draft that stays the same while it decodes",
                received=self.online_every,
                hint=f"{LEAVE_OUT}; ttt: true adapts before decoding",
            )
        self.method.check_sampling(sampling_params(**self.sampling()))
        self.method.check_arm(self.temperature)


def unusual(holder: Any) -> dict[str, Any]:
    """Fields of a dataclass that are not the class's own defaults."""
    values = {}
    for field in fields(holder):
        usual = field.default if field.default_factory is MISSING else field.default_factory()
        if (value := getattr(holder, field.name)) != usual:
            values[field.name] = value
    return values


def in_words(value: Any) -> str:
    """A setting as a person would write it: ``LogitLens(layer=3)``, ``draft``."""
    if value == DraftReadout():
        return "draft"
    if not is_dataclass(value):
        return str(value)
    inner = ", ".join(f"{name}={in_words(one)}" for name, one in unusual(value).items())
    return type(value).__name__ + (f"({inner})" if inner else "")


def check_arms(arms: Sequence[Arm], draft: str | None) -> None:
    """Refuses arms that share a name, lack what their method needs, or sample in an impossible way."""
    names = [arm.name for arm in arms]
    if not arms:
        raise InputError("model.arms", expected="at least one arm", received="none", hint="see docs/methods.md")
    if len(set(names)) != len(names):
        raise InputError("model.arms", expected="a name of its own for each", received=names, hint="rename one")
    for arm in arms:
        try:
            arm.check()
        except InputError as error:
            raise error.named(f"model.arms[{arm.name}].{error.argument}") from error
        if draft is None and (arm.method.needs_draft or arm.adapts):
            raise InputError(
                "model.draft",
                expected=f"a draft, for arm {arm.name!r}",
                received="null",
                hint="name one, or drop the arm",
            )


def check_ttt(arms: Sequence[Arm], adapts: bool, saved: bool = False) -> None:
    """Refuses arms that ask for adapters where nothing makes them, and the other way round.

    ``adapts``: `model.ttt` makes them; ``saved``: they are those of `model.adapters`.
    """
    asking, online = (any(getattr(arm, name) for arm in arms) for name in ("adapts", "online_every"))
    if saved and (adapts or online):
        why = "model.ttt, which makes its own" if adapts else "an arm with online_every, which needs model.ttt"
        hint = "leave one of them out (on a command line: null)"
        raise InputError("model.adapters", expected=f"null beside {why}", received="a folder", hint=hint)
    if asking is not (adapts or saved):
        makers = "settings of test-time training (or model.adapters)"
        raise InputError(
            "model.adapters" if saved else "model.ttt",
            expected=f"{makers}: arms with ttt: true or online_every ask for them"
            if asking
            else "an arm with ttt: true or online_every to use them",
            received="null" if asking else f"arms {', '.join(arm.name for arm in arms)} without it",
            hint="set model.ttt, e.g. {steps: 10}" if asking else f"set ttt: true in an arm, or {LEAVE_OUT}",
        )


def check_on_pair(arms: Sequence[Arm], pair: Pair) -> None:
    """Refuses arms whose blocks are longer than those the draft was trained with, and readouts of layers that the
    target has not; errors name the arm and the readout in it."""

    def check(holder: Any, place: str) -> None:
        try:
            if isinstance(holder, Method):
                holder.block(pair)
            holder.layers(pair)  # those of the readouts that it uses
        except InputError as error:
            for name, readout in held(holder).items():
                check(readout, f"{place}.{name}")
            field = error.argument.rpartition(".")[2] if isinstance(holder, Readout) else error.argument
            raise error.named(f"{place}.{field}") from error

    for arm in arms:
        check(arm.method, f"model.arms[{arm.name}].method")


def control_of(arms: Sequence[Arm]) -> dict[str, str]:
    """By name of a null control, the arm it controls: it differs in the readout that the control imitates, alone."""
    found = {}
    for arm in arms:
        if (original := arm.method.controls()) is None:
            continue
        wanted = replace(arm, name="", method=original)
        twin = next((other for other in arms if replace(other, name="") == wanted), None)
        if twin is not None:
            found[arm.name] = twin.name
    return found


def described(arms: Sequence[Arm]) -> list[str]:
    """A line per arm, and one for each null control that controls none of these arms."""
    originals = {arm.name: arm.method.controls() for arm in arms}
    loose = [
        f"arm {name} is the null control of no arm here: none has {original.name} with the readout that it imitates, "
        "and is else alike"
        for name, original in originals.items()
        if original is not None and name not in control_of(arms)
    ]
    return [*(f"arm {arm.describe()}" for arm in arms), *loose]


def joined(arms: Sequence[Arm], join: bool) -> list[list[Arm]]:
    """Arms that are decoded in one batch, in the order of the first of each: without ``join`` every arm by itself.

    They draw and adapt alike, and their methods say that they can share a batch.
    """
    groups: dict[Any, list[Arm]] = {}
    for arm in arms:
        key = arm.method.join_key() if join else None
        alike = arm.name if key is None else (key, *arm.sampling().values(), arm.ttt, arm.online_every)
        groups.setdefault(alike, []).append(arm)
    return list(groups.values())


def row_seed(seed: int, idx: str, arm: Arm) -> int:
    """A 63-bit seed of a task: it depends on the run's seed, the task and the sampling, not on batch, rank or order."""
    text = json.dumps([seed, idx, arm.sampling()], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class Source(NamedTuple):
    """Where a second model comes from."""

    model: str  # folder or Hub id
    revision: str | None


def _source(readout: Any) -> Source | None:
    """Of a readout that names a model."""
    named = isinstance(readout, OtherModel) and isinstance(readout.model, str)
    return Source(bundled(readout.model, "target"), readout.revision) if named else None


def pinned_models(arms: Sequence[Arm]) -> dict[Source, str | None]:
    """The second models that arms name, each with its commit, or None for a folder."""
    commits: dict[Source, str | None] = {}
    for arm in arms:
        for one in nested(arm.method):
            source, where = _source(one), f"model.arms[{arm.name}].method.readout"
            if source is not None and source not in commits:
                commits[source] = resolve_commit(f"{where}.model", *source, setting=f"{where}.revision")
    return commits


def loaded_methods(arms: Sequence[Arm], commits: Mapping[Source, str | None], like: Target) -> dict[str, Method]:
    """The arms' methods by name, their second models loaded with the target's dtype on its device.

    Equal readouts become one object, which shares forwards.
    """
    models: dict[Source | None, Target] = {}
    for source, commit in commits.items():
        try:
            models[source] = load_target(source.model, dtype=like.dtype, device=like.device, revision=commit)
        except InputError as error:
            raise error.named(error.argument.replace("target", f"readout.model {source.model}", 1)) from error
    known: dict[Any, Readout] = {}

    def change(one: Any) -> Any:
        one = replace(one, model=models[source]) if (source := _source(one)) else one
        return known.setdefault(readout_key(one), one) if isinstance(one, Readout) else one

    return {arm.name: changed(arm.method, change) for arm in arms}


def leaves_out_context(method: Method) -> bool:
    """Whether a method's readout wants prompts without their contexts, and has none."""
    return any(isinstance(one, WithoutContext) and not one.prompts for one in nested(method))


def with_prompts(methods: Sequence[Method], prompts: Sequence[Tensor]) -> list[Method]:
    """Methods with the prompts [S'] of a batch without their contexts, for readouts that have none of their own.

    What was one readout stays one.
    """
    known: dict[int, Readout] = {}

    def change(one: Any) -> Any:
        if isinstance(one, WithoutContext) and not one.prompts:
            return known.setdefault(id(one), replace(one, prompts=prompts))
        return one

    return [changed(method, change) for method in methods]
