"""What a run does for the readouts that its arms name: second models are pinned and loaded once, contexts left out.

A readout may hold others, as null controls do; every one that is a field of a dataclass is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from dgd_lightning.decode.guided import as_readout
from dgd_lightning.decode.readouts import OtherModel, Readout, WithoutContext
from dgd_lightning.errors import InputError
from dgd_lightning.modules.arms import Arm
from dgd_lightning.pair import source_fingerprint
from dgd_lightning.target.load import bundled, load_target, resolve_commit
from dgd_lightning.target.model import Target


class Source(NamedTuple):
    """Where a second model comes from."""

    model: str  # folder or Hub id
    revision: str | None


def _source(readout: Any) -> Source | None:
    """Of a readout that names a model."""
    named = isinstance(readout, OtherModel) and isinstance(readout.model, str)
    return Source(bundled(readout.model, "target"), readout.revision) if named else None


def changed(readout: Any, change: Callable[[Any], Any]) -> Any:
    """A readout after a change of it and of all that it holds, from the inside out."""
    held = {name: changed(one, change) for name, one in _held(readout).items()}
    return change(replace(readout, **held) if held else readout)


def nested(readout: Any) -> Iterator[Any]:
    """A readout and all that it holds."""
    yield readout
    for one in _held(readout).values():
        yield from nested(one)


def _held(readout: Any) -> dict[str, Any]:
    if not is_dataclass(readout):
        return {}
    values = {field.name: getattr(readout, field.name) for field in fields(readout)}
    return {name: value for name, value in values.items() if isinstance(value, Readout)}


def pinned_models(arms: Sequence[Arm]) -> dict[Source, str | None]:
    """The second models that arms name, each with its commit, or None for a folder.

    Raises:
        InputError: no such folder, Hub id or revision, or no way to reach the Hub.
    """
    commits: dict[Source, str | None] = {}
    for arm in arms:
        for one in nested(arm.readout):
            source, where = _source(one), f"model.arms[{arm.name}].readout"
            if source is not None and source not in commits:
                commits[source] = resolve_commit(f"{where}.model", *source, setting=f"{where}.revision")
    return commits


def models_fingerprint(commits: Mapping[Source, str | None]) -> list[str]:
    """A Hub id with its commit, or a folder's digest, of each."""
    return [source_fingerprint("target", source.model, commit) for source, commit in commits.items()]


def load_models(commits: Mapping[Source, str | None], like: Target) -> dict[Source, Target]:
    """The second models with the target's dtype, on its device.

    Raises:
        InputError: one can't be loaded.
    """
    models = {}
    for source, commit in commits.items():
        try:
            models[source] = load_target(source.model, dtype=like.dtype, device=like.device, revision=commit)
        except InputError as error:
            raise error.named(error.argument.replace("target", f"readout.model {source.model}", 1)) from error
    return models


def ready_readout(readout: Readout | str, models: Mapping[Source, Target]) -> Readout:
    """A readout with its second models."""

    def change(one: Any) -> Any:
        source = _source(one)
        return one if source is None else replace(one, model=models[source])

    return changed(as_readout(readout), change)


def leaves_out(readout: Readout | str) -> bool:
    """Whether a readout wants prompts without their contexts, and has none."""
    return any(isinstance(one, WithoutContext) and not one.prompts for one in nested(readout))


def with_prompts(readout: Readout, prompts: Sequence[Tensor]) -> Readout:
    """A readout with the prompts [S'] of a batch without their contexts, for those that have none."""

    def change(one: Any) -> Any:
        return replace(one, prompts=prompts) if isinstance(one, WithoutContext) and not one.prompts else one

    return changed(readout, change)
