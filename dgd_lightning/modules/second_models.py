"""What a run does for the readouts that its arms name: second models are pinned and loaded once, contexts left out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from dgd_lightning.decode.nested import changed, nested, readout_key
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.other_model import OtherModel
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Method
from dgd_lightning.modules.arms import Arm
from dgd_lightning.target.folder import bundled, resolve_commit
from dgd_lightning.target.load import load_target
from dgd_lightning.target.model import Target


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
            source, where = _source(one), f"model.arms[{arm.name}].readout"
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
