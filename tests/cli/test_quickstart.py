"""The README's first command: the bundled pair, both arms, the tables it promises."""

from __future__ import annotations

from pathlib import Path

from cli_tools import Dgd, predictions

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TASKS = 4  # of the quickstart's; about ten seconds on a core


def test_quickstart(dgd: Dgd, tmp_path: Path) -> None:
    run = dgd(
        "predict", "--config", CONFIG, "--logs_dir", tmp_path,
        "--data.limit", str(TASKS), "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert run.code == 0, run.err
    folder = tmp_path / "quickstart" / "version_0"
    for word in ("Solve rate", "τ micro", "speed-up", f"run folder: {folder}", "tensorboard --logdir"):
        assert word in run.out

    rows = predictions(folder)
    tokens = {arm: {row["idx"]: row["dgd"]["output_ids"] for row in rows if row["dgd"]["arm"] == arm}
              for arm in ("autoregressive", "speculative")}  # fmt: skip
    assert len(rows) == 2 * TASKS
    assert len(tokens["autoregressive"]) == TASKS
    assert tokens["speculative"] == tokens["autoregressive"]
    # It does draft: a draft that is never right would be as lossless.
    drafted = [row["dgd"]["tau"] for row in rows if row["dgd"]["arm"] == "speculative"]
    assert sum(drafted) / len(drafted) > 1.2
