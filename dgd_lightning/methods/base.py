"""`Method`: the base class of all ways to decode. A new one is a frozen dataclass that writes `generate`."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.call import Call
from dgd_lightning.decode.nested import held, nested, plain
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.sampling import SamplingParams
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput, RankedAnswer


class Guidance(NamedTuple):
    """A readout and how it is blended with the target."""

    blend: Blend
    readout: Readout | str = "draft"


class Method(ABC):
    """A way to decode: a frozen dataclass whose fields are its settings, checked in ``__post_init__``.

    Only `generate` must be written. Readouts among the fields are found by themselves: a run loads the second models
    that they name, and an arm whose readout is a null control is paired with the arm whose readout it imitates.

    Attributes:
        lossless: answers have the target's own distribution.
        baseline: speed-ups of other arms may refer to it.
        online: the draft may be changed between its cycles (``Call.cycle_hook``).
        drawn_from: what answers are drawn from, in words, where an arm's temperature does not say it.
    """

    # Not annotated: annotated names are fields, and jsonargparse evaluates annotations in the subclass's module.
    lossless = False
    baseline = False
    online = False
    drawn_from = ""

    @abstractmethod
    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        """Outputs of a batch of prompts [S], in their order; an `InputError` where something can't serve it."""

    @property
    def blends(self) -> bool:
        """Whether answers come from the target blended with a readout."""
        return False

    def block(self, pair: Pair) -> int | None:
        """K of the blocks that are proposed; None where tokens come one by one."""
        return None

    @property
    def uses_draft(self) -> bool:
        """Whether a draft, where there is one, takes part: then it can be adapted."""
        return self.needs_draft

    @property
    def needs_draft(self) -> bool:
        """Whether a draft must be there."""
        return any(getattr(one, "needs_draft", False) for one in nested(self) if one is not self)

    def layers(self, pair: Pair) -> tuple[int, ...]:
        """Layers of the target whose outputs it needs, from prefix caches too: those of `block` and of its readouts."""
        layers = [] if self.block(pair) is None or pair.draft is None else list(pair.draft.config.target_layer_ids)
        for readout in held(self).values():
            layers += readout.layers(pair)
        return tuple(dict.fromkeys(layers))

    def check_arm(self, temperature: float) -> None:  # noqa: B027
        """Refuse, by an `InputError`, settings or a temperature that do not suit an arm of a run."""

    def check_sampling(self, sampling: SamplingParams) -> None:  # noqa: B027
        """Refuse, by an `InputError` that names it, a temperature or a filter that the method can't have."""

    def settings(self) -> dict[str, Any]:
        """What distinguishes it from others of its class, as YAML would have it: rows and hashes have it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: "draft" if value == DraftReadout() else plain(value) for name, value in values.items()}

    @property
    def name(self) -> str:
        """Its class's name; the class path of one that is not the package's own."""
        kind = type(self)
        own = kind.__module__.startswith("dgd_lightning.methods.")
        return kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"

    def record(self, output: DecodeOutput) -> dict[str, Any]:
        """What a row says of an answer beside what all rows say; JSON-able."""
        return {}

    def controls(self) -> "Method | None":
        """The method whose null control this one is; None where it is none."""
        for name, readout in held(self).items() if self.blends else ():
            original = getattr(readout, "controls", lambda: None)()  # a user's own readout may lack it
            if original is not None:
                return replace(self, **{name: original})  # type: ignore[type-var]
        return None

    def join_key(self) -> Hashable | None:
        """Methods of equal keys can decode in one batch (`generate_together`); None: this one can't."""
        return None

    def generate_together(
        self, pair: Pair, prompts: Sequence[Tensor], methods: Sequence[Any], call: Call
    ) -> list[list[DecodeOutput]]:
        """Outputs of each of the methods, all of this one's `join_key`."""
        return [method.generate(pair, prompts, call) for method in methods]

    def guidance_of(self, record: dict[str, Any]) -> Guidance | None:
        """What an answer was drawn from, by ``dgd`` of its row, for a replay; None: the target itself."""
        return None


def choose_among(
    answers: Sequence[DecodeOutput],
    chosen: int,
    *,
    scores: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    seconds: float = 0.0,
    ranking: int = 0,
) -> DecodeOutput:
    """One of several answers of a prompt, with all of them in its trace.

    Args:
        chosen: its number.
        scores: of each, the higher the better; None where the choice has none.
        betas: with which each was decoded.
        seconds: what the choice took.
        ranking: the target's forwards that it took, counted per row.
    """
    none: list[None] = [None] * len(answers)
    scored = none if scores is None else scores
    blended = none if betas is None else [float(beta) for beta in betas]
    ranked = [
        RankedAnswer(one.tokens, score, beta, one.trace.seed, one.stop_reason)
        for one, score, beta in zip(answers, scored, blended, strict=True)
    ]
    best = answers[chosen]
    spent = (
        sum(one.trace.target_forwards for one in answers) + ranking,
        sum(one.trace.draft_forwards for one in answers),
    )
    trace = best.trace._replace(answers=ranked, chosen=chosen, rank_seconds=seconds, spent=spent)
    return best._replace(trace=trace)


def check_single_beta(beta: Any) -> None:
    """Refuse an arm's list of β."""
    if not isinstance(beta, int | float):
        raise InputError("beta", expected="one number per arm", received=repr(beta), hint="make an arm for each β")


def check_unused(method: Any, names: Sequence[str], why: str, hint: str = "") -> None:
    """Refuse settings that are not their defaults, which nothing would use."""
    usual = {field.name: field.default for field in fields(method)} | {"readout": DraftReadout()}
    for name in names:
        if (value := getattr(method, name)) != usual[name]:
            default = "draft" if name == "readout" else usual[name]
            out = LEAVE_OUT if default is None else f"leave it out (on a command line: {default})"
            raise InputError(name, expected=f"nothing: {why}", received=value, hint=hint + out)
