"""What divergence records come to: means by class, position and context, histograms, tables, pictures."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dgd_lightning.analysis.divergence import COLUMNS, EDGES, RANKS, ArmDivergence, collect
from dgd_lightning.callbacks.divergence import DivergenceMetrics
from dgd_lightning.callbacks.rows import PredictionWriter
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.divergence import TokenDivergence, token_class
from dgd_lightning.report.figures import LINES, WIDTH, position_figure, text_image
from dgd_lightning.report.run_tables import class_table, divergence_tables

WORDS = ["The", " cat", " 7", ".", "\n", "<|im_end|>", ""]
SAME = 1e-9  # fp64, sums over some tens of tokens


def row(context: int, task: int, tokens: int, arm: str = "a", **more: Any) -> dict[str, Any]:
    """A prediction row as far as it is read, of random numbers."""
    draw = random.Random(f"{context} {task} {arm}")
    record: dict[str, Any] = {"beta": 0.3, "tokens": draw.choices(WORDS, k=tokens), "top": []}
    for name in TokenDivergence._fields:
        if name in RANKS:
            record[name] = [draw.randint(1, 50) for _ in range(tokens)]
        elif name in ("agree", "argmax_changed"):
            record[name] = [draw.randint(0, 1) for _ in range(tokens)]
        else:
            record[name] = [round(draw.random(), 5) for _ in range(tokens)]
    return {
        "idx": f"t{context}-{task}",
        "metadata": {"context_id": f"c{context}"},
        "dgd": {"arm": arm, "divergence": {**record, **more}},
    }


ROWS = [row(context, task, 4 + 3 * task + context) for context in range(6) for task in range(2)]


def gathered(rows: list[dict[str, Any]], positions: int = 9) -> ArmDivergence:
    stats: dict[str, ArmDivergence] = {}
    for one in rows:
        collect(stats, one, positions)
    return stats["a"]


def number(record: dict[str, Any], name: str, at: int) -> float:
    if name == "entropy_gap":
        return record["target_entropy"][at] - record["readout_entropy"][at]
    return math.log(record[name][at]) if name in RANKS else record[name][at]


def mean(cells: list[tuple[dict[str, Any], int]], name: str) -> float:
    values = [number(record, name, at) for record, at in cells]
    found = sum(values) / len(values)
    return math.exp(found) if name in RANKS else found


def test_means_are_those_of_a_loop_over_all_tokens() -> None:
    arm = gathered(random.Random(0).sample(ROWS, len(ROWS)))
    cells = [(r["dgd"]["divergence"], at) for r in ROWS for at in range(len(r["dgd"]["divergence"]["tokens"]))]
    assert arm.tokens == len(cells)
    assert arm.tasks == len(ROWS)
    for name in COLUMNS:
        assert arm.means()[name] == pytest.approx(mean(cells, name), abs=SAME)
        by_class = {kind: means[name] for kind, means in arm.by_class().items()}
        kinds = {token_class(record["tokens"][at]) for record, at in cells}
        assert by_class.keys() == kinds
        for kind in kinds:
            members = [(record, at) for record, at in cells if token_class(record["tokens"][at]) == kind]
            assert by_class[kind] == pytest.approx(mean(members, name), abs=SAME)
        for context, means in arm.by_context().items():
            members = [
                (r["dgd"]["divergence"], at)
                for r in ROWS
                if r["metadata"]["context_id"] == context
                for at in range(len(r["dgd"]["divergence"]["tokens"]))
            ]
            assert means[name] == pytest.approx(mean(members, name), abs=SAME)
        if name not in RANKS:
            for position, value in enumerate(arm.positions.compute()[:, COLUMNS.index(name)].tolist()):
                members = [(record, at) for record, at in cells if min(at, 8) == position]  # the last takes the rest
                assert value == pytest.approx(mean(members, name), abs=SAME)
        low, high = arm.interval(name)[1:]
        assert low < arm.means()[name] < high


def test_histograms_count_every_token() -> None:
    extreme = row(9, 0, 3, kl_target_readout=[None, 0.0, 5000.0], target_rank=[1, 2, 10**9])
    arm = gathered([*ROWS, extreme])
    for name in EDGES:
        assert arm.histograms[name].sum() == arm.tokens == len(arm.samples(name))
    assert arm.histograms["kl_target_readout"][-1] == 2
    ranks = [rank for r in [*ROWS, extreme] for rank in r["dgd"]["divergence"]["target_rank"]]
    assert arm.histograms["target_rank"][:3].tolist() == [
        ranks.count(1), ranks.count(2) + ranks.count(3), sum(ranks.count(rank) for rank in (4, 5, 6, 7))
    ]  # fmt: skip
    assert arm.means()["kl_target_readout"] == math.inf
    assert math.isnan(arm.interval("kl_target_readout").low)


def test_rank_0_adds_up_alone() -> None:
    """It reads the rows of all ranks from the run folder; a collective would wait for ranks that never come."""
    arm = gathered(ROWS)
    for metric in (arm.classes, arm.positions):
        metric.distributed_available_fn = lambda: True
        metric.dist_sync_fn = lambda *_, **__: pytest.fail("a collective")
    arm.by_class()
    position_figure([arm])


def test_rows_without_a_record_add_nothing() -> None:
    stats: dict[str, ArmDivergence] = {}
    for record in ({"arm": "a", "skipped": "too long"}, {"arm": "a", "divergence": None}):
        collect(stats, {"idx": "x", "dgd": record}, 4)
    assert stats == {}


def test_tables_hold_means_and_intervals() -> None:
    arm = gathered(ROWS)
    one = ArmDivergence("alone", 9)
    one.add("c", ROWS[0]["dgd"]["divergence"])
    distributions, words = divergence_tables({"a": arm, "alone": one})
    js = arm.interval("js")
    assert list(distributions.columns[3].cells) == [
        f"{js.value:.3f}\n{js.low:.3f}…{js.high:.3f}", f"{one.means()['js']:.3f}\n"
    ]  # fmt: skip
    assert next(iter(words.columns[1].cells)).startswith(f"{arm.means()['argmax_changed']:.2%}\n")
    classes = class_table({"a": arm})
    assert [column.header for column in classes.columns] == [
        "arm", "word", "number", "punctuation", "whitespace", "special", "partial"
    ]  # fmt: skip


def test_pictures() -> None:
    arm = gathered(ROWS)
    curve = position_figure([arm]).axes[0].lines[0].get_ydata()
    assert curve.tolist() == arm.positions.compute()[:-1, COLUMNS.index("js")].tolist()
    lonely = position_figure([gathered(ROWS[:1])]).axes[0].lines[0].get_ydata()
    assert np.isnan(lonely).all()  # one answer is no curve
    record = {"tokens": ["ab", " ", "c"], "js": [0.0, math.log(2), None], "argmax_changed": [0, 1, 0]}
    picture = text_image("title", record)
    body = picture[24:]

    def has(colour: tuple[int, int, int]) -> np.ndarray:
        """Columns of the picture with a pixel of this colour."""
        return np.flatnonzero((body == np.array(colour)).all(-1).any(0))

    orange, red = has((240, 140, 40)), has((192, 0, 0))
    assert len(orange) == pytest.approx(2 * len(red), abs=3)  # two full tokens of one character, the first changed
    assert orange.min() == red.min()
    long = {"tokens": ["\u202e\x00x\ud800" * WIDTH] * LINES, "js": [0.1] * LINES, "argmax_changed": [0] * LINES}
    assert text_image("<b>\n\x00", long).shape[0] < 25 * (LINES + 2)
    assert text_image("nothing", {"tokens": [], "js": [], "argmax_changed": []}).size


def trainer_of(*callbacks: Any) -> Any:
    return SimpleNamespace(callbacks=list(callbacks), log_dir="x", is_global_zero=True)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^DivergenceMetrics\.positions: "):
        DivergenceMetrics(positions=0)
    callback = DivergenceMetrics()
    with pytest.raises(InputError, match=r"^trainer\.callbacks: expected PredictionWriter before DivergenceMetrics"):
        callback.setup(trainer_of(callback), SimpleNamespace(divergence=object()), "predict")  # type: ignore[arg-type]
    writer = PredictionWriter()
    writer.folder = tmp_path
    with pytest.raises(InputError, match=r"^model\.divergence: "):
        callback.setup(trainer_of(writer, callback), SimpleNamespace(divergence=None), "predict")  # type: ignore[arg-type]
