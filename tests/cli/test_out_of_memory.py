"""A group that does not fit the memory is halved in place, for all arms alike; a resumed run repeats that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Config, Dgd, check_error, predictions
from torch import Tensor

from dgd_lightning import run_folder
from dgd_lightning.decode.call import Call
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.pair import Pair

ARMS = [{"name": "plain", "method": "Autoregressive"}, {"name": "fast", "method": "Speculative"}]


class SmallDevice:
    """Memory for so many prompts at a time, as far as speculative decoding goes; notes how many came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.seen = most, []  # type: int, list[int]
        generate = Speculative.generate

        def counted(method: Speculative, pair: Pair, prompts: Sequence[Tensor], call: Call) -> Any:
            if len(prompts) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate 2.00 GiB")
            self.seen.append(len(prompts))
            return generate(method, pair, prompts, call)

        monkeypatch.setattr(Speculative, "generate", counted)


def folder_of(tmp_path: Path, version: int) -> Path:
    return tmp_path / "logs" / "run" / f"version_{version}"


def test_a_group_is_halved_for_all_arms(
    config: Config, dgd: Dgd, contexts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config({"arms": ARMS, "max_new_tokens": 8}, {"path": str(contexts), "batch_size": 4})
    assert dgd("predict", "--config", path).code == 0
    whole = predictions(folder_of(tmp_path, 0))
    device = SmallDevice(monkeypatch, most=1)
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err
    assert "out of memory with 4 tasks together: going on with 2, for all arms alike" in run.out
    assert set(device.seen) == {1}
    halved = predictions(folder_of(tmp_path, 1))
    assert {row["dgd"].pop("tasks_together") for row in halved} == {1}  # every arm's rows
    for row in (*whole, *halved):
        row["dgd"].pop("batch_tokens")
    assert halved == whole

    # A resumed run decodes a group as its rows say, whatever fits now.
    folder = folder_of(tmp_path, 1)
    lines = (folder / run_folder.PREDICTIONS).read_text().splitlines(keepends=True)
    (folder / "DONE").unlink()
    (folder / run_folder.PREDICTIONS).unlink()
    run_folder.shard(folder, 0).write_text("".join(lines[:3]))
    device.most = 9
    device.seen.clear()
    assert dgd("predict", "--config", path).code == 0
    assert device.seen[:4] == [1, 1, 1, 1]
    again = predictions(folder)
    assert [row["model_output"] for row in again] == [row["model_output"] for row in whole]

    device.most = 0
    check_error(dgd("predict", "--config", path), "task t0-0", "fits the device's memory", "out of memory")
