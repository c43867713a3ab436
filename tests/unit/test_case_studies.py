"""Case studies: which tasks are shown, what stands on the page, and that no text of a run becomes markup."""

from __future__ import annotations

import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.callbacks.divergence import CaseStudies
from dgd_lightning.errors import InputError
from dgd_lightning.grader import CHECK, checked, package_graders
from dgd_lightning.metrics.divergence import TokenDivergence
from dgd_lightning.report import case_studies
from dgd_lightning.report.case_studies import PAGE, Selection, main
from dgd_lightning.report.text import visible
from dgd_lightning.types import Score

VERDICT = partial(checked, graders=package_graders({}, costs=[CHECK]))
HOSTILE = (
    "</pre></style><script>alert('1')</script>\" onmouseover=\"x() & <img src=x onerror=y>' "
    "\x00\x1b\x85\u202e\ud800 &amp;"
)
KNOWN = set(
    "html head meta title style body main h1 h2 h3 h4 p strong b span div table tr th td nav ol li a section details "
    "summary pre article code br".split()
)
ATTRIBUTES = {
    "meta": {"charset", "name", "content", "http-equiv"}, "html": {"lang"}, "a": {"href"}, "section": {"id"},
    "p": {"class"}, "b": {"class"}, "span": {"class", "title"}, "div": {"class", "dir"}, "table": {"class"},
    "td": {"class"}, "pre": {"dir"}, "code": {"class"},
}  # fmt: skip


def divergence(tokens: list[str], changed: list[int], moved: list[float], top: list[Any] = ()) -> dict[str, Any]:  # type: ignore[assignment]
    record: dict[str, Any] = {name: [0.5] * len(tokens) for name in TokenDivergence._fields}
    ranks = {"target_rank": [3] * len(tokens), "readout_rank": [1] * len(tokens)}
    return {
        **record,
        **ranks,
        "beta": 0.3,
        "tokens": tokens,
        "argmax_changed": changed,
        "tv_target_guided": moved,
        "top": list(top),
    }


def choose(rows: list[dict[str, Any]], limit: int) -> Selection:
    return case_studies.choose(rows, limit, VERDICT)


def page(title: str, rows: list[dict[str, Any]], selection: Selection) -> str:
    return case_studies.page(title, rows, selection, VERDICT)


def row(idx: str, arm: str, answer: str | None, **more: Any) -> dict[str, Any]:
    """A prediction row of a task that "red" solves."""
    checks = {"checks": [{"type": "contains", "value": "red"}], "prior": "novel", "prior_answer": None}
    settings = {"beta": 0.3, "readout": "draft", **more.pop("settings", {})}
    record = {"arm": arm, "method": "Guided", "settings": settings, "tokens": 3, **more}
    return {
        "idx": idx,
        "messages": [{"role": "user", "content": f"It is red.\n\nWhich colour is {idx}?"}],
        "rubrics": ["The response is red."],
        "metadata": {"context_id": "c", "context_category": "Facts", "lab": checks},
        "model_output": answer,
        "dgd": record,
    }


