"""`dgd report`: CL-bench's formulas, runs side by side and pooled, verdicts in words, pages without foreign markup."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.commands.report import main
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.clustered import Difference
from dgd_lightning.metrics.power import Findable
from dgd_lightning.report.runs import read_runs, study
from dgd_lightning.report.runs_page import Line, intervals
from dgd_lightning.report.solve_rates import comparison_table, p_value, verdict
from dgd_lightning.report.text import visible
from dgd_lightning.scoring.graded import Graded, Versus
from dgd_lightning.scoring.statistics import Comparison
from dgd_lightning.scoring.summary import Compared

CATEGORIES = ["Domain Knowledge Reasoning", "Rule System Application", "Empirical Discovery & Simulation"]
HOSTILE = "</title><script>alert('1')</script>\" onload=\"x() & [red]é\ud800"


def foreign_row(number: int, status: list[str], **changes: Any) -> dict[str, Any]:
    """A row as CL-bench's own evaluation writes it."""
    return {
        "idx": f"task-{number}",
        "messages": [{"role": "user", "content": "…"}],
        "model_output": f"answer {number}",
        "rubrics": [f"rubric {i}" for i in range(len(status))],
        "metadata": {
            "task_id": f"task-{number}",
            "context_id": f"context-{number // 3}",
            "context_category": CATEGORIES[number % 3],
            "sub_category": "Some",
        },
        "grading_rationale": "…",
        "requirement_status": status,
        "score": int("no" not in status),
        **changes,
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def report(*arguments: str, out: Path) -> dict[str, Any]:
    assert main(["report", *arguments, "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


def test_rates_are_those_of_clbench_s_formulas(tmp_path: Path) -> None:
    """Share of score 1, over all and by category; rubrics by hand, written as loops over the rows."""
    rng = random.Random(0)
    rows = [
        foreign_row(n, [rng.choice(["yes", "yes", "yes", "no"]) for _ in range(rng.randint(1, 5))]) for n in range(30)
    ]
    found = report(write(tmp_path / "model_graded.jsonl", rows), out=tmp_path)["arms"]["model"]
    solved = sum(1 for row in rows if row["score"] == 1)
    assert 5 < solved < 25
    assert found["official"]["value"] == found["strict"]["value"] == pytest.approx(solved / 30)
    for category in CATEGORIES:
        members = [row for row in rows if row["metadata"]["context_category"] == category]
        expected = sum(1 for row in members if row["score"] == 1) / len(members)
        assert found["by_category"][category]["official"]["value"] == pytest.approx(expected)
        assert found["by_category"][category]["tasks"] == 10
    statuses = [one for row in rows for one in row["requirement_status"]]
    assert found["rubrics"] == pytest.approx(statuses.count("yes") / len(statuses))


def test_rows_as_others_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        foreign_row(0, ["YES", " Yes "], score="1"),
        foreign_row(1, ["yes", "No"], score=0.0),
        foreign_row(2, ["yes"], score=True, requirement_status=[True, "✓"], extra={"deep": [1]}),
        foreign_row(3, ["no"], score=0, metadata=None),
        foreign_row(4, ["no"], score=0, metadata={"context_id": None, "task_id": 7}, idx=None),
        foreign_row(5, ["yes", "no"], score=0, requirement_status=[], grading_rationale="JSON parse failed"),
        foreign_row(6, ["yes", "no"], score=0, requirement_status="[yes, no]", dgd=None),
        foreign_row(7, ["no"], score="", requirement_status=None),
        foreign_row(8, ["no"], score=None, model_output=None),
        foreign_row(9, ["no"], score=0, model_output=" ", requirement_status=[], idx=9),
        foreign_row(10, ["no"], score=10**400, rubrics=None),
        foreign_row(11, ["no"], score=float("nan"), metadata={"context_category": HOSTILE}),
        *(foreign_row(12 + n, ["yes", "yes"], score=score) for n, score in enumerate((0.5, 2, -1, 1.5, [1]))),
    ]
    del rows[3]["idx"], rows[7]["grading_rationale"], rows[1]["model_output"]
    found = report(write(tmp_path / "odd.jsonl", rows), out=tmp_path)
    arm = found["arms"]["odd"]
    # CL-bench's script takes `score == 1` alone: of the text "1", a fraction, 2 and -1 it makes not solved
    assert (arm["tasks"], arm["scored"], arm["solved"]) == (17, 15, 1)
    assert arm["official"]["value"] == pytest.approx(1 / 15)
    assert arm["strict"]["value"] == pytest.approx(1 / 17)
    assert arm["rubrics"] == pytest.approx(15 / 19)  # 2/2, 1/2, 2/2, 0/1 three times, 2/2 five times
    assert found["runs"][0]["zeros_without_status"] == 3
    said = capsys.readouterr().out
    assert "3 answers have score 0 and no rubric's status" in said
    assert "8 answers came with another score than 0 or 1" in said
    assert "2 of 17 answers have no score" in said


def test_failed_judging_is_pointed_out_where_rows_have_no_rubrics(tmp_path: Path) -> None:
    rows = [foreign_row(task, ["no"] * (task % 2), score=0) for task in range(4)]
    for row in rows:
        del row["rubrics"]
    assert report(write(tmp_path / "public.jsonl", rows), out=tmp_path)["runs"][0]["zeros_without_status"] == 2
    ours = [our_row(task, "plain", 0, requirement_status=[]) for task in range(4)]
    for row in ours:  # graded by a program of ours, which has no rubrics to give statuses of
        del row["rubrics"]
    assert report(write(tmp_path / "ours.jsonl", ours), out=tmp_path)["runs"][0]["zeros_without_status"] == 0


def our_row(task: int, arm: str, score: int | None, **changes: Any) -> dict[str, Any]:
    """A row of a run, graded by `dgd score`."""
    record: dict[str, Any] = {
        "arm": arm,
        "method": "Autoregressive" if arm == "plain" else "Guided",
        "lossless": arm == "plain",
        "prompt_tokens": 3000 + 3000 * (task % 2),
    }
    record |= {"control_of": "guided" if arm == "noise" else None, "grading": {}, "grader": "rubric_judge"}
    status = ["yes" if score else "no"]
    return {**foreign_row(task, status, score=score), "dgd": record, **changes}


def run(folder: Path, tasks: range, solved: dict[str, Any]) -> str:
    """A graded run folder; ``solved`` says of every arm which tasks."""
    rows = [our_row(task, arm, int(right(task))) for task in tasks for arm, right in solved.items()]
    write(folder / "graded.jsonl", rows)
    return str(folder)


ARMS = {"plain": lambda t: t % 4 == 0, "guided": lambda t: t % 4 < 3, "noise": lambda t: t % 4 == 1}


def test_a_run_has_its_comparisons_verdict_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(run(tmp_path / "run", range(60), ARMS), out=tmp_path / "out")
    lines = {(c["arm"], c["against"], c["null_control"]): c for c in found["comparisons"]}
    assert set(lines) == {("guided", "plain", False), ("guided", "noise", True), ("noise", "plain", False)}
    assert lines["guided", "plain", False]["difference"]["value"] == pytest.approx(0.5)
    assert found["verdict"] == [
        f"guided against plain: better ({told(lines['guided', 'plain', False])}), "
        f"and better than its null control noise ({told(lines['guided', 'noise', True])})."
    ]
    out = capsys.readouterr().out
    assert out.count("verdict: ") == 1
    assert "Solve rate by prompt length" in out
    page = (tmp_path / "out" / "report.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:4] == [
        "Solve rate, 95% intervals over contexts", "Differences, percentage points",
        "Solve rate by category", "Solve rate by prompt length",
    ]  # fmt: skip
    assert page.count("<svg") == 4


def told(comparison: dict[str, Any]) -> str:
    value, low, high = (100 * comparison["difference"][name] for name in ("value", "low", "high"))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], Holm p {p_value(comparison['p_holm'])}"


def test_runs_stand_side_by_side_and_against_an_arm(tmp_path: Path) -> None:
    one = run(tmp_path / "one" / "version_0", range(12), ARMS)
    two = run(tmp_path / "two" / "version_3", range(12), {**ARMS, "guided": lambda t: t % 2 == 0})
    other = write(tmp_path / "gpt_graded.jsonl", [foreign_row(n, ["yes"]) for n in range(12)])
    found = report(one, two, other, out=tmp_path)
    assert list(found["arms"]) == [
        "one/plain",
        "one/guided",
        "one/noise",
        "two/plain",
        "two/guided",
        "two/noise",
        "gpt",
    ]
    assert {(c["arm"][:3], c["against"][:3]) for c in found["comparisons"]} == {("one", "one"), ("two", "two")}
    found = report(one, two, other, "--against", "two/plain", out=tmp_path)
    assert {c["arm"] for c in found["comparisons"] if c["against"] == "two/plain"} == set(found["arms"]) - {"two/plain"}
    assert {c["arm"] for c in found["comparisons"] if c["null_control"]} == {"one/guided", "two/guided"}
    found = report(one, "--against", "noise", out=tmp_path)
    assert [(c["arm"], c["against"]) for c in found["comparisons"]] == [("plain", "noise"), ("guided", "noise")]
    assert all(
        f"{arm} against noise: " in said for arm, said in zip(("plain", "guided"), found["verdict"], strict=True)
    )
    assert "no null control" not in " ".join(found["verdict"])
    with pytest.raises(InputError, match=r"^against: expected one of the arms one/plain, .*received three"):
        report(one, two, "--against", "three", out=tmp_path)


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    paths = [run(tmp_path / name / f"version_{v}", range(3), ARMS) for name, v in (("a", 0), ("a", 1), ("b", 0))]
    assert [one.label for one in read_runs(paths)] == ["a/version_0", "a/version_1", "b/version_0"]
    assert [one.label for one in read_runs(paths[1:])] == ["a", "b"]
    with pytest.raises(InputError, match="twice"):
        read_runs([paths[0], str(tmp_path / "a" / "." / "version_0")])


def test_other_tasks_are_refused_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run(tmp_path / "one", range(0, 12), ARMS), run(tmp_path / "two", range(3, 18), ARMS)
    told = "one has 12 tasks, 3 of them alone; two has 15 tasks, 6 of them alone"
    with pytest.raises(InputError, match=re.escape(told)) as error:
        report(one, two, out=tmp_path)
    assert "--common true compares over the 9" in str(error.value)
    found = report(one, two, "--common", "true", out=tmp_path)
    assert {arm["tasks"] for arm in found["arms"].values()} == {9}
    page = (tmp_path / "report.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles
    assert all(title.endswith(f"(only the 9 common tasks: {told})") for title in titles)
    capsys.readouterr()
    with pytest.raises(InputError, match="name other runs"):
        report(one, run(tmp_path / "far", range(50, 60), ARMS), "--common", "true", out=tmp_path)


def test_seeds_are_pooled_within_contexts(tmp_path: Path) -> None:
    """Three equal seeds: thrice the tasks, the same difference, interval and p, about the same power."""
    single = report(run(tmp_path / "s0", range(30), ARMS), out=tmp_path)
    seeds = [run(tmp_path / f"s{n}", range(30), ARMS) for n in range(3)]
    pooled = report(*seeds, "--pool", "true", out=tmp_path)
    assert list(pooled["arms"]) == list(single["arms"])
    assert pooled["note"] == "3 runs pooled, a task counts once for each"
    for one, three in zip(single["comparisons"], pooled["comparisons"], strict=True):
        assert (three["tasks"], three["contexts"]) == (3 * one["tasks"], one["contexts"])
        for name in ("difference", "p"):
            assert three[name] == pytest.approx(one[name])
        assert three["finds"]["whole"] == pytest.approx(one["finds"]["whole"], rel=0.3)
    odd = run(tmp_path / "odd", range(30), {"plain": ARMS["plain"], "guided": ARMS["guided"]})
    with pytest.raises(InputError, match=r"^pool: .*received noise, which differ"):
        report(seeds[0], odd, "--pool", "true", out=tmp_path)


def test_what_is_no_graded_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        read_runs([str(tmp_path / "nothing")])
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="dgd score"):
        read_runs([str(tmp_path / "run")])
    row = foreign_row(0, ["yes"])
    del row["score"]
    with pytest.raises(InputError, match="rows with a score"):
        read_runs([write(tmp_path / "answers.jsonl", [row])])
    with pytest.raises(InputError, match=r"^out: "):
        report(write(tmp_path / "a.jsonl", [foreign_row(0, ["yes"])]), out=Path("/proc/nowhere"))


def test_two_judges_agreement_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for n in range(8):
        second = {"score": int(n < 4), "requirement_status": ["yes" if n < 4 else "no"]}
        score = int(n < 6)
        rows.append(our_row(n, "plain", score) | {"dgd": {"arm": "plain", "grading": {"second": second}}})
    found = report(write(tmp_path / "run" / "graded.jsonl", rows), out=tmp_path)
    assert found["judges"]["tasks"] == 8
    assert found["judges"]["task_kappa"] == pytest.approx(0.5)  # p_o = 6/8, p_e = (6·4 + 2·4)/64
    assert "Agreement of the two judges" in capsys.readouterr().out


FINDS = Findable(0.084, 0.13)


def compared(
    value: float,
    *,
    holm: float,
    arm: str = "guided",
    base: str = "plain",
    control: bool = False,
    blends: bool = False,
    finds: Findable | None = FINDS,
    contexts: int = 50,
    strength: str = "",
) -> Compared:
    interval = Difference(value, value - 0.02, value + 0.02) if value else Difference(0.0)
    changed = (1, 1) if value else (0, 0)
    result = Comparison(0.5, 0.5 + value, interval, holm, holm, *changed, 100, contexts)
    return Compared(Versus(arm, base, control, blends=blends, strength=strength), result, holm, finds)


MISSED = "gains below +8.4 points if spread evenly over tasks, below +13 if gathered in whole contexts, "
MISSED += "would often be missed"


@pytest.mark.parametrize(
    ("finds", "contexts", "cell", "words"),
    [
        (FINDS, 50, "+8.4 to +13", f"; {MISSED}."),
        (Findable(0.0996, 0.5), 50, "+10 to +50", "; gains below +10 points if spread"),
        (Findable(0.2), 8, "+20 or more", "below +20 points if spread evenly over tasks, of any size if gathered in"),
        (
            Findable(),
            50,
            "no gain",
            "no gain, however large, would be found in 80%",
        ),
        (
            Findable(),
            7,
            "only if nearly\nall agree",
            "7 contexts find a difference only if nearly all of them agree.",
        ),
        (Findable(possible=False), 5, "nothing", "; 5 contexts cannot find anything."),
        (None, 50, "–", "Holm p 1.000)."),
    ],
)
def test_what_would_have_been_missed(finds: Findable | None, contexts: int, cell: str, words: str) -> None:
    one = compared(-0.029, holm=1.0, finds=finds, contexts=contexts)
    assert list(comparison_table([one]).columns[-1].cells) == [cell]
    (said,) = verdict([one], [])
    assert said.startswith("guided against plain: no difference found (-2.9 points [-4.9, -0.9], Holm p 1.000)")
    assert words in said


def test_verdicts_in_words() -> None:
    noise = {"base": "noise", "control": True}
    assert verdict([compared(0.0, holm=1.0)], []) == ["guided against plain: no task differs."]
    beside = "; against its null control noise: +1.0 points [-1.0, +3.0], Holm p 1.000."
    for value, p, words in ((0.0, 1.0, "no task differs"), (-0.029, 1.0, MISSED), (-0.05, 0.04, "Holm p 0.040)")):
        (said,) = verdict([compared(value, holm=p, blends=True), compared(0.01, holm=1.0, **noise)], [])
        assert said.endswith(words + beside)
        (said,) = verdict([compared(value, holm=p, blends=True)], [])
        assert said.endswith(words + "; it has no null control here.")
    many = [compared(-0.029, holm=1.0, arm=str(n), finds=Findable(possible=False), contexts=8) for n in range(7)]
    assert all("; 8 contexts cannot find anything in 7 comparisons." in one for one in verdict(many, []))
    assert verdict([compared(-0.05, holm=0.04)], []) == [
        "guided against plain: worse (-5.0 points [-7.0, -3.0], Holm p 0.040)."
    ]
    assert verdict([compared(0.05, holm=0.05)], []) == [
        "guided against plain: better (+5.0 points [+3.0, +7.0], Holm p 0.050)."
    ]
    alone = compared(-0.05, holm=0.04)._replace(holm=0.16)  # its interval is without 0
    assert "[-7.0, -3.0], Holm p 0.160; without Holm, as the interval is, 0.040); gains" in verdict([alone], [])[0]
    (lonely,) = verdict([compared(0.05, holm=0.05, blends=True)], [])
    assert lonely.endswith(
        "Holm p 0.050); it has no null control here, so what helps need not be what the readout knows."
    )
    (beaten,) = verdict([compared(0.05, holm=0.01), compared(0.04, holm=0.02, **noise)], [])
    assert (
        "better (+5.0 points [+3.0, +7.0], Holm p 0.010), and better than its null control noise (+4.0 points" in beaten
    )
    for value, p in ((0.04, 0.06), (-0.04, 0.01), (0.0, 1.0)):
        (level,) = verdict([compared(0.05, holm=0.01), compared(value, holm=p, **noise)], [])
        assert "but not shown to be better than its null control noise" in level
    weak = compared(0.0, holm=1.0, **noise, strength="unmatched: mean total variation 0.100, guided's 0.200")
    (beside,) = verdict([compared(0.0, holm=1.0, blends=True), weak], [])
    assert "against its null control noise [unmatched: mean total variation 0.100, guided's 0.200]: " in beside
    both = [compared(0.05, holm=0.01), compared(0.04, holm=0.2, **noise), compared(0.1, holm=0.01, arm="noise")]
    assert len(verdict(both, [])) == 1  # the control has no sentence of its own
    one = [Graded(str(n), "only", str(n), "", "", float(n < 2), (0, 0), None) for n in range(4)]
    assert verdict([], one)[0].startswith("One arm, nothing to compare: only solves 50.0% [")
    two = [*one, one[0]._replace(arm="other", score=None)]
    assert verdict([], two) == [
        "Nothing was compared (lossless arms give one distribution's answers): name a baseline with --against.",
        "1 of 5 answers have no score and are in no comparison.",
    ]


class Parsed(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, frozenset[str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, frozenset(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    pages = []
    for text in ("t", HOSTILE):
        rows = []
        for n in range(8):
            for arm in ("plain", "guided"):
                row = our_row(n, arm, n % 2)
                row["dgd"]["arm"] = f"{arm} {text}"
                row["metadata"] |= {"context_category": f"{n % 2} {text}", "sub_category": f"{n % 2} {text}"}
                rows.append(row)
        report(write(tmp_path / "run" / "graded.jsonl", rows), out=tmp_path)
        pages.append(Parsed((tmp_path / "report.html").read_text()))
    benign, hostile = pages
    titles = ("title", frozenset())  # of labels cut short
    assert [e for e in hostile.elements if e != titles] == [e for e in benign.elements if e != titles]
    assert not any(name.startswith("on") or name in ("src", "href") for _, names in hostile.elements for name in names)
    assert "script" not in {tag for tag, _ in hostile.elements}
    assert hostile.text.count(visible(f"guided {HOSTILE}")) > 3


def test_a_picture_s_places_follow_its_numbers() -> None:
    picture = intervals("p", [Line("a", 10.0, 5.0, 20.0, "10%"), Line("b", 20.0, hollow=True)])
    (first, second) = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', picture))
    low, high = (float(x) for x in re.search(r"M([\d.]+) 20.0H([\d.]+)", picture).groups())  # type: ignore[union-attr]
    assert high == second
    assert (first - low) * 2 == pytest.approx(second - first, abs=0.2)  # 5 and 10 of one scale
    flat = intervals("p", [Line("a", 0.0)], around_zero=True)
    assert flat.count("<circle") == 1
    forest = intervals("p", [Line("a", -3.0, -9.4, 0.0)], unit="", around_zero=True)
    ticks = re.findall(r">([+-]?[\d.]+)</text>", forest)
    assert ticks == ["-10", "-5", "0", "+5", "+10"]


def test_the_report_starts_without_torch() -> None:
    code = "import sys, dgd_lightning.commands.report as r; r.parse_options(['x']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_studies_keep_contexts_of_pooled_tasks(tmp_path: Path) -> None:
    runs = read_runs([run(tmp_path / name, range(6), ARMS) for name in ("a", "b")])
    pooled = study(runs, pool=True, common=False, against=None)
    assert len({one.idx for one in pooled.scores}) == 12
    assert {one.context for one in pooled.scores} == {"context-0", "context-1"}


def test_pooled_files_of_another_program_are_arms_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"idx": f"t{n}", "model_output": "x", "score": n % 2, "requirement_status": []} for n in range(4)]
        (tmp_path / name / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = read_runs([tmp_path / name / "graded.jsonl" for name in ("a", "b")])
    one, other = (run.label for run in runs)
    assert [versus[:2] for versus in study(runs, pool=True, common=False, against=other).wanted] == [(one, other)]
    assert [versus[:2] for versus in study(runs, pool=True, common=False, against=one).wanted] == [(other, one)]
