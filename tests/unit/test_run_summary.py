"""What a predict run prints by default: one table, the result in a few sentences, where the rest is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from dgd_lightning.analysis.adaptation import Gain
from dgd_lightning.analysis.arms import ArmStats
from dgd_lightning.analysis.arms import collect as collect_row
from dgd_lightning.metrics.clustered import NAN, Difference, counted
from dgd_lightning.metrics.paired import TauGain
from dgd_lightning.report.print_tables import print_tables
from dgd_lightning.report.run_summary import (
    adaptation_sentences,
    add_decoding,
    add_solve_rates,
    finish,
    speed_sentences,
    summary_table,
    ungraded_sentences,
)
from dgd_lightning.scoring.graded import Graded, Versus
from dgd_lightning.scoring.statistics import Pair, compare
from dgd_lightning.scoring.summary import Compared
from dgd_lightning.types import Summary

GUIDED = {"lossless": False, "blends": True}
PLAIN = {"baseline": True, "block_size": None}
TOGETHER = {"joined_with": ["other"]}


def arms(*described: tuple[str, float, dict[str, object]]) -> dict[str, ArmStats]:
    """Arms of two tasks, each by its name, the seconds of a task of six tokens, and what its rows say."""
    stats: dict[str, ArmStats] = {}
    for name, seconds, more in described:
        lengths = [1] * 6 if "baseline" in more else [3, 3]
        record = {
            "arm": name, "baseline": False, "lossless": True, "blends": False, "temperature": 0.0, "top_k": None,
            "top_p": None, "block_size": 4, "tokens": 7, "acceptance_lengths": lengths, "verified_lengths": lengths,
            "decoded_tokens": 6, "batch_tokens": 6, "decode_seconds": seconds, **more,
        }  # fmt: skip
        for idx in "ab":
            collect_row(stats, {"idx": idx, "dgd": record})
    return stats


def test_lossless_arms_and_their_speed() -> None:
    stats = arms(("plain", 3.0, PLAIN), ("fast", 1.5, {}), ("faster", 1.0, {}), ("guided", 2.0, GUIDED))
    assert speed_sentences(stats) == [
        "Lossless, answers have the target's own distribution: fast 2.00× and faster 3.00× as fast as plain.",
        "Not lossless, another distribution by design: guided 1.50× as fast as plain.",
    ]


@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        ([("fast", 1.0, {})], "fast without a baseline of the same temperature, top_k and top_p."),
        (
            [("plain", 3.0, PLAIN), ("warm", 1.0, {"temperature": 1.0})],
            "warm without a baseline of the same temperature",
        ),
        ([("plain", 3.0, PLAIN), ("a", 1.0, TOGETHER), ("b", 1.0, TOGETHER)], "a and b without a speed of their own."),
        ([("plain", 3.0, PLAIN)], "Nothing was compared in speed: only plain decoded tasks."),
        ([], "No task was decoded."),
    ],
)
def test_speeds_that_are_not_known(described: list[tuple[str, float, dict[str, object]]], sentence: str) -> None:
    (found,) = speed_sentences(arms(*described))
    assert sentence in found


def gain(low: float, high: float, *, contexts: int = 8, value: float = 0.6) -> Gain:
    both = Difference(value, low, high)
    ratio = Difference(value / 2.4, low / 2.4, high / 2.4)
    worst = -0.1 * (value != 0)
    return Gain("adapted", "plain", TauGain(2.4, 2.4 + value, both, ratio, ratio, worst, contexts), ["c"] * contexts)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (gain(0.3, 0.9), "τ rose in adapted against plain (τ 2.40 → 3.00, +25.0% [+12.5, +37.5] over 8 contexts)"),
        (gain(-0.9, -0.3, value=-0.6), "τ fell in adapted against plain (τ 2.40 → 1.80, -25.0% [-37.5, -12.5]"),
        (gain(-0.3, 0.9), "no change of τ found in adapted against plain (τ 2.40 → 3.00, +25.0% [-12.5, +37.5]"),
        (gain(0.0, 0.0, value=0.0), "τ did not change in adapted against plain (τ 2.40 in 8 contexts)"),
        (gain(0.3, 0.9, contexts=4), "too few contexts to say what changed in adapted against plain (τ 2.40 → 3.00"),
        (gain(NAN, NAN, contexts=1), "too few contexts to say what changed in adapted against plain (τ 2.40 → 3.00"),
        (gain(NAN, NAN, contexts=0), "nothing was verified in adapted against plain in the same context"),
    ],
)
def test_what_adaptation_changed(one: Gain, words: str) -> None:
    (sentence,) = adaptation_sentences([one])
    assert sentence.startswith(f"Adaptation: {words}")
    assert sentence == adaptation_sentences([one], ["alone"])[0]
    assert adaptation_sentences([one, one])[0].count(words) == 2


def test_adaptation_without_anything_to_compare_with() -> None:
    assert adaptation_sentences([]) == []
    assert adaptation_sentences([], ["a", "b"]) == [
        "What adaptation changed is not known: a and b adapted, but no arms differ from them in adaptation alone."
    ]


def test_answers_that_nobody_graded() -> None:
    stats = arms(("plain", 3.0, PLAIN), ("guided", 2.0, GUIDED))
    assert ungraded_sentences(stats) == ["Whether guided answered better is not known: no answer is graded yet."]
    assert ungraded_sentences(arms(("plain", 3.0, PLAIN))) == []


def filled() -> Summary:
    stats = arms(
        ("autoregressive", 3.0, PLAIN),
        ("speculative", 1.5, {}),
        ("speculative+ttt", 1.0, {}),
        ("guided+ttt", 2.0, GUIDED),
    )
    summary = Summary()
    add_decoding(summary, stats, 2)
    pairs = [Pair(str(n), float(n < 6), float(n < 9)) for n in range(12)]
    scores = [
        Graded(p.context, arm, p.context, "", "", value, (0, 0), None)
        for p in pairs
        for arm, value in (("autoregressive", p.base), ("guided+ttt", p.other))
    ]
    add_solve_rates(summary, scores, [Compared(Versus("guided+ttt", "autoregressive", False), compare(pairs), 0.25)])
    summary.sentences += speed_sentences(stats)
    summary.details += [Table("only in detail"), "a remark in detail"]
    summary.pointers.append("case studies: there")
    return summary


def test_one_is_no_plural() -> None:
    assert [counted(number, "context") for number in (0, 1, 2000)] == ["0 contexts", "1 context", "2,000 contexts"]


def test_a_baseline_of_another_sampling_is_named() -> None:
    pairs = [Pair(str(n), float(n < 6), float(n < 9)) for n in range(12)]
    cells = []
    for other in (False, True):
        summary = Summary()
        add_solve_rates(summary, [], [Compared(Versus("warm", "greedy", False, other), compare(pairs), 0.25)])
        cells.append(summary.cells["warm"]["points vs\nbaseline"])
    same, different = cells
    assert different == f"{same}\nvs greedy\n(other sampling)"


def test_the_table_fits_80_columns_and_turns_below() -> None:
    for width in (80, 60):
        console = Console(file=io.StringIO(), width=width)
        print_tables(console, [summary_table(filled())])
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        assert "+25.0" in text
        assert ("speculative+ttt     2/2" in text) == (width == 80)


def test_details_are_kept_and_printed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(filled(), tmp_path, verbose=False)
    short, kept = capsys.readouterr().out, (tmp_path / "summary.txt").read_text()
    finish(filled(), tmp_path, verbose=True)
    whole = capsys.readouterr().out
    for word in ("75.0%", "[", "Lossless", "case studies: there"):
        assert word in short
        assert word in kept
        assert word in whole
    for word in ("only in detail", "a remark in detail"):
        assert word not in short
        assert word in kept
        assert word in whole
    assert f"all tables: {tmp_path / 'summary.txt'}" in short


@pytest.mark.parametrize(
    ("total", "words"),
    [(5, "all tables:"), (6, "1 more sentence and all tables:"), (8, "3 more sentences and all tables:")],
)
def test_only_so_many_sentences_are_printed(
    total: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(Summary(sentences=[f"said {n}." for n in range(total)]), tmp_path, verbose=False)
    printed = capsys.readouterr().out
    assert printed.count("said ") == 5
    assert f"\n{words}" in printed
    assert (tmp_path / "summary.txt").read_text().count("said ") == total
