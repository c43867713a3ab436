"""How long a whole data set takes, from the rows of a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.report.time_needed import main, needed


def row(idx: str, context: str, arm: str, lengths: list[int], batch: int, **changes: Any) -> dict[str, Any]:
    record = {
        "arm": arm,
        "method": "Speculative",
        "tokens": sum(lengths) + 1,
        "decoded_tokens": sum(lengths),
        "batch_tokens": batch,
        "prefix_seconds": 1.0,
        "prefill_seconds": 3.0,
        "decode_seconds": 6.0,
        **changes,
    }
    return {"idx": idx, "metadata": {"context_id": context}, "model_output": "", "dgd": record}


# One batch of two rows (10 s, shared 3 : 1), one of one row (10 s) of another context, both adapted once.
ADAPTED = {"ttt_prefill_seconds": 1.0, "ttt_validation_seconds": 2.0, "ttt_fit_seconds": 3.0}
ROWS = [
    row("a", "c", "fast", [4, 5], 12, **ADAPTED),
    row("b", "c", "fast", [3], 12, **ADAPTED),
    row("d", "e", "fast", [7], 7, **ADAPTED),
    row("a", "c", "plain", [1] * 9, 9),
    {"idx": "z", "model_output": None, "dgd": {"arm": "plain", "skipped": "too long"}},
]


def test_seconds_are_shared_by_tokens_and_adapting_counts_once_a_context() -> None:
    fast, plain, adapting = needed(ROWS)
    assert (fast.part, fast.measured) == ("fast", 3)
    assert fast.seconds.value == pytest.approx(20 / 3)
    assert not fast.seconds.bounded  # two contexts
    assert fast.tokens == pytest.approx((10 + 4 + 8) / 3)
    assert fast.speed == pytest.approx(22 / 20)
    assert (plain.measured, plain.seconds.value) == (1, pytest.approx(10.0))
    assert (adapting.part, adapting.measured, adapting.seconds.value) == ("adapting", 2, pytest.approx(6.0))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    assert main([str(tmp_path), "--tasks", "3600", "--contexts", "7200", "--devices", "2"]) == 0
    out = capsys.readouterr().out
    assert "3.33" in out  # 3,600 tasks of 6.67 s on two devices
    (total,) = [line for line in out.splitlines() if line.startswith("│ sum")]
    assert "14.33" in total  # 3.33 + 5 + 6


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("time_needed: error: folder: expected a run folder")
    assert main([str(tmp_path), "--devices", "0"]) == 2
    assert "devices: expected an integer of at least 1" in capsys.readouterr().err
