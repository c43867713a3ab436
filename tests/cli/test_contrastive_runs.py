"""CAD and second models as arms of `dgd predict`: what Python gives, told in rows and provenance; mistakes told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_tools import SHORT, Config, Dgd, TinyPair, byte_tokenizer, chat_row, check_error, predictions, write_jsonl
from hub_cache import NEW, OLD, add_snapshot, set_ref, use
from tiny import hf_model

from dgd_lightning import Noise, OtherModel, WithoutContext, guided_generate, load_pair
from dgd_lightning.methods.guided import Guided
from dgd_lightning.modules.rows import DivergenceSettings, divergence_record
from dgd_lightning.target.load import load_target

CONFIG = Path(__file__).parents[2] / "configs" / "guided" / "contrastive.yaml"
CAD = {"class_path": "WithoutContext"}
VOCAB = 288


def other_model(**init: Any) -> dict[str, Any]:
    return {"class_path": "OtherModel", "init_args": init}


def guided(name: str, readout: Any, beta: float = -0.5) -> dict[str, Any]:
    return {"name": name, "method": {"class_path": "Guided", "init_args": {"beta": beta, "readout": readout}}}


def by_arm(folder: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for row in predictions(folder):
        rows.setdefault(row["dgd"]["arm"], {})[row["idx"]] = row["dgd"]
    return rows


def small_model(folder: Path, seed: int, **changes: Any) -> Path:
    settings = {"vocab_size": VOCAB, "max_position_embeddings": 512, "num_hidden_layers": 2, **changes}
    hf_model(seed=seed, dtype=torch.float32, **settings).save_pretrained(folder)
    return folder


def test_the_lab_decodes_with_cad_and_a_second_model(dgd: Dgd, tmp_path: Path) -> None:
    settings = yaml.safe_load(CONFIG.read_text())
    settings["model"]["init_args"] |= {"max_new_tokens": 24, "divergence": {"top": 0}}
    settings["data"]["init_args"] |= {"contexts_per_family": 1, "families": ["cipher"], "batch_size": 3}
    settings |= {"logs_dir": str(tmp_path), "name": "lab"}
    settings["trainer"]["accelerator"] = "cpu"
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(settings))
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err
    rows = by_arm(tmp_path / "lab" / "version_0")
    tokens = {name: [row["output_ids"] for row in arm.values()] for name, arm in rows.items()}
    assert tokens["second model"] == tokens["target"]  # the null: blended with itself
    assert tokens["cad"] != tokens["target"]
    assert tokens["cad noise"] not in (tokens["cad"], tokens["target"])
    # decoded three at a time, replayed one by one: each task against its own prompt without the context
    assert all(js > 0 for row in rows["cad"].values() for js in row["divergence"]["js"][:1])
    assert all(max(row["divergence"]["js"]) < 1e-4 for row in rows["second model"].values())
    for row in rows["cad"].values():
        read = WithoutContext([torch.tensor(row["without_context_ids"])])
        alone = divergence_record(
            load_pair("lab", "lab", device="cpu"),
            Guided(beta=-0.5, readout=read, plausibility=0.1).guidance_of({}),
            torch.tensor(row["prompt_ids"]),
            torch.tensor(row["output_ids"]),
            DivergenceSettings(top=0),
        )
        assert alone is not None
        assert row["divergence"]["js"] == pytest.approx(alone["js"], abs=1e-4)
    tokenizer = load_pair("lab", None, device="cpu").tokenizer
    bare = tokenizer.decode(rows["cad"]["lab-cipher-0-0-1"]["without_context_ids"])  # type: ignore[union-attr]
    assert bare == "<|im_start|>user\nHow do we write green?<|im_end|>\n<|im_start|>assistant\n"


def test_arms_give_what_the_function_gives(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    second = small_model(tmp_path / "second", seed=7)
    arms = [
        guided("cad", CAD),
        guided("noise", {"class_path": "Noise", "init_args": {"like": CAD}}),
        guided("two", other_model(model=str(second))),
    ]
    run = dgd("predict", "--config", config({"arms": arms}, {"path": str(contexts), "batch_size": 2, "limit": 4}))
    assert run.code == 0, run.err
    folder = tmp_path / "logs" / "run" / "version_0"
    rows = by_arm(folder)
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    two = OtherModel(load_target(second, dtype=torch.float64, device="cpu"))
    bare_rows = [chat_row(*map(int, idx[1:].split("-"))) for idx in rows["cad"]]
    for message, row in ((bare["messages"][-1]["content"], bare["metadata"]["task_id"]) for bare in bare_rows):
        bare = torch.tensor(byte_tokenizer().encode(f"<s>user:{message}<e><s>assistant:", add_special_tokens=False))
        cad = WithoutContext([bare])
        for name, readout in (("cad", cad), ("noise", Noise(cad)), ("two", two)):
            told = rows[name][row]
            prompt = torch.tensor(told["prompt_ids"])
            (output,) = guided_generate(pair, [prompt], max_new_tokens=SHORT, beta=-0.5, readout=readout)
            assert told["output_ids"] == output.tokens.tolist(), (name, row)
            assert told.get("without_context_ids") == (None if name == "two" else bare.tolist())
    different = {name: [row["output_ids"] for row in arm.values()] for name, arm in rows.items()}
    assert len({str(tokens) for tokens in different.values()}) == 3


def test_a_second_model_of_the_hub_is_pinned(
    config: Config, dgd: Dgd, contexts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, commit in ((7, OLD), (8, NEW)):
        add_snapshot(tmp_path / "hub", "org/second", commit, small_model(tmp_path / commit, seed))
    for name, commit in (("main", NEW), ("v1", OLD)):
        set_ref(tmp_path / "hub", "org/second", name, commit)
    use(tmp_path / "hub", monkeypatch)
    readouts = [other_model(model="org/second", revision="v1"), other_model(model="org/second")]
    arms = [guided("old", {"class_path": "MatchedEntropy", "init_args": {"like": readouts[0]}})]
    arms += [guided("new", readouts[1])]
    path = config({"arms": arms, "max_new_tokens": 2}, {"path": str(contexts)})
    assert dgd("predict", "--config", path).code == 0
    provenance = json.loads((tmp_path / "logs" / "run" / "version_0" / "provenance.json").read_text())
    assert provenance["model"]["second_models"] == [f"org/second@{OLD}", f"org/second@{NEW}"]
    set_ref(tmp_path / "hub", "org/second", "main", OLD)  # main moved: another run
    assert dgd("predict", "--config", path).code == 0
    again = json.loads((tmp_path / "logs" / "run" / "version_1" / "provenance.json").read_text())
    assert again["config_hash"] != provenance["config_hash"]
    bad = guided("x", other_model(model="org/second", revision="v9"))
    check_error(dgd("predict", "--config", config({"arms": [bad]})), "model.arms[x].method.readout.revision", "v9")


def test_mistakes_are_one_line(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    wide = small_model(tmp_path / "wide", seed=0, vocab_size=VOCAB + 1)
    run = dgd("predict", "--config", config({"arms": [guided("x", other_model(model=str(wide)))]}))
    check_error(run, "model.arms[x].method.readout.model", f"vocabulary of {VOCAB}", str(VOCAB + 1))
    run = dgd("predict", "--config", config({"arms": [guided("x", other_model(model="./nowhere"))]}))
    check_error(run, "model.arms[x].method.readout.model", "no such folder")
    (tmp_path / "empty").mkdir()
    run = dgd("predict", "--config", config({"arms": [guided("x", other_model(model=str(tmp_path / "empty")))]}))
    check_error(run, f"readout.model {tmp_path / 'empty'}", "config.json")
    questions = [{"prompt": "Six times six?"}, {"prompt": "Six times seven?"}]
    data = {"path": str(write_jsonl(tmp_path / "questions.jsonl", questions))}
    nothing = {"class_path": "Noise", "init_args": {"like": CAD}}
    run = dgd("predict", "--config", config({"arms": [guided("x", nothing)]}, data, data_class="PromptsData"))
    check_error(run, "task questions-1, readout WithoutContext of arm x", "a question alone")
    assert not list((tmp_path / "logs").rglob("version_*"))
