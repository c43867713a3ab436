"""Buckets, win rates, intervals and verdicts of the diagnostic, counted by hand and on planted readers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from dgd_lightning.analysis.diagnosis import ALL, Diagnosis, diagnose, summary
from dgd_lightning.metrics.clustered import Difference, clustered_mean
from dgd_lightning.metrics.diagnosis import (
    Reader,
    Wins,
    bucket_names,
    bucket_of,
    placement,
    verdict,
    wins,
)
from dgd_lightning.report.diagnostic_figures import figures

NAN = float("nan")
EDGES = [0.5, 0.9]


def reader(ranks: list[float], probabilities: list[float] | None = None) -> Reader:
    return Reader(np.array(ranks, dtype=float), np.log(probabilities or [0.5] * len(ranks)))


def test_an_edge_belongs_to_the_bucket_above() -> None:
    assert bucket_of(np.array([0.0, 0.4999, 0.5, 0.89, 0.9, 1.0]), EDGES).tolist() == [0, 0, 1, 1, 2, 2]
    assert bucket_names([0.5, 0.8, 0.95]) == ["below 50%", "50–80%", "80–95%", "95% and more"]
    assert bucket_names([0.125]) == ["below 12.5%", "12.5% and more"]


def test_placement_leaves_out_what_was_not_read() -> None:
    found = placement(reader([1, NAN, 4, 1.5, 1], [0.5, 0.9, 0.1, 0.3, 0.1]))
    assert found.tokens == 4
    assert found.top_1 == 0.5  # a tie for the first place is none
    assert found.median_rank == 1.25
    assert found.mean_rank == pytest.approx(6 ** (1 / 4))
    assert found.probability == pytest.approx(0.25)
    assert placement(reader([NAN])).tokens == 0


def test_wins_are_counted_on_shared_tokens() -> None:
    context = np.array([0, 0, 1, 1, 2])
    ours, theirs = reader([1, 2, 3, NAN, 1], [0.1] * 5), reader([2, 2, 1, 1, 9], [0.2, 0.1, 0.1, 0.1, 0.05])
    by_rank = wins(ours, theirs, context)
    assert (by_rank.tokens, by_rank.contexts) == (4, 3)
    assert (by_rank.better, by_rank.worse, by_rank.net.value) == (0.5, 0.25, 0.25)
    by_probability = wins(ours, theirs, context, by="probability")
    assert (by_probability.tokens, by_probability.better, by_probability.worse) == (5, 0.2, 0.2)
    assert wins(reader([NAN]), reader([1]), np.array([0])).tokens == 0


def pooled(values: np.ndarray, clusters: np.ndarray) -> Difference:
    """The mean of all values, by cluster."""
    number = clusters.astype(int)
    return clustered_mean(np.bincount(number, weights=values), np.bincount(number))


def test_an_interval_is_about_student_s() -> None:
    """Cluster-robust, by hand; sign flips agree with it to the first order, and add a little for skewness."""
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), rng.integers(1, 30, size=40))
    values = rng.choice([-1.0, 0.0, 1.0], size=len(clusters)) + 0.5 * rng.standard_normal(40)[clusters]
    found = pooled(values, clusters)
    sums = [(values[clusters == cluster] - values.mean()).sum() for cluster in range(40)]
    half = 2.02 * math.sqrt(40 / 39 * sum(one**2 for one in sums)) / len(values)
    assert found.value == pytest.approx(values.mean())
    assert found.value - found.low == pytest.approx(half, rel=0.2)
    assert found.high - found.value == pytest.approx(half, rel=0.2)


def test_repeating_a_context_tells_nothing_new() -> None:
    """Ten copies of every token leave the interval where it is; taken for independent, it would shrink threefold."""
    rng = np.random.default_rng(4)
    values, clusters = rng.choice([-1.0, 1.0], size=20), np.arange(20)
    once, often = pooled(values, clusters), pooled(np.repeat(values, 10), np.repeat(clusters, 10))
    assert often == pytest.approx(once)
    assert once.high - once.low > 0.5
    assert np.isnan(pooled(values, np.zeros(20)).low)  # one context: no interval


def won(net: Difference, tokens: int = 100, contexts: int = 10) -> Wins:
    return Wins(tokens, contexts, 0.4, 0.2, net, 0.01 if net.low > 0 else 0.2)


ABOVE, AROUND = Difference(0.2, 0.1, 0.3), Difference(0.2, -0.1, 0.5)


@pytest.mark.parametrize(
    ("target", "control", "go", "words"),
    [
        (won(ABOVE), won(ABOVE), True, "GO: the draft knows something that the target does not, because"),
        (won(AROUND), won(ABOVE), False, "knows no better than the target, though it does read its features"),
        (won(ABOVE), won(AROUND), False, "random features have too"),
        (won(AROUND), won(AROUND), False, "no better than the target, nor than random features"),
        (won(ABOVE, tokens=29), won(ABOVE), False, "nothing can be said"),
        (won(ABOVE, contexts=4), won(ABOVE), False, "nothing can be said"),
        (won(Difference(0.2, NAN, NAN)), won(ABOVE), False, "NO-GO"),
    ],
)
def test_verdicts(target: Wins, control: Wins, go: bool, words: str) -> None:
    found = verdict("draft", target, control, "below 50%")
    assert found.go is go
    assert words in found.text
    assert found.text.startswith("GO: " if go else "NO-GO: ")
    assert "because" in found.text
    assert "\n" not in found.text


# From rows.


def rows(draft: str, count: int = 12, tokens: int = 10, ttt: bool = False) -> list[dict[str, Any]]:
    """Planted rows: the target is unsure at every other token and ranks it 5th there; random features rank it 20th,
    and give it more probability than the target does."""
    made = []
    for number in range(count):
        unsure = [at % 2 == 0 for at in range(tokens)]
        ranks = {
            "target": [5 if one else 1 for one in unsure],
            "draft": [(2 if draft == "knows" else 7) if one else 1 for one in unsure],
            "shuffled features": [10] * tokens,
            "random features": [20] * tokens,
            "layer 0": [30] * tokens,
            "layer 1": [6] * tokens,
            "slot 2": [None, *[3] * (tokens - 1)],
            "mine": [1] * tokens,
        }
        if ttt:
            ranks["draft + TTT"] = [1] * tokens
        chances = {"target": -6.0, "random features": -4.0}
        readers = {
            name: {"rank": values, "log_probability": [None if v is None else chances.get(name, -5.0) for v in values]}
            for name, values in ranks.items()
        }
        record = {"context": f"c{number // 2}", "confidence": [0.3 if one else 0.97 for one in unsure],
                  "readers": readers, "ttt": {"kept": number >= 6} if ttt else None}  # fmt: skip
        made.append({"idx": f"t{number}", "dgd": record})
    return [*made, {"idx": "long", "dgd": {"context": "c0", "skipped": "too long"}}]


@pytest.mark.parametrize("draft", ["knows", "guesses"])
def test_a_planted_draft_is_found_out(draft: str) -> None:
    found = diagnose(rows(draft), EDGES, ["mine"])
    assert (found.tasks, found.skipped, found.contexts, found.kept) == (12, 1, 6, None)
    assert [one.go for one in found.verdicts] == [draft == "knows"]
    cell = found.unsure["draft"]
    assert cell.rank is not None
    assert (cell.rank.tokens, cell.rank.net.value) == (60, 1.0 if draft == "knows" else -1.0)
    assert found.cells[ALL]["draft"].rank == cell.rank._replace(
        tokens=120, better=cell.rank.better / 2, worse=cell.rank.worse / 2, net=found.cells[ALL]["draft"].rank.net
    )
    assert found.cells["50–90%"]["draft"].placement.tokens == 0
    assert found.unsure["slot 2"].placement.tokens == 48  # nothing of an answer's first token
    mine = found.unsure["mine"].draft
    assert mine is not None
    assert mine.net.value == 1.0
    assert found.unsure["layer 0"].draft is None


def test_random_features_win_by_probability_and_lose_by_rank() -> None:
    cell = diagnose(rows("guesses"), EDGES).unsure["random features"]
    assert cell.rank is not None
    assert cell.probability is not None
    assert (cell.rank.net.value, cell.probability.net.value) == (-1.0, 1.0)
    assert cell.control is None


def test_the_adapted_draft_has_a_verdict_of_its_own() -> None:
    found = diagnose(rows("guesses", ttt=True), EDGES)
    assert [one.go for one in found.verdicts] == [False, True]
    assert "adapted draft" in found.verdicts[1].text
    assert found.kept == 3


def test_summary_is_json_and_every_picture_is_drawn() -> None:
    found: Diagnosis = diagnose(rows("knows", ttt=True), EDGES, ["mine"])
    written = json.loads(json.dumps(summary(found), allow_nan=False))
    assert written["buckets"]["below 50%"]["draft"]["rank"]["net"]["value"] == 1.0
    assert written["buckets"]["50–90%"]["draft"]["placement"]["mean_rank"] is None
    assert written["verdicts"][0]["go"] is True
    made = figures(found)
    assert sorted(made) == ["confidence", "depth", "further", "ranks", "slots"]
    depth = made["depth"].axes[0].lines[0]
    assert depth.get_xydata() == pytest.approx(np.array([[0, 30], [1, 6]]))  # layer, mean rank
    assert sorted(figures(diagnose(rows("knows"), [0.1]))) == ["confidence", "depth", "slots"]  # nothing decides
