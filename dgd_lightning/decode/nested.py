"""Readouts hold others, as null controls do, and methods hold readouts: each that is a dataclass's field is found."""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.errors import InputError
from dgd_lightning.target.model import Target


def held(holder: Any) -> dict[str, Readout]:
    """Readouts among the fields of a readout or a method, by name."""
    if not is_dataclass(holder):
        return {}
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: value for name, value in values.items() if isinstance(value, Readout)}


def nested(holder: Any) -> Iterator[Any]:
    """A readout or method, and all that it holds."""
    yield holder
    for one in held(holder).values():
        yield from nested(one)


def changed(holder: Any, change: Callable[[Any], Any]) -> Any:
    """A readout or method after a change of it and of all that it holds, from the inside out."""
    inner = {name: changed(one, change) for name, one in held(holder).items()}
    kept = all(getattr(holder, name) is one for name, one in inner.items())
    return change(holder if kept else replace(holder, **inner))


def of_prompt(readout: Any, number: int) -> Any:
    """A readout for one prompt of the batch that it was made for: one of its prompts without context."""

    def change(one: Any) -> Any:
        return replace(one, prompts=one.prompts[number : number + 1]) if isinstance(one, WithoutContext) else one

    return changed(readout, change)


def readout_key(readout: Any) -> Any:
    """Equal for equal readouts, lists in them included; of what can't be compared, for the same object only."""
    if isinstance(readout, list | tuple):
        return tuple(map(readout_key, readout))
    if is_dataclass(readout) and not isinstance(readout, type):
        return type(readout), *(readout_key(getattr(readout, field.name)) for field in fields(readout))
    return id(readout) if isinstance(readout, Tensor) or not isinstance(readout, Hashable) else readout


def plain(value: Any) -> Any:
    """A value as YAML would have it: a readout or schedule is ``{class_path, init_args}``, a tensor a digest."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=repr)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Target):
        return value.model.name_or_path
    if isinstance(value, Tensor):
        data = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        return f"{list(value.shape)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]}"
    kind = type(value)
    if not is_dataclass(value) or isinstance(value, type):
        raise InputError(
            "settings",
            expected="numbers, texts, lists, dictionaries, tensors and dataclasses, which rows can hold",
            received=f"a {kind.__module__}.{kind.__qualname__}",
            hint="make it a frozen dataclass, or name what it is made of",
        )
    inner = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": inner}
