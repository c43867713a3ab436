"""Run folders and per-arm numbers, without a model."""

from __future__ import annotations

import fcntl
import json
import random
import subprocess
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from dgd_lightning import run_folder
from dgd_lightning.analysis.arms import ArmStats, collect, speed_up
from dgd_lightning.callbacks.clbench_scorer import CLBenchScorer
from dgd_lightning.callbacks.progress import FitProgress
from dgd_lightning.callbacks.provenance import Provenance, git_state
from dgd_lightning.callbacks.rows import PredictionWriter
from dgd_lightning.errors import InputError
from dgd_lightning.jsonl import JsonLines
from dgd_lightning.report.figures import acceptance_figure
from dgd_lightning.report.run_tables import bar_line, decoding_table, histogram_tables, notes
from dgd_lightning.types import Summary


def line(idx: str, arm: str = "a", **more: Any) -> dict[str, Any]:
    return {"idx": idx, "model_output": "é\n\ud800", "dgd": {"arm": arm, **more}}


def fill(folder: Path, rank: int, rows: list[dict[str, Any]], torn: bytes = b"") -> None:
    with closing(JsonLines(run_folder.shard(folder, rank))) as file:
        file.append(rows)
    with run_folder.shard(folder, rank).open("ab") as raw:
        raw.write(torn)


ORDER = [(f"t{i}", arm) for i in range(4) for arm in ("a", "b")]


def test_merge_depends_on_rows_alone(tmp_path: Path) -> None:
    rows, results = [line(idx, arm) for idx, arm in ORDER], set()
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        (folder / ".writing-killed").mkdir(parents=True)  # what a merge left that was killed
        shuffled = random.Random(ranks).sample(rows, len(rows))
        for rank in range(ranks):
            fill(folder, rank, shuffled[rank::ranks] + shuffled[:1], torn=b'{"idx": "t9", "dg')
        for _ in range(2):  # again: idempotent, also after the shards have gone
            assert run_folder.merge(folder, ORDER) == len(ORDER)
            results.add((folder / "predictions.jsonl").read_bytes())
            run_folder.finish(folder)
    assert len(results) == 1
    assert [run_folder.key(row) for row in run_folder.read_predictions(folder)] == ORDER
    assert sorted(path.name for path in folder.iterdir()) == ["DONE", "predictions.jsonl"]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"idx": "x"' + b"y" * 200_000, '{"idx": "é'.encode()[:-1]])
def test_torn_line_is_cut_before_appending(tmp_path: Path, torn: bytes) -> None:
    fill(tmp_path, 0, [line("t0")], torn)
    fill(tmp_path, 0, [line("t1")])
    assert [row["idx"] for _, row in run_folder.read_rows(run_folder.shard(tmp_path, 0))] == ["t0", "t1"]


def test_torn_first_line(tmp_path: Path) -> None:
    run_folder.shard(tmp_path, 0).write_bytes(b'{"idx"')
    fill(tmp_path, 0, [line("t1")])
    assert [row["idx"] for _, row in run_folder.read_rows(run_folder.shard(tmp_path, 0))] == ["t1"]


def test_broken_line_in_the_middle_is_told(tmp_path: Path) -> None:
    run_folder.shard(tmp_path, 0).write_text("{}\n" + json.dumps(line("t0")) + "\n")
    with pytest.raises(InputError, match=r"rank0\.jsonl line 1"):
        run_folder.index(tmp_path)


def version(root: Path, number: int, config_hash: str, *, done: bool = False) -> Path:
    folder = root / f"version_{number}"
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"config_hash": config_hash}))
    run_folder.shard(folder, 0).touch()
    if done:
        (folder / "DONE").touch()
    return folder