class Parsed(HTMLParser):
    """The page as a browser splits it: elements with their attributes, and the text in each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.elements
            if name == tag and attributes.items() <= found.items()  # type: ignore[operator]
        ]


def test_tasks_that_arms_disagree_on_come_first_then_those_with_most_changes() -> None:
    rows = []
    for idx, answers, changed in (
        ("same", ("red", "red"), 0),
        ("few", ("blue", "blue"), 1),
        ("many", ("red", "red"), 3),
        ("differs", ("red", "blue"), 0),
        ("differs more", ("blue", "red"), 2),
        ("ungraded", (None, "red"), 0),
    ):
        marks = [1] * changed + [0] * (3 - changed)
        for arm, answer in zip("ab", answers, strict=True):
            found = divergence(["x"] * 3, marks if arm == "b" else [0] * 3, [0.0] * 3) if answer else None
            rows.append(row(idx, arm, answer, divergence=found))
    everything = choose(rows, 99)
    assert [task.idx for task in everything.shown] == ["differs more", "differs", "many", "few", "same", "ungraded"]
    assert [(task.differs, task.changed) for task in everything.shown[:3]] == [(True, 2), (True, 0), (False, 3)]
    assert (everything.tasks, everything.differing, everything.with_changes) == (6, 2, 3)
    first, second = everything.arms["a"], everything.arms["b"]
    assert (first.tasks, first.solved, first.graded, first.changed, first.tokens) == (6, 3, 5, 0, 15)
    assert (second.solved, second.graded, second.changed, second.tokens) == (4, 6, 6, 18)
    three = choose(rows, 3)
    assert three.shown == everything.shown[:3]
    text = Parsed(page("run", rows, three)).text
    assert "3 of 6 tasks" in text
    assert "(2 in all)" in text
    assert "not a statistic" in text
    assert "Which colour is many?" in text
    assert "Which colour is few?" not in text


def test_colours_follow_what_guidance_moved() -> None:
    top = {"at": 1, "target": [["red", 0.7]], "readout": [["blue", 0.9]], "guided": [["blue", 0.6]]}
    record = divergence(["It", " is", "\n", "<|end|>"], [0, 1, 0, 0], [0.009, 0.35, 1.0, 0.011], [top])
    parsed = Parsed(page("run", [row("t", "a", "It is\n", divergence=record)], choose([row("t", "a", "It is\n")], 1)))
    spans = [found for found in parsed.of("span") if found.get("title")]
    assert [found["class"] for found in spans] == ["", "m4 c", "m10", "m1"]
    assert "guided's first: 'blue' 0.600" in (spans[1]["title"] or "")
    assert "guided's" not in (spans[0]["title"] or "")
    assert "It is⏎\n<|end|>" in parsed.text
    assert "not solved" in parsed.text
    assert "✗" in parsed.text


def everywhere(text: str) -> list[dict[str, Any]]:
    """Rows with the text wherever a run can put it."""
    top = {"at": 0, "target": [[text, 0.7]], "readout": [[text, 0.9]], "guided": [[text, 0.6]]}
    record = divergence([text, "x"], [1, 0], [0.5, 0.0], [top])
    readout = {"class_path": f"a.{text}", "init_args": {text: text}}
    hostile = row(text, text, text, divergence=record, method=text, settings={"readout": readout, text: text})
    hostile["messages"] = [{"role": text, "content": text}, {"role": "user", "content": f"{text}\n\n{text}"}]
    hostile["rubrics"] = [text]
    hostile["metadata"].update({"context_id": text, "context_category": text, "sub_category": text})
    plain = row(text, "plain", text)
    foreign: dict[str, Any] = {"idx": "foreign", text: text, "messages": 5, "metadata": text, "model_output": text}
    foreign["dgd"] = {"arm": "plain", "tokens": 1}
    skipped = row(text, "skipped", None, skipped=text)
    answers = [{"text": text, "tokens": 3, "score": -1.5, "beta": 0.3, "stop_reason": text}] * 2
    settings = {"readout": {"class_path": f"a.{text}"}, "rank_by": text}
    reranked = {"method": "Rerank", "settings": settings, "answers": answers, "chosen": 1}
    best = row(text, "best", text, **reranked)
    odd = row("odd", "plain", text)
    odd["metadata"]["lab"] = {"checks": [{"type": text}, 5]}
    return [hostile, plain, skipped, best, foreign, odd]


def test_no_text_becomes_markup() -> None:
    rows = everywhere(HOSTILE)
    text = page(HOSTILE, rows, choose(rows, 9))
    text.encode()  # no half characters are left
    parsed = Parsed(text)
    benign = Parsed(page("t", everywhere("t"), choose(everywhere("t"), 9)))
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in benign.elements]
    assert {tag for tag, _ in parsed.elements} <= KNOWN
    for tag, attributes in parsed.elements:
        assert attributes.keys() <= ATTRIBUTES.get(tag, set()), (tag, attributes)
        assert all("javascript" not in (value or "") for value in attributes.values())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert parsed.text.count(visible(HOSTILE)) > 15  # and nothing is lost
    (policy,) = parsed.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in (policy["content"] or "")
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#case-)", re.sub(r"&\w+;", "", text.partition("<body>")[2]))
    assert "url(" not in text


def test_all_answers_among_which_one_was_chosen_are_folded_below_it() -> None:
    answers = [
        {"text": "red", "tokens": 3, "score": -2.5, "beta": 0.0, "stop_reason": "stop"},
        {"text": "blue", "tokens": 4, "score": -0.25, "beta": 0.3, "stop_reason": "length"},
        {"text": "black", "tokens": 4, "score": None, "beta": 0.5, "stop_reason": "stop"},
    ]
    settings = {"rank_by": "blend", "num_answers": None, "betas": [0.0, 0.3, 0.5], "beta": 0.1, "space": "probs"}
    reranked = {"method": "Rerank", "settings": {**settings, "candidates": 50, "plausibility": None}}
    best = row("t", "best", "blue", **reranked, answers=answers, chosen=1)
    guided = row("t", "guided", "red", settings={"candidates": 50})
    text = page("run", [best, guided], choose([best, guided], 1))
    parsed = Parsed(text)
    assert "3 answers, of which number 2 was chosen" in parsed.text
    assert "✓ 1. score -2.5 · β 0 · 3 tokens · stop" in parsed.text
    assert "✗ 2. score -0.25 · β 0.3 · 4 tokens · length" in parsed.text
    assert "✗ 3. score −∞ · β 0.5" in parsed.text
    assert text.index("<summary>3 answers") > text.index('<div class="answer" dir="auto">blue')
    assert parsed.text.count("answers, of which") == 1  # the guided arm has one answer


def test_settings_are_shown_where_arms_differ() -> None:
    lens = {"class_path": "dgd_lightning.decode.readouts.logit_lens.LogitLens", "init_args": {"layer": 3, "norm": None}}
    rows = [
        row("t", "guided", "red", settings={"space": "logits"}),
        row("t", "lens", "red", settings={"readout": lens, "space": "probs"}, temperature=1.0, ttt={"kept": True}),
        row("t", "zero", "red", settings={"beta": 0.0, "space": None}, temperature=0.0, ttt=None),
    ]
    text = Parsed(page("run", rows, choose(rows, 1))).text
    assert "beta 0.3 · readout draft · space logits" in text
    assert "beta 0.3 · readout LogitLens(layer=3) · space probs · temperature 1.0 · ttt True" in text
    assert "beta 0.0 · readout draft1" in text.replace("\n", "")  # and nothing behind it: no space, no temperature
    assert "Guided" not in text  # which all are
    assert "method Guided · beta 0.3" in Parsed(page("run", rows[:1], choose(rows[:1], 1))).text


def test_verdicts_of_any_grader_are_shown_and_rubrics_only_where_it_says_which_hold() -> None:
    def exact(row: dict[str, Any], answer: str) -> Score:
        return Score(float(answer == "red"), [], "compared")

    rows = [row("t", "a", "red"), row("t", "b", "blue")]
    del rows[1]["rubrics"]
    for some in (rows, rows[::-1]):
        text = Parsed(case_studies.page("run", some, case_studies.choose(some, 1, exact), exact)).text
        assert ("not solved" in text, "Rubrics" in text, "arms differ" in text) == (True, False, True)


def test_visible_keeps_what_can_be_seen() -> None:
    assert visible("é中😀\n\t\u200d") == "é中😀\n\t\u200d"
    assert visible("a\x00\x1b\x7f\x9b\u202e\ud800") == "a␀␛␡\ufffd⟨U+202E⟩\ufffd"


def test_a_finished_folder_gets_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "version_0"
    folder.mkdir(parents=True)
    assert main([str(folder)]) == 2
    assert "folder: expected a run folder" in capsys.readouterr().err
    rows = [row(f"t{i}", arm, "red" if i or arm == "a" else "blue") for i in range(3) for arm in "ab"]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert main([str(folder), "--limit", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / PAGE)
    parsed = Parsed((folder / PAGE).read_text())
    assert [found["id"] for found in parsed.of("section")] == ["case-1"]
    assert "Case studies: run/version_0" in parsed.text
    assert main([str(folder), "--limit", "0"]) == 2
    with pytest.raises(InputError, match=r"^CaseStudies\.limit: "):
        CaseStudies(0)
