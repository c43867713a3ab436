"""What predict reports of adaptation, from rows written by hand: pairs of arms, counts, tables, curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table

from dgd_lightning import run_folder
from dgd_lightning.analysis.adaptation import Counts, collect, gain_of, summed, twin
from dgd_lightning.callbacks.decode_metrics import AdaptMetrics
from dgd_lightning.callbacks.rows import PredictionWriter
from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.metrics.paired import Verified
from dgd_lightning.modules.arms import Arm
from dgd_lightning.report.run_tables import adaptation_table, gain_table
from dgd_lightning.types import Summary

DRAFTED = Speculative()
PLAIN, ADAPTED, ONLINE = (
    Arm("plain", DRAFTED), Arm("adapted", DRAFTED, ttt=True), Arm("online", DRAFTED, online_every=16)
)  # fmt: skip
BEFORE = {"step": 0, "loss": 2.0, "tau": 2.0, "acceptance": [0.5, 0.25]}
AFTER = {"step": 8, "loss": 1.0, "tau": 3.0, "acceptance": [0.75, 0.5]}
TEXTS = {"held_out_by": "validation_texts", "validation_texts": 6, "validation_answers": 5, "validation_asked": 3}
KEPT = {"kept": True, "held_out_before": BEFORE, "held_out_after": AFTER, **TEXTS}
UNSCORED = {"kept": False, "held_out_before": None, "held_out_after": None}
FAILED = {"kept": False, "error": "context: expected at least 8 tokens, received 3. Hint: …"}


def line(
    context: str, task: int, arm: str, lengths: list[int], ttt: dict[str, Any] | None = None, **cost: Any
) -> dict[str, Any]:
    """A prediction row, as far as it is read."""
    record = {"arm": arm, "ttt": ttt, "acceptance_lengths": lengths, **cost}
    return {"idx": f"{context}-{task}", "metadata": {"context_id": context}, "dgd": record}


def cost(fit: float, memory: int | None = None) -> dict[str, Any]:
    seconds = {"ttt_prefill_seconds": 0.5, "ttt_validation_seconds": 0.25, "ttt_fit_seconds": fit}
    return {**seconds, "ttt_peak_memory": memory}


ROWS = [
    line("a", 0, "plain", [2, 2]),
    line("a", 1, "plain", [4]),
    line("b", 0, "plain", [3, 1]),
    line("a", 0, "adapted", [4], KEPT, **cost(3.0, 2**21)),
    line("a", 1, "adapted", [4], KEPT, **cost(3.0, 2**21)),
    line("b", 0, "adapted", [3, 1], FAILED),
    {"idx": "c-0", "metadata": {"context_id": "c"}, "dgd": {"arm": "plain", "ttt": None, "skipped": "too long"}},
    line("d", 0, "plain", []),  # one token: the prefill's
    line("d", 0, "adapted", [], UNSCORED, **cost(1.0)),
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(folder: Path) -> tuple[Counts, dict[str, Any]]:
    return collect(run_folder.read_predictions(folder))


def cells(table: Table) -> list[dict[str, str]]:
    """A table's rows, by column."""
    names = [str(column.header) for column in table.columns]
    columns = [list(column.cells) for column in table.columns]
    return [dict(zip(names, map(str, row), strict=True)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("adapting", [ADAPTED, ONLINE, Arm("both", DRAFTED, ttt=True, online_every=16)])
def test_the_twin_of_an_adapting_arm_adapts_nothing(adapting: Arm) -> None:
    assert twin(adapting, [adapting, ONLINE, ADAPTED, PLAIN]) is PLAIN


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5},
        {"temperature": 0.5, "top_k": 3},
        {"temperature": 0.5, "top_p": 0.9},
        {"method": Speculative(block_size=4)},
        {"method": Speculative(scheme="exact_match")},
    ],
)
def test_the_twin_differs_in_nothing_else(changes: dict[str, Any]) -> None:
    changes = {"method": DRAFTED, **changes}
    adapting, its_own = Arm("new", ttt=True, **changes), Arm("old", **changes)
    others = [Arm("autoregressive", Autoregressive()), PLAIN, ADAPTED]
    assert twin(adapting, [*others, adapting]) is None
    assert twin(adapting, [*others, adapting, its_own]) is its_own


def test_collect_pools_by_context(tmp_path: Path) -> None:
    counts, records = read(write(tmp_path, ROWS))
    assert counts == {
        "plain": {"a": Verified(8, 3), "b": Verified(4, 2), "d": Verified(0, 0)},
        "adapted": {"a": Verified(8, 2), "b": Verified(4, 2), "d": Verified(0, 0)},
    }
    no_cost = dict.fromkeys(cost(0.0))
    assert records == {"a": KEPT | cost(3.0, 2**21), "b": FAILED | no_cost, "d": UNSCORED | cost(1.0)}