def test_choice_of_version(tmp_path: Path) -> None:
    assert run_folder.choose_version(tmp_path, "x") == 0
    version(tmp_path, 2, "x")
    version(tmp_path, 9, "x", done=True)
    busy = version(tmp_path, 10, "x")
    version(tmp_path, 11, "y")
    (tmp_path / "version_12").mkdir()  # killed before it wrote anything
    assert run_folder.choose_version(tmp_path, "y") == 11
    assert run_folder.choose_version(tmp_path, "z") == 13
    assert run_folder.choose_version(tmp_path, None) == 14
    assert run_folder.choose_version(tmp_path, "x") == 10
    with run_folder.shard(busy, 0).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_folder.choose_version(tmp_path, "x") == 2


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both list the folders before either has made its own."""
    version(tmp_path, 0, "x", done=True)
    before = list(tmp_path.glob("version_*"))
    monkeypatch.setattr(Path, "glob", lambda *_: before)
    assert [run_folder.choose_version(tmp_path, name) for name in ("y", "z", "y")] == [1, 2, 3]


@pytest.mark.parametrize("more", ["nothing", "a row", "a checkpoint"])
def test_only_a_mere_start_is_discarded(tmp_path: Path, more: str) -> None:
    folder = version(tmp_path, 0, "x")
    for name in ("config.yaml", "hparams.yaml", "events.out.tfevents.1.host.2.0"):
        (folder / name).write_text("written by every start")
    if more == "a row":
        fill(folder, 1, [line("t0")])
    elif more == "a checkpoint":
        (folder / "checkpoints").mkdir()
    before = sorted(folder.iterdir())
    run_folder.discard_start(folder)
    assert (sorted(folder.iterdir()) if folder.exists() else None) == (None if more == "nothing" else before)


def test_provenance_of_another_configuration_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"config_hash": "0", "sessions": []}))
    before = (tmp_path / "provenance.json").read_bytes()
    ours = SimpleNamespace(fingerprint=lambda: "ours")
    trainer = SimpleNamespace(log_dir=str(tmp_path), is_global_zero=True, datamodule=ours, world_size=1, strategy=None)
    with pytest.raises(InputError, match=r"^logs_dir: expected a run folder of configuration .* that of 0"):
        Provenance().setup(trainer, ours, "predict")  # type: ignore[arg-type]
    assert (tmp_path / "provenance.json").read_bytes() == before


def test_git_state_of_a_package_that_the_repository_does_not_track(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y.z"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / ".venv" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert git_state(package) is None
    git("init")
    git("commit", "--allow-empty", "-m", "of another project")
    assert git_state(package) is None
    git("add", ".venv")
    git("commit", "-m", "tracked")
    assert (git_state(package) or {})["diff_hash"] == "clean"


def decoded(idx: str, arm: str, lengths: list[int], seconds: float, batch_tokens: int, **more: Any) -> dict[str, Any]:
    record = {
        "baseline": False,
        "lossless": True,
        "blends": False,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "block_size": 4,
        "acceptance_lengths": lengths,
        "verified_lengths": lengths,
        "tokens": sum(lengths) + 1,
        "decoded_tokens": sum(lengths),
        "batch_tokens": batch_tokens,
        "decode_seconds": seconds,
        **more,
    }
    return line(idx, arm, **record)


def test_speed_up_counts_common_tasks_and_shares_a_groups_seconds() -> None:
    stats: dict[str, ArmStats] = {}
    plain: dict[str, Any] = {"baseline": True, "block_size": None}
    for row in (
        decoded("1", "ar", [1] * 6, 2.0, 8, **plain),  # one group of two rows: 8 tokens in 2 s
        decoded("2", "ar", [1] * 2, 2.0, 8, **plain),
        decoded("1", "dflash", [3, 3], 0.5, 8),  # 8 tokens in 0.5 s
        decoded("2", "dflash", [2], 0.5, 8),
        decoded("3", "dflash", [1], 50.0, 1),  # not decoded by the baseline: not compared
        decoded("1", "warm", [3, 3], 0.5, 6, temperature=1.0),
        {"idx": "4", "model_output": None, "dgd": {**decoded("4", "dflash", [], 0, 0)["dgd"], "skipped": "too long"}},
    ):
        collect(stats, row)
    assert stats["ar"].tokens_per_second == pytest.approx(4)
    assert speed_up(stats["dflash"], stats) == pytest.approx(4)
    assert speed_up(stats["ar"], stats) == pytest.approx(1)
    assert speed_up(stats["warm"], stats) != speed_up(stats["warm"], stats)  # NaN: no baseline at its temperature
    cut = [decoded("1", "cut", [3, 3], 0.5, 6, top_k=5), decoded("1", "cut-ar", [1] * 6, 2.0, 6, top_k=5, **plain)]
    for row in cut:
        collect(stats, row)
    assert speed_up(stats["cut"], stats) == pytest.approx(4)  # its own baseline, not the one without top_k
    assert speed_up(stats["dflash"], stats) == pytest.approx(4)
    assert stats["dflash"].tau == pytest.approx((9 / 4, (3 + 2 + 1) / 3))
    assert stats["dflash"].histogram.tolist() == [0, 1, 1, 2, 0]
    assert (stats["dflash"].tasks, stats["dflash"].skipped) == (3, 1)
    assert decoding_table(stats, 4).row_count == 5
    assert acceptance_figure([stats["dflash"]]).axes[0].lines


def test_arms_that_shared_a_batch_have_no_speed_of_their_own() -> None:
    stats: dict[str, ArmStats] = {}
    plain: dict[str, Any] = {"baseline": True, "block_size": None}
    guided: dict[str, Any] = {"lossless": False, "blends": True}
    for row in (
        decoded("1", "ar", [1] * 6, 3.0, 6, **plain),
        decoded("1", "a", [3, 3], 0.5, 10, joined_with=["b"], **guided),  # 10 tokens in 0.5 s, of both arms
        decoded("1", "b", [2, 2], 0.5, 10, joined_with=["a"], **guided),
        decoded("2", "a", [4], 0.25, 8, joined_with=["b"], **guided),
        decoded("2", "b", [4], 0.25, 8, joined_with=["a"], **guided),
        decoded("1", "alone", [3, 3], 0.5, 6, **guided),
    ):
        collect(stats, row)
    assert str(stats["a"].tokens_per_second) == str(speed_up(stats["a"], stats)) == "nan"
    assert stats["a"].tau.micro == pytest.approx(10 / 3)
    assert stats["alone"].tokens_per_second == pytest.approx(12)
    assert speed_up(stats["alone"], stats) == pytest.approx(6)
    columns = {str(column.header): list(column.cells) for column in decoding_table(stats, 2).columns}
    assert columns["tokens/s"] == ["2.0", "–", "–", "12.0"]
    assert columns["speed-up"] == ["1.00×", "–", "–", "6.00×"]
    (note,) = notes(stats)
    assert "2 arms were decoded together, 18 tokens in 0.8 s (24.0 tokens/s)" in str(note)
    assert notes({"ar": stats["ar"], "alone": stats["alone"]}) == []


def test_a_chosen_answer_costs_all_answers_and_the_choice() -> None:
    stats: dict[str, ArmStats] = {}
    answers = [{"tokens": 7}, {"tokens": 5}, {"tokens": 3}]  # the first of each comes with the prefill
    for row in (
        decoded("1", "ar", [1] * 4, 1.0, 4, baseline=True, block_size=None),
        # Its batch committed 24 tokens in 4 s: 12 for this row's answers, 12 for another's.
        decoded("1", "best", [2, 2], 4.0, 24, decoded_tokens=12, answers=answers, chosen=1, rank_seconds=0.5),
    ):
        collect(stats, row)
    assert stats["best"].tokens_per_second == pytest.approx(4 / (2 + 0.5))
    assert speed_up(stats["best"], stats) == pytest.approx(4 / 2.5 / 4)
    assert (stats["best"].tokens, stats["best"].tau.micro) == (5, 2)
    (note,) = notes(stats)
    assert "best: τ and tokens are those of the chosen answers; tokens/s counts the time of all" in str(note)


def test_bar_line() -> None:
    assert bar_line([1.0, 0.5, 0.01, 0.0, float("nan")]) == "█▄▁ ·"


def test_speed_up_does_not_depend_on_the_order_of_rows() -> None:
    rows = [
        decoded(str(i), arm, [1 + i % 3] * i, 1.0 + i * (arm == "ar"), 3 * i, baseline=arm == "ar")
        for i in range(1, 8)
        for arm in ("ar", "dflash")
        if (i, arm) not in ((2, "ar"), (5, "dflash"))
    ]
    ratios = set()
    for seed in range(5):
        stats: dict[str, ArmStats] = {}
        for row in random.Random(seed).sample(rows, len(rows)):
            collect(stats, row)
        ratios.add(round(speed_up(stats["dflash"], stats), 9))
    common = [i for i in range(1, 8) if i not in (2, 5)]

    def speed(arm: str) -> float:  # the slow way: over all rows at once
        records = [row["dgd"] for row in rows if row["dgd"]["arm"] == arm and int(row["idx"]) in common]
        tokens = [sum(record["acceptance_lengths"]) for record in records]
        seconds = [r["decode_seconds"] * n / r["batch_tokens"] for r, n in zip(records, tokens, strict=True)]
        return sum(tokens) / sum(seconds)

    assert ratios == {round(speed("dflash") / speed("ar"), 9)}


def test_printed_histogram_counts_verifications() -> None:
    stats: dict[str, ArmStats] = {}
    for arm, lengths in (("plain", [1, 1]), ("drafted", [1, 1, 3, 4])):
        collect(stats, decoded("t", arm, lengths, 1.0, sum(lengths), block_size=None if arm == "plain" else 4))
    (table,) = histogram_tables(stats)
    assert [list(column.cells) for column in table.columns] == [["drafted"], ["50%"], ["0%"], ["25%"], ["25%"]]
    assert histogram_tables({"plain": stats["plain"]}) == []


def test_scorer_leaves_rows_that_it_cannot_grade(tmp_path: Path) -> None:
    check = {"type": "contains", "value": "red"}
    lab = {"checks": [check], "prior": "novel", "prior_answer": None}
    metadata = [None, "a lab", 5, {"lab": None}, {"lab": "checks"}, {"lab": {}}, {"lab": lab, "context_category": "A"}]
    rows = [
        {"idx": str(i), "rubrics": ["It is red."], "metadata": value, "model_output": "red", "dgd": {"arm": "a"}}
        for i, value in enumerate(metadata)
    ]
    rows.append({"idx": "bare", "metadata": {}, "model_output": "red", "dgd": {"arm": "a"}})
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = PredictionWriter()
    writer.folder = tmp_path
    trainer = SimpleNamespace(callbacks=[writer], is_global_zero=True, logger=None)
    module = SimpleNamespace(summary=Summary())
    CLBenchScorer().on_predict_end(trainer, module)  # type: ignore[arg-type]
    (table,), (judged, bare) = module.summary.details, module.summary.pointers
    assert judged == f"answers not graded for want of a judge or a sandbox (dgd score {tmp_path}): 6"
    assert bare == "answers not graded for want of fields that a grader reads: 1"
    assert module.summary.cells == {"a": {"solved": "100.0%"}}
    assert [list(column.cells) for column in table.columns] == [["a"], ["100.0%\n1/1"], ["100.0%\n1/1"]]


class Halving(L.LightningModule):
    """A loss that is known at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.weight.square().sum()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.weight.square().sum(), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)  # w ← w / 2, loss ← loss / 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line_every", [0.0, 1000.0])
def test_fit_progress_in_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path, line_every: float) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    progress = FitProgress(line_every)
    trainer = L.Trainer(
        max_steps=4, val_check_interval=2, accumulate_grad_batches=2, callbacks=[progress], default_root_dir=tmp_path,
        **quiet,
    )  # fmt: skip
    module, loader = Halving(), DataLoader(torch.zeros(8))
    trainer.fit(module, loader, loader)
    lines = capsys.readouterr().out.splitlines()
    training = [line for line in lines if line.startswith("training: ")]
    assert [line.split(",")[0] for line in training] == [
        f"training: step {step}/4" for step in ((1, 2, 3, 4) if line_every == 0 else (4,))
    ]
    assert ", train/loss 0.01562, " in training[-1]
    assert training[-1].endswith(" s/step, about 0 s left")
    validated = [line for line in lines if line.startswith("validation at step ")]
    assert [line.split(",")[0] for line in validated] == [f"validation at step {step}" for step in (1, 2, 3, 4)]
    assert "val/loss 0.003906" in validated[-1]
    assert any(line == "validating: batch 8/8" for line in lines) is (line_every == 0)
    trainer.test(module, loader, verbose=False)
    assert ("testing: batch 8/8" in capsys.readouterr().out) is (line_every == 0)
