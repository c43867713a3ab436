"""The README's first command: the whole method on the bundled pair, the tables it promises."""

from __future__ import annotations

from pathlib import Path

from cli_tools import Dgd, predictions

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TASKS = 5  # of the quickstart's, of two contexts; about ten seconds on a core


def test_quickstart(dgd: Dgd, tmp_path: Path) -> None:
    run = dgd(
        "predict", "--config", CONFIG, "--logs_dir", tmp_path,
        "--data.limit", str(TASKS), "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert run.code == 0, run.err
    folder = tmp_path / "quickstart" / "version_0"
    for word in ("speed-up", "solved", "Lossless", "Adaptation:", "tensorboard --logdir", f"run folder: {folder}"):
        assert word in run.out
    kept = (folder / "summary.txt").read_text()
    for word in ("Solve rate", "Divergence of target", "τ micro"):
        assert word in kept
        assert word not in run.out  # what nobody asked for is a file's

    assert "null control" in kept

    rows = predictions(folder)
    tokens = {arm: {row["idx"]: row["dgd"]["output_ids"] for row in rows if row["dgd"]["arm"] == arm}
              for arm in ("autoregressive", "speculative")}  # fmt: skip
    arms = [row["dgd"]["arm"] for row in rows[:5]]
    assert arms == ["autoregressive", "speculative", "speculative+ttt", "guided+ttt", "noise+ttt"]
    assert len(rows) == len(arms) * TASKS
    assert len(tokens["autoregressive"]) == TASKS
    assert tokens["speculative"] == tokens["autoregressive"]
    assert "case studies:" in run.out
    # It does draft: a draft that is never right would be as lossless.
    assert {row["dgd"]["control_of"] for row in rows if row["dgd"]["arm"] == "noise+ttt"} == {"guided+ttt"}
    guided = [row["dgd"] for row in rows if row["dgd"]["blends"]]
    assert all(record["ttt"]["kept"] in (True, False) for record in guided)
    assert all(len(record["divergence"]["js"]) == record["tokens"] for record in guided)
    drafted = [row["dgd"]["tau"] for row in rows if row["dgd"]["arm"] == "speculative"]
    assert sum(drafted) / len(drafted) > 1.2