def test_gains_are_of_contexts_that_both_verified(tmp_path: Path) -> None:
    counts, _ = read(write(tmp_path, ROWS))
    gain = gain_of(counts, "plain", "adapted")
    assert gain.contexts == ["a", "b"]
    (row,) = cells(gain_table([gain]))
    assert row["contexts"] == "2"
    assert (row["arm"], row["against"]) == ("adapted", "plain")
    assert (row["τ before"], row["τ after"]) == ("2.40", "3.00")  # 12 / 5 and 12 / 4
    assert row["Δτ"] == "+0.60"  # no interval of two contexts
    assert row["gain"] == "+25.0%"
    assert row["median gain"] == "+25.0%"  # of +50% and 0%
    assert row["worst"] == "+0.0%"


def test_no_verification_at_all_is_a_dash(tmp_path: Path) -> None:
    counts, records = read(write(tmp_path, ROWS[-2:]))
    gain = gain_of(counts, "plain", "adapted")
    assert gain.tau.contexts == 0
    assert math.isnan(gain.tau.tau)
    (row,) = cells(gain_table([gain]))
    assert row == {"arm": "adapted", "against": "plain", "contexts": "0"} | dict.fromkeys(
        ("τ before", "τ after", "Δτ", "gain", "median gain", "worst"), "–"
    )
    (row,) = cells(adaptation_table(summed(records.values())))
    assert row["held-out loss"] == row["held-out τ"] == "–"


def test_no_rows_at_all(tmp_path: Path) -> None:
    counts, records = read(tmp_path)
    assert not counts
    assert not records
    assert gain_of(counts, "plain", "adapted").tau.contexts == 0
    assert not counts  # asking added nothing


def test_adaptations_are_summed_up_without_those_that_failed(tmp_path: Path) -> None:
    _, records = read(write(tmp_path, ROWS))
    (row,) = cells(adaptation_table(summed(records.values())))
    assert row == {
        "contexts": "3",
        "kept": "1",
        "failed": "1",
        "judged by": "3 / 2 / 1",
        "held-out loss": "2.00 → 1.00",
        "held-out τ": "2.00 → 3.00",
        "prefill s": "0.50",
        "validation s": "0.25",
        "fit s": "2.00",  # of 3 and 1
        "peak MiB": "2",
    }


def test_all_adaptations_failed(tmp_path: Path) -> None:
    _, records = read(write(tmp_path, [line("b", 0, "adapted", [1], FAILED)]))
    (row,) = cells(adaptation_table(summed(records.values())))
    assert row == {"contexts": "1", "kept": "0", "failed": "1"} | dict.fromkeys(
        ("judged by", "held-out loss", "held-out τ", "prefill s", "validation s", "fit s", "peak MiB"), "–"
    )


class Written:
    """A TensorBoard writer that remembers."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[float, int]]] = {}
        self.figures: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((value, step))

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.figures.append(tag)

    def flush(self) -> None:
        pass


def predict_ended(folder: Path, arms: list[Arm]) -> tuple[Summary, Written]:
    """What the callback adds to a finished run."""
    logger, written = Mock(spec=TensorBoardLogger), Written()
    logger.experiment = written
    writer = PredictionWriter()
    writer.folder = folder
    trainer: Any = SimpleNamespace(callbacks=[writer], is_global_zero=True, logger=logger)
    module: Any = SimpleNamespace(arms=arms, summary=Summary())
    AdaptMetrics().on_predict_end(trainer, module)
    return module.summary, written


def test_curves_of_a_run(tmp_path: Path) -> None:
    summary, written = predict_ended(write(tmp_path, ROWS), [PLAIN, ADAPTED])
    assert len(summary.details) == 2
    (sentence,) = summary.sentences
    assert "too few contexts to say what changed in adapted against plain (τ 2.40 → 3.00, +25.0% over 2" in sentence
    assert written.figures == ["adapted/tau_by_context", "ttt/held_out_acceptance"]
    assert written.scalars["adapted/tau_gain_worst"] == [(0.0, 2)]
    assert written.scalars["adapted/tau_gain_difference/value"] == [(pytest.approx(0.6), 2)]
    assert written.scalars["adapted/tau_gain_by_context"] == [(pytest.approx(4 - 8 / 3), 0), (0.0, 1)]
    assert written.scalars["ttt/fit_seconds"] == [(3.0, 0)]
    assert written.scalars["ttt/held_out_loss_before"] == [(2.0, 0)]
    assert written.scalars["ttt/held_out_acceptance_after/slot_02"] == [(0.5, 0)]


def test_an_arm_that_adapts_only_while_decoding_is_compared(tmp_path: Path) -> None:
    rows = [*ROWS[:3], line("a", 0, "online", [4, 4]), line("b", 0, "online", [3, 1])]
    summary, written = predict_ended(write(tmp_path, rows), [ONLINE, PLAIN])
    (row,) = cells(summary.details[0])
    assert len(summary.details) == 1  # no adapter was made for a whole context
    assert (row["arm"], row["against"], row["contexts"]) == ("online", "plain", "2")
    assert "online/tau_gain_worst" in written.scalars


def test_a_run_in_which_no_arm_adapts_gets_nothing(tmp_path: Path) -> None:
    summary, written = predict_ended(write(tmp_path, ROWS[:3]), [PLAIN, Arm("other", Speculative(block_size=4))])
    assert not summary.details
    assert not summary.sentences
    assert not written.scalars
