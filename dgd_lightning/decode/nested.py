"""Readouts hold others, as null controls do: every one that is a field of a dataclass is found, and can be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from dgd_lightning.decode.readouts import Readout, WithoutContext


def nested(readout: Any) -> Iterator[Any]:
    """A readout and all that it holds."""
    yield readout
    for one in _held(readout).values():
        yield from nested(one)


def changed(readout: Any, change: Callable[[Any], Any]) -> Any:
    """A readout after a change of it and of all that it holds, from the inside out."""
    held = {name: changed(one, change) for name, one in _held(readout).items()}
    return change(replace(readout, **held) if held else readout)


def of_prompt(readout: Any, number: int) -> Any:
    """A readout for one prompt of the batch that it was made for: one of its prompts without context."""

    def change(one: Any) -> Any:
        return replace(one, prompts=one.prompts[number : number + 1]) if isinstance(one, WithoutContext) else one

    return changed(readout, change)


def _held(readout: Any) -> dict[str, Any]:
    if not is_dataclass(readout):
        return {}
    values = {field.name: getattr(readout, field.name) for field in fields(readout)}
    return {name: value for name, value in values.items() if isinstance(value, Readout)}
