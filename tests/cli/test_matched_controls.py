"""Null controls as strong as what they control: scales that are found, kept, reused, refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import Dgd, predictions, write_jsonl

from dgd_lightning import load_pair
from dgd_lightning.data.tasks import by_context
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.lab.contexts import LabContexts
from dgd_lightning.methods.guided import Guided
from dgd_lightning.methods.rerank import Rerank
from dgd_lightning.modules.arms import Arm, control_of
from dgd_lightning.modules.matching import (
    FILE,
    MatchControls,
    Text,
    answers,
    effects,
    find_scale,
    guided_controls,
    in_words,
    match,
    scaled_methods,
)
from dgd_lightning.modules.prompts import prompt_of

DRAFT = {"name": "draft", "method": {"class_path": "Guided", "init_args": {"beta": 0.3}}}


def control(name: str, **readout: Any) -> dict[str, Any]:
    kind = readout.pop("kind", "Noise")
    method = {"beta": 0.3, "readout": {"class_path": kind, "init_args": readout}}
    return {"name": name, "method": {"class_path": "Guided", "init_args": method}}


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    settings = {
        "name": "lab",
        "logs_dir": str(tmp_path / "logs"),
        "model": {
            "class_path": "Decoding",
            "init_args": {
                "target": "lab", "draft": "lab", "cpu_threads": 1, "max_new_tokens": 12, "warmup": False,
                "arms": [DRAFT, control("noise")],
                "match_controls": {"contexts": 2, "tokens": 16},
            },
        },
        "data": {
            "class_path": "LabContexts",
            "init_args": {"families": ["tariff", "simulation"], "contexts_per_family": 2, "limit": 3},
        },
        "trainer": {"accelerator": "cpu", "devices": 1},
    }  # fmt: skip
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "lab.yaml"


@pytest.mark.parametrize("wanted", [0.002, 0.2, 0.9])
def test_the_scale_of_a_known_curve(wanted: float) -> None:
    found = find_scale(lambda scales: [1 - math.exp(-scale / 3) for scale in scales], wanted)
    assert found == pytest.approx(max(-3 * math.log(1 - wanted), 2**-5.5), rel=0.01)


@pytest.mark.parametrize(("contexts", "others"), [(2, 2), pytest.param(8, 22, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", ["tv", "argmax"])
def test_matched_controls_are_as_strong_elsewhere_too(by: str, contexts: int, others: int) -> None:
    """Where the scale was found, and in other contexts of the same kind: within 15% on more than twenty of them."""
    pair = load_pair("lab", "lab", device="cpu", dtype="float32")
    data = LabContexts(contexts_per_family=(contexts + others) // 2, families=["star_chart", "ledger"], seed=11)
    chosen = by_context(data.tasks)
    texts = [
        [
            Text(prompt, answers(pair, [prompt], 64)[0], None)
            for prompt in map(partial(prompt_of, pair, enable_thinking=False), own)
        ]
        for own in (chosen[name] for name in sorted(chosen, key=lambda name: (name.rpartition("-")[2], name)))
    ]
    arms = [Arm("draft", Guided(0.3)), Arm("noise", Guided(0.3, readout=Noise()))]
    methods = {arm.name: arm.method for arm in arms}
    found = match(pair, arms, methods, [text for part in texts[:contexts] for text in part], by)  # type: ignore[arg-type]
    own, theirs = found["noise"]["tv" if by == "tv" else "argmax_changed"]
    assert own == pytest.approx(theirs, rel=0.05 if by == "tv" else 0.3)  # a share of few tokens moves in steps
    draft, noise = (
        [effects(pair, part, method.guidance_of({}), [1.0], False)[0].tv for part in texts[contexts:]]
        for method in scaled_methods(methods, found).values()
    )
    ratio = ratio_interval(list(zip(noise, draft, strict=True)))
    print(f"control over draft on {others} other contexts: {ratio}")
    if by == "tv" and others > 20:
        assert ratio[0] == pytest.approx(1, abs=0.15)


def ratio_interval(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """A ratio of sums, with a 95% interval by the jackknife over contexts."""

    def ratio(some: list[tuple[float, float]]) -> float:
        return sum(one for one, _ in some) / sum(other for _, other in some)

    count, whole = len(pairs), ratio(pairs)
    left = [ratio(pairs[:n] + pairs[n + 1 :]) for n in range(count)]
    error = math.sqrt((count - 1) / count * sum((one - sum(left) / count) ** 2 for one in left))
    return whole, whole - 2.08 * error, whole + 2.08 * error


def test_scales_are_found_before_decoding_kept_and_reused(dgd: Dgd, lab: Path, tmp_path: Path) -> None:
    run = dgd("predict", "--config", lab)
    assert run.code == 0, run.err
    folder = tmp_path / "logs" / "lab" / "version_0"
    found = json.loads((folder / FILE).read_text())
    assert found.keys() == {"noise"}
    for name, one in found.items():
        assert one["matched"], one
        assert one["tv"][0] == pytest.approx(one["tv"][1], rel=0.05)
        rows = [row["dgd"] for row in predictions(folder) if row["dgd"]["arm"] == name]
        assert {row["settings"]["readout"]["init_args"]["scale"] for row in rows} == {one["scale"]}
        assert {row["control_of"] for row in rows} == {"draft"}
        assert rows[0]["matched"] == {key: value for key, value in one.items() if key != "settings"}
        assert f"control {name} (scale {one['scale']:.3g}): mean total variation" in run.out
    # Neither limit nor order counts: the data's own contexts do. An interrupted run reads what it found.
    run = dgd("predict", "--config", lab, "--data.limit", "1", "--name", "other")
    assert json.loads((tmp_path / "logs" / "other" / "version_0" / FILE).read_text()) == found
    changed = {**found, "noise": {**found["noise"], "scale": 2.5}}
    (folder / FILE).write_text(json.dumps(changed))
    (folder / "DONE").unlink()
    (folder / "predictions.jsonl").unlink()
    run = dgd("predict", "--config", lab)
    assert run.code == 0, run.err
    assert "control noise (scale 2.5)" in run.out
    run = dgd("predict", "--config", lab, "--name", "third", "--model.match_controls", f"{{scales: {folder}}}")
    assert run.code == 0, run.err
    assert "control noise (scale 2.5)" in run.out
    arms = json.dumps([DRAFT, control("noise", seed=3)])
    run = dgd("predict", "--config", lab, "--model.match_controls", f"{{scales: {folder}}}", "--model.arms", arms)
    assert run.code == 2
    assert "model.match_controls.scales: expected a scale for arm noise" in run.err
    assert "other settings" in run.err


def test_a_scale_of_ones_own_is_measured_and_a_control_without_one_too(dgd: Dgd, lab: Path, tmp_path: Path) -> None:
    shuffled = control("shuffled", kind="DraftReadout", features="shuffled")
    arms = [DRAFT, control("noise", scale=7.0), control("entropy", kind="MatchedEntropy"), shuffled]
    run = dgd("predict", "--config", lab, "--model.arms", json.dumps(arms))
    assert run.code == 0, run.err
    found = json.loads((tmp_path / "logs" / "lab" / "version_0" / FILE).read_text())
    assert found["noise"]["scale"] == 7.0
    assert found["entropy"]["scale"] is None
    assert found["shuffled"]["tv"][0] == pytest.approx(found["shuffled"]["tv"][1], rel=0.05)
    assert found["noise"]["tv"][0] > 2 * found["noise"]["tv"][1]
    assert "unmatched: it is another in strength" in run.out


def test_clbench_is_not_calibrated_on(dgd: Dgd, lab: Path, tmp_path: Path) -> None:
    run = dgd("predict", "--config", lab, "--data.clbench", "true")
    assert run.code == 2
    assert "evaluation only" in run.err
    assert "model.match_controls.data" in run.err
    file = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": f"What is the duty on wool? {n}"} for n in range(3)])
    settings = f"{{data: {file}, contexts: 2, tokens: 8}}"
    run = dgd("predict", "--config", lab, "--data.clbench", "true", "--model.match_controls", settings)
    assert run.code == 0, run.err
    assert "control noise (scale" in run.out


def test_adapted_arms_are_matched_with_their_adapters(dgd: Dgd, lab: Path, tmp_path: Path) -> None:
    arms = [{**arm, "ttt": True} for arm in (DRAFT, control("noise"))]
    ttt = "{steps: 2, rank: 2, anchors_per_step: 4, validation_texts: 0, holdout: 0, lr: 0.01}"
    more = ["--model.arms", json.dumps(arms), "--model.ttt", ttt, "--data.limit", "null"]
    run = dgd("predict", "--config", lab, *more)
    assert run.code == 0, run.err
    (one,) = json.loads((tmp_path / "logs" / "lab" / "version_0" / FILE).read_text()).values()
    assert one["tv"][0] == pytest.approx(one["tv"][1], rel=0.05)
    assert all(row["dgd"]["ttt"]["steps"] == 2 for row in predictions(tmp_path / "logs" / "lab" / "version_0"))


def test_words() -> None:
    one = {"scale": None, "words": "share of changed top-1 tokens 0.200, draft's 0.100", "matched": False}
    assert in_words({"c": one}) == [
        "control c (has no scale): share of changed top-1 tokens 0.200, draft's 0.100, unmatched: it is another in "
        "strength"
    ]
    assert MatchControls().fingerprint()["contexts"] == 8


def test_reranking_has_no_strength_at_a_token() -> None:
    betas = Rerank("likelihood", betas=[0.0, 0.3])
    arms = [Arm("draft", betas), Arm("noise", replace(betas, readout=Noise()))]
    assert control_of(arms) == {"noise": "draft"}
    assert guided_controls(arms) == {}
