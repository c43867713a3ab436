"""How ranks that need very different times end, and what a continued run says of other versions."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dgd_lightning import run_folder
from dgd_lightning.callbacks import provenance as provenance_module
from dgd_lightning.callbacks.provenance import Provenance, changed_versions
from dgd_lightning.callbacks.rows import PredictionWriter
from dgd_lightning.errors import InputError

TASKS = [SimpleNamespace(idx=f"t{number}") for number in range(4)]


class Alone:
    """A strategy that no other rank answers."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"strategy.{name}: a collective after the last context")


class Rank:
    """One rank's writer in a stand-in for the Trainer."""

    def __init__(self, folder: Path, rank: int, ranks: int = 2, merge_wait: float = 1.0) -> None:
        self.writer = PredictionWriter(merge_wait)
        data = SimpleNamespace(tasks=TASKS, fingerprint=lambda: "data")
        self.module: Any = SimpleNamespace(row_names=["a"], fingerprint=lambda: "module")
        self.trainer: Any = SimpleNamespace(
            log_dir=str(folder), global_rank=rank, world_size=ranks, is_global_zero=rank == 0, datamodule=data,
            strategy=Alone(),
        )  # fmt: skip
        self.writer.setup(self.trainer, self.module, "predict")
        del self.trainer.log_dir  # a collective too
        self.mine = TASKS[rank::ranks]

    def write(self) -> None:
        for task in self.mine:
            row = {"idx": task.idx, "model_output": "x", "dgd": {"arm": "a"}}
            self.writer.on_predict_batch_end(self.trainer, self.module, [row], None, 0)

    def end(self) -> None:
        self.writer.on_predict_epoch_end(self.trainer, self.module)


def test_rank_zero_merges_when_the_slowest_rank_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "POLL", 0.01)
    monkeypatch.setattr(run_folder, "FIRST_WORD", 0.05)
    first, second, third = (Rank(tmp_path, rank, 3) for rank in range(3))
    for rank in (first, third):
        rank.write()
    third.end()  # returns: nobody is waited for by it
    assert not (tmp_path / "predictions.jsonl").exists()
    merging = threading.Thread(target=first.end, daemon=True)
    merging.start()
    time.sleep(0.3)
    assert merging.is_alive()
    assert not (tmp_path / "predictions.jsonl").exists()
    second.write()
    second.end()
    merging.join(10)
    assert not merging.is_alive()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DONE", "predictions.jsonl"]
    assert [row["idx"] for row in run_folder.read_predictions(tmp_path)] == [task.idx for task in TASKS]
    said = capsys.readouterr().out
    assert said.startswith("waiting for the last rows of predictions.rank1.jsonl: 0.0 minutes so far")
    assert "rank2" not in said


def test_a_rank_that_never_ends_is_named_and_its_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "POLL", 0.01)
    first, second = Rank(tmp_path, 0, merge_wait=0.1 / 3600), Rank(tmp_path, 1)
    for rank in (first, second):
        rank.write()
    with pytest.raises(InputError, match=r"received none or not all in predictions\.rank1\.jsonl.*same command"):
        first.end()
    second.writer.on_exception(second.trainer, second.module, KeyboardInterrupt())
    assert len(run_folder.index(tmp_path)) == len(TASKS)
    again = Rank(tmp_path, 0, ranks=1)
    assert again.module.done == {(task.idx, "a") for task in TASKS}
    again.end()
    assert (tmp_path / "DONE").exists()


def test_a_mark_counts_for_its_own_session_and_for_what_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "POLL", 0.01)
    killed = Rank(tmp_path, 1)
    killed.write()
    killed.end()
    Rank(tmp_path, 1)  # the run goes on, and this rank may have more to do
    with pytest.raises(InputError, match=r"rank1"):
        run_folder.await_shards(tmp_path, [1], run_folder.PREDICTIONS, 0.05)
    size = run_folder.shard(tmp_path, 1).stat().st_size
    run_folder.mark(tmp_path, 1).write_text(str(size + 1))  # rows of another machine that are not here yet
    with pytest.raises(InputError, match=r"rank1"):
        run_folder.await_shards(tmp_path, [1], run_folder.PREDICTIONS, 0.05)
    run_folder.mark_whole(tmp_path, 1)
    run_folder.await_shards(tmp_path, [1], run_folder.PREDICTIONS, 0.05)


def test_a_group_that_was_halved_is_halved_again_when_the_run_goes_on(tmp_path: Path) -> None:
    killed = Rank(tmp_path, 0, ranks=1)
    row = {"idx": "t1", "model_output": "x", "dgd": {"arm": "a", "tasks_together": 2}}
    killed.writer.on_predict_batch_end(killed.trainer, killed.module, [row], None, 0)
    killed.writer.on_exception(killed.trainer, killed.module, KeyboardInterrupt())
    assert Rank(tmp_path, 0, ranks=1).module.tasks_together == {"t1": 2}


@pytest.mark.parametrize("wait", [0, -1.0, float("nan"), "long"])
def test_a_wait_that_is_none_is_refused(wait: Any) -> None:
    with pytest.raises(InputError, match=r"PredictionWriter\.merge_wait: expected a finite number above 0"):
        PredictionWriter(wait)


SESSION = {
    "python": "3.12.1",
    "versions": {"torch": "2.9.0", "lightning": "2.6.6"},
    "git": {"sha": "0123456789abcdef", "diff_hash": "clean"},
}


def test_changed_versions_are_those_of_any_earlier_session() -> None:
    other = {**SESSION, "versions": {"torch": "2.9.1", "lightning": "2.6.6"}}
    edited = {**SESSION, "git": {"sha": "0123456789abcdef", "diff_hash": "77"}}
    assert changed_versions([], SESSION) == changed_versions([SESSION, SESSION], SESSION) == []
    assert changed_versions([SESSION, other], SESSION) == ["torch 2.9.1 → 2.9.0"]
    assert changed_versions([other, SESSION], SESSION) == ["torch 2.9.1 → 2.9.0"]
    assert changed_versions([SESSION], edited) == ["git 0123456789 → 0123456789 with changes 77"]
    assert changed_versions([SESSION], {**SESSION, "git": None}) == ["git 0123456789 → None"]


def test_a_run_that_other_versions_continue_warns_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = dict(SESSION)
    monkeypatch.setattr(provenance_module, "session", lambda trainer: now)
    ours: Any = SimpleNamespace(fingerprint=lambda: "ours")
    trainer: Any = SimpleNamespace(log_dir=str(tmp_path), is_global_zero=True, datamodule=ours)
    Provenance().setup(trainer, ours, "predict")
    now = {**SESSION, "python": "3.13.0"}
    with pytest.warns(UserWarning, match=r"^[^\n]*continued by other versions[^\n]*: python 3\.12\.1 → 3\.13\.0$"):
        Provenance().setup(trainer, ours, "predict")
    assert len(json.loads((tmp_path / "provenance.json").read_text())["sessions"]) == 2
