"""Null controls at work: nothing in their cycles waits for the device."""

from __future__ import annotations

import pytest
from decode_tools import random_prompts
from guided_tools import readout_of
from host_waits import HostWaits
from tiny import make_pair

from dgd_lightning.decode.call import Progress
from dgd_lightning.methods.guided import guided_generate


@pytest.mark.parametrize("name", ["noise", "entropy", "random", "shuffled", "draft", "ablated"])
def test_a_cycle_synchronises_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = make_pair(block_size=4), random_prompts(3, seed=8)
    readout = readout_of(name, pair, prompts)

    def waits(new: int) -> list[str]:
        """All waits of one run but the ones that are allowed, one per cycle."""
        cycles: list[Progress] = []
        with monkeypatch.context() as patches, HostWaits(patches) as host:
            guided_generate(
                pair, prompts, beta=0.5, readout=readout, max_new_tokens=new, seed=0, on_progress=cycles.append
            )
        assert host.synchronised == len(cycles) > new // 4
        return host.seen

    assert waits(24) == waits(8)  # whatever else waits does so once per call, not per cycle
