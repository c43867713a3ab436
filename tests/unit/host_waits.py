"""What makes the host wait for the device, counted: on the CPU, where tests run, nothing else would show it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dgd_lightning.decode import batch, sampling


class HostOperations(TorchDispatchMode):
    """Notes what makes the host wait: reads of single values, and operations whose result size depends on data."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "is_nonzero")

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Notes calls that bring a tensor to the host: on the CPU, where these tests run, no operation tells of them."""

    READS = ("tolist", "cpu", "numpy", "__array__", "item", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # a device object may be the target's own, which is the CPU here; a name is written out
        named = [value for value in (*args[1:], *(kwargs or {}).values()) if isinstance(value, str)]
        if name in self.READS or (name == "to" and "cpu" in named):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class HostWaits:
    """What would make the host wait for another device than the CPU inside the block.

    Calls of ``batch.to_host`` are counted by themselves.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.synchronised = 0
        to_host = batch.to_host

        def counted(values: Tensor) -> list[Any]:
            self.synchronised += 1
            before = len(self.seen)
            read = to_host(values)
            del self.seen[before:]
            return read

        monkeypatch.setattr(batch, "to_host", counted)
        monkeypatch.setattr(sampling, "asking_waits", lambda device: True)  # what is free on a CPU only is not done

    def __enter__(self) -> HostWaits:
        self.stack = ExitStack()
        self.stack.enter_context(HostOperations(self.seen))
        self.stack.enter_context(HostReads(self.seen))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
