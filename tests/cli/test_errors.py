"""Every mistake ends with exit code 2 and one line on stderr that names argument, expected, received and hint."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import SHORT, Config, Dgd, Run, TinyPair, byte_tokenizer, chat_row, ranks_of, write_jsonl
from cli_tools import check_error as check
from fork_server import launch, launched
from tiny import hf_model, make_draft

from dgd_lightning import run_folder
from dgd_lightning.checks import check_folder_name
from dgd_lightning.commands.errors import from_parser_message
from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.errors import InputError
from dgd_lightning.target.model import Target


def without(key: str) -> dict[str, Any]:
    row = chat_row(1, 0)
    holder = row["metadata"] if key in row["metadata"] else row
    del holder[key]
    return row


BAD_DATA = {
    "empty": ([], "data.path", "empty file"),
    "malformed": ([chat_row(0, 0), '{"messages": ['], "data.path line 2", "valid JSON"),
    "no object": ([chat_row(0, 0), "[1, 2]"], "data.path line 2", "a JSON object"),
    "no messages": ([without("messages")], "data.path line 1", "'messages'"),
    "no rubrics": ([without("rubrics")], "data.path line 1", "'rubrics'"),
    "no task id": ([without("task_id")], "data.path line 1", "'metadata.task_id'"),
    "no category": ([without("context_category")], "data.path line 1", "'metadata.context_category'"),
    "metadata text": ([chat_row(0, 0, metadata="x")], "data.path line 1", "'metadata.context_id'"),
    "role": ([chat_row(0, 0, messages=[{"role": "me", "content": "x"}])], "data.path line 1", "'role'"),
    "content": ([chat_row(0, 0, messages=[{"role": "user", "content": 3}])], "data.path line 1", "'content'"),
    "twice": ([chat_row(0, 0), chat_row(1, 0), chat_row(0, 0)], "data.path line 3", "already at data.path line 1"),
    "a half": (
        [chat_row(0, 0, metadata={**chat_row(0, 0)["metadata"], "task_id": "\ud800"})],
        "data.path line 1",
        "UTF-8",
    ),
    "answered": (
        [chat_row(0, 0, messages=[*chat_row(0, 0)["messages"], {"role": "assistant", "content": "x"}])],
        "data.path line 1",
        "to be answered",
    ),
    "unread": (
        [chat_row(0, 0, messages=[{"role": "user", "content": "x", "name": "Ann"}])],
        "task t0-0",
        "received name",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(config: Config, dgd: Dgd, tmp_path: Path, case: str) -> None:
    rows, argument, word = BAD_DATA[case]
    if case == "metadata text":
        word = "'metadata.task_id'"
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    check(dgd("predict", "--config", config(data={"path": str(path)})), argument, word)


def test_a_table_s_answers_reach_no_prompt(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('question,answer\n"1 + 1, in words?",#### GOLD\n')
    arms = [{"name": "ar", "method": "Autoregressive"}]
    data = {"path": str(tmp_path / "q.csv"), "field": "question"}
    path = config(model={"arms": arms, "draft": None, "max_new_tokens": 1}, data=data, data_class="PromptsData")
    assert dgd("predict", "--config", path).code == 0
    (row,) = run_folder.read_predictions(tmp_path / "logs/run/version_0")
    assert (row["question"], row["answer"]) == ("1 + 1, in words?", "#### GOLD")
    assert byte_tokenizer().decode(row["dgd"]["prompt_ids"]) == "<s>user:1 + 1, in words?<e><s>assistant:"
    (tmp_path / "q.data").write_text("question,answer\nWhy?,because\n")
    check(dgd("predict", "--config", path, "--data.path", str(tmp_path / "q.data")), "data.path", "q.data", ".csv")


def test_names_stay_in_their_folder(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    for name in ("/out", "a/../../b", "a//b", "a/", "a\\b", "..", ".", "", "a\nb", "a\0b", "\ud800"):
        with pytest.raises(InputError, match=r"^name: expected the name of a folder inside logs_dir, received '"):
            check_folder_name("name", name)
    for name in ("..a b-1.é", "study/a"):
        assert check_folder_name("name", name) == name
    leaving = ["--name", "../out"]
    search = ["--base", str(config()), "--arm", "dflash", "--search", "{model.arms: [1]}", "--objective", "tau"]
    check(dgd("predict", "--config", config(), *leaving), "name", "the name of a folder inside logs_dir", "'../out'")
    check(dgd("sweep", *search, *leaving), "name", "the name of a folder inside logs_dir")
    loggers = {"TensorBoardLogger": {"name": "../out"}, "CSVLogger": {"name": "x", "version": "../../y"}}
    for kind, settings in loggers.items():
        logger = {"class_path": kind, "init_args": {"save_dir": str(tmp_path / "logs"), **settings}}
        check(dgd("predict", "--config", config(trainer={"logger": logger})), "trainer.logger", "save_dir")
    assert not any((tmp_path / name).exists() for name in ("logs", "out", "y"))


def test_missing_data_file(config: Config, dgd: Dgd) -> None:
    check(dgd("predict", "--config", config(data={"path": "nowhere.jsonl"})), "data.path", "nowhere.jsonl")


@pytest.mark.parametrize(
    ("arguments", "argument", "word"),
    [
        (["--model.init_args.max_new_tokens", "0"], "model.max_new_tokens", "at least 1"),
        (["--model.init_args.max_new_tokens", "512"], "model.max_new_tokens", "512 positions"),
        (["--model.init_args.max_new_token", "5"], "model.max_new_token", "did you mean 'max_new_tokens'"),
        (["--model.init_args.target", "no/where"], "target", "no/where"),
        (["--model.init_args.draft", "no/where"], "draft", "no/where"),
        (["--model.init_args.draft", "null"], "model.draft", "null"),
        (["--data.init_args.category", "Nothing"], "data.category", "Facts, Rules"),
        (["--data.init_args.limit", "0"], "data.limit", "at least 1"),
        (["--trainer.devices", "5", "--trainer.strategy", "ddp"], "trainer.devices", "at most 3 ranks"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision", "model.dtype"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run", "data.limit"),
        (["--trainer.logger", "false"], "trainer.logger", "false"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path", "nowhere.ckpt"),
        (["--trainer.accelerator", "abacus"], "trainer", "abacus"),
        (["--trainer.max_epochs", "many"], "trainer.max_epochs", "many"),
        (["--nonsense", "1"], "--nonsense", "known argument"),
        (["--config", "nowhere.yaml"], "--config", "nowhere.yaml"),
        (["--logs_dir", "/dev/null/logs"], "logs_dir", "can be written"),
    ],
)  # fmt: skip
def test_bad_arguments(config: Config, dgd: Dgd, arguments: list[str], argument: str, word: str) -> None:
    check(dgd("predict", "--config", config(), *arguments), argument, word)


def test_refused_runs_leave_no_version_behind(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    check(dgd("predict", "--config", config(), "--trainer.logger", "false"), "trainer.logger")
    check(dgd("predict", "--config", config(), "--trainer.fast_dev_run", "true"), "trainer.fast_dev_run")
    check(dgd("predict", "--config", config(), "--trainer.accelerator", "abacus"), "trainer")
    assert not list((tmp_path / "logs").rglob("version_*"))


ARMS_ALIKE = {"a": ", temperature: 0.5", "b": "", "c": ""}


def test_check_shows_what_a_run_comes_to_and_writes_nothing(
    config: Config, dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgd_lightning.modules.pair_source.load_pair", None)  # no weights
    run = dgd("predict", "--config", config(), "--check")
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "arm ar",
        "arm dflash",
        "arm warm",
        "pair",
        "data",
        "dtype auto",
        "run folder",
    ]
    assert lines[4] == "data: ContextsData, tasks 6, contexts 4, groups 3"
    assert lines[6] == f"run folder: {tmp_path / 'logs/run/version_0'} (new)"
    assert not (tmp_path / "logs").exists()
    typed = ", ".join(f"{{name: {name}, method: Speculative{more}}}" for name, more in ARMS_ALIKE.items())
    run = dgd("predict", "--config", config(), "--check", "--model.arms", f"[{typed}]")
    assert run.out.splitlines()[:3] == [  # nothing of the file's, whose last one draws at 0.8
        "arm a: Speculative; temperature 0.5",
        "arm b: Speculative; greedy",
        "arm c: Speculative; greedy",
    ]
    arms = [{"name": "b", **guided(readout={"class_path": "LogitLens", "init_args": {"layer": 9}})}]
    run = dgd("predict", "--config", config({"arms": arms}), "--check")
    check(run, "model.arms[b].method.readout.layer", "0…3")


START_MISTAKES = {
    "in the module's setup": ["--trainer.precision", "bf16-mixed"],
    "before the first group": ["--model.init_args.max_new_tokens", "512"],
}


@pytest.mark.parametrize("when", START_MISTAKES)
def test_a_failed_start_leaves_no_version_behind(
    config: Config, dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    free: list[bool] = []

    def discard(folder: Path) -> None:
        wanted = run_folder._hash_of(folder)
        free.append(wanted is not None and run_folder.choose_version(folder.parent, wanted) == int(folder.name[8:]))
        run_folder.discard_start(folder)

    monkeypatch.setattr("dgd_lightning.commands.lightning.discard_start", discard)
    assert dgd("predict", "--config", config(), *START_MISTAKES[when]).code == 2
    assert not (tmp_path / "logs/run/version_0").exists()
    assert free == [False]  # no other run could have gone on with it


def test_a_version_that_was_there_outlives_a_failed_start(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    """Also where it has no row yet: it was continued, not made."""
    mistake = START_MISTAKES["in the module's setup"]
    folder = tmp_path / "logs/run/version_0"
    assert dgd("predict", "--config", config()).code == 0
    (folder / "DONE").unlink()
    (folder / "predictions.jsonl").rename(run_folder.shard(folder, 0))
    for rows in (run_folder.shard(folder, 0).read_bytes(), b""):
        run_folder.shard(folder, 0).write_bytes(rows)
        assert dgd("predict", "--config", config(), *mistake).code == 2
        assert run_folder.shard(folder, 0).read_bytes() == rows
        assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert len(json.loads((folder / "provenance.json").read_text())["sessions"]) == 3


@pytest.mark.slow
def test_a_failed_start_of_two_ranks_leaves_no_version_behind(config: Config, tmp_path: Path) -> None:
    done = launched("predict", "--config", config(), *ranks_of(2), *START_MISTAKES["before the first group"])
    check(Run(done.returncode, done.stdout, done.stderr), "model.max_new_tokens")
    assert not list((tmp_path / "logs").rglob("version_*"))


def test_unknown_yaml_keys(config: Config, dgd: Dgd) -> None:
    check(dgd("predict", "--config", config(modle=3)), "modle", "unknown key")
    check(dgd("predict", "--config", config(trainer={"deviecs": 3})), "trainer.deviecs", "unknown key")
    check(dgd("predict", "--config", config(model={"drafts": "x"})), "model.drafts", "did you mean 'draft'")
    arms = [{"name": "a", "method": "Speculative", "tempreature": 1.0}]
    run = dgd("predict", "--config", config(model={"arms": arms}))
    check(run, "model.arms[a].tempreature", "did you mean 'temperature'")


def guided(**settings: Any) -> dict[str, Any]:
    return {"method": {"class_path": "Guided", "init_args": {"beta": 0.3, **settings}}}


def lens(**settings: Any) -> dict[str, Any]:
    return guided(readout={"class_path": "LogitLens", "init_args": {"layer": 1, **settings}})


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"method": "Speculativ"}, "method", ["Speculativ", "did you mean 'Speculative'?"]),
        ({"method": 3}, "method", ["received 3"]),
        ({"method": "Speculative", "temperature": "warm"}, "temperature", ["warm"]),
        ({"method": "Speculative", "top_k": 1.5}, "top_k", ["1.5"]),
        (guided(beta="strong"), "method.beta", ["strong"]),
        (guided(bta=0.1), "method.bta", ["did you mean 'beta'?"]),
        (guided(plausibility=2.0), "method.plausibility", ["at most 1"]),
        (guided(readout={"class_path": "LogitLns"}), "method.readout.class_path", ["did you mean 'LogitLens'?"]),
        (
            guided(readout={"class_path": "DraftReadout", "init_args": {"block_size": 9}}),
            "method.readout.block_size",
            ["from 2 to 4"],
        ),
        ({"method": "json.JSONDecoder"}, "method", ["received json.JSONDecoder", "subclass of Method"]),
        ({"method": "json.Own"}, "method", ["received json.Own", "has no attribute"]),
        (guided(readout={"class_path": "nowhere.Own"}), "method.readout.class_path", ["No module named 'nowhere'"]),
        (lens(laye=1), "method.readout.laye", ["did you mean 'layer'?"]),
    ],
)
def test_a_wrong_value_names_its_arm(
    config: Config, dgd: Dgd, settings: dict[str, Any], field: str, words: list[str]
) -> None:
    fine = {"name": "a", "method": "Autoregressive"}
    arms = [fine, {"name": "ok", **guided()}, {"name": "b", **settings}, {"name": "c", **settings}]
    check(dgd("predict", "--config", config(model={"arms": arms})), f"model.arms[b].{field}", *words)


OLD_ARMS = {
    "{name: g, method: guided, beta: 0.3}": "{name: g, method: {class_path: Guided, init_args: {beta: 0.3}}}",
    "{name: g, ttt: true, method: guided, beta: 0.1, token_by_token: true, readout: {class_path: Noise}}": (
        "{name: g, ttt: true, method: {class_path: Guided, "
        "init_args: {beta: 0.1, readout: {class_path: Noise}, speculative: false}}}"
    ),
    "{name: r, method: rerank, temperature: 1.0, num_candidates: 4, rank_by: blend, beta: 0.1}": (
        "{name: r, temperature: 1.0, method: {class_path: Rerank, "
        "init_args: {num_answers: 4, rank_by: blend, beta: 0.1}}}"
    ),
    "{name: p, method: autoregressive}": "{name: p, method: Autoregressive}",
    "{name: s, block_size: 4}": "{name: s, method: {class_path: Speculative, init_args: {block_size: 4}}}",
    "{name: n, method: Guided, beta: 0.3}": "{name: n, method: {class_path: Guided, init_args: {beta: 0.3}}}",
}


@pytest.mark.parametrize("old", OLD_ARMS)
@pytest.mark.parametrize("where", ["file", "option", "two words"])
def test_an_arm_of_before_gets_its_new_form(dgd: Dgd, tmp_path: Path, old: str, where: str) -> None:
    arms = f"[{{name: new, method: {{class_path: Guided, init_args: {{beta: 0.1}}}}}}, {old}]"
    (tmp_path / "old.yaml").write_text(f"model:\n  class_path: Decoding\n  init_args:\n    arms: {arms}\n")
    given = {"option": [f"--model.arms={arms}"], "two words": ["--model.init_args.arms", arms]}
    run = dgd("predict", *given.get(where, ["--config", tmp_path / "old.yaml"]))
    check(run, f"model.arms[{old[7]}].method", f"write {OLD_ARMS[old]}", "before 0.2")


def test_settings_beside_a_class_path_are_shown_inside(dgd: Dgd, tmp_path: Path) -> None:
    arms = "[{name: g, method: {class_path: Guided, beta: 0.3, init_args: {space: probs}}}]"
    run = dgd("predict", f"--model.arms={arms}")
    shown = "write {class_path: Guided, init_args: {beta: 0.3, space: probs}}"
    check(run, "model.arms[g].method", "beta beside class_path", shown)
    arms = "[{name: g, method: {class_path: Guided, beta: 0.3, init_args: 3}}]"
    check(dgd("predict", f"--model.arms={arms}"), "model.arms[g].method", "init_args: {beta: 0.3}}")
    for arms in ("[Speculative]", "{mine: {class_path: Guided}}"):
        check(dgd("predict", f"--model.arms={arms}"), "model.arms", "a name and a method", "{name: plain, method: Spec")


def test_help_needs_no_configuration(dgd: Dgd) -> None:
    for asked in (["--data.help=PromptsData"], ["--data.help", "PromptsData"]):
        run = dgd("predict", *asked)
        assert (run.code, "--data.init_args.path" in run.out or "--data.path" in run.out) == (0, True), run.err


@pytest.mark.parametrize("command", ["predict", "fit", "test", "validate"])
def test_a_command_alone_asks_for_a_configuration(command: str) -> None:
    """Before anything large is imported: a process of its own would otherwise take seconds."""
    code = "import sys; from dgd_lightning.commands.main import main; code = main(sys.argv[1:]);"
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    run = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("dgd: error: --config: expected a configuration, received none. Hint: use e.g. `dgd ")


@pytest.mark.parametrize(
    "arms",
    [
        [],
        [{"name": "a", "method": "Speculative"}, {"name": "a", "method": "Speculative"}],
        [{"name": "a", "method": "telepathy"}],
        [{"name": "a", "method": "Speculative", "temperature": -1.0}],
        [{"name": "a", "method": "Speculative", "temperature": 1e-6}],
        [{"name": "a", "method": "Speculative", "temperature": 1.0, "top_k": 0}],
        [{"name": "a", "method": "Speculative", "temperature": 1.0, "top_p": 1.5}],
        [{"name": "a", "method": {"class_path": "Autoregressive", "init_args": {"block_size": 4}}}],
    ],
)
def test_bad_arms(config: Config, dgd: Dgd, arms: list[dict[str, Any]]) -> None:
    run = dgd("predict", "--config", config(model={"arms": arms}))
    check(run, run.err.removeprefix("dgd: error: ").partition(": expected")[0], "")
    assert run.err.startswith("dgd: error: model.arms")


def test_bad_block_size(config: Config, dgd: Dgd) -> None:
    arms = [{"name": "a", "method": {"class_path": "Speculative", "init_args": {"block_size": 9}}}]
    check(dgd("predict", "--config", config(model={"arms": arms})), "model.arms[a].method.block_size", "from 2 to 4")


def test_unknown_class(config: Config, dgd: Dgd) -> None:
    check(dgd("predict", "--config", config(data_class="ContextData")), "data.class_path", "ContextData")


def test_predict_needs_tasks(config: Config, dgd: Dgd) -> None:
    path = config()
    settings = yaml.safe_load(path.read_text())
    del settings["data"]
    path.write_text(yaml.safe_dump(settings))
    check(dgd("predict", "--config", path), "data", "ContextsData, ", "received nothing")
    check(dgd("fit", "--config", config()), "subcommand", "predict, for Decoding")


def test_broken_yaml(dgd: Dgd, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [\n")
    check(dgd("predict", "--config", tmp_path / "broken.yaml"), "--config", "YAML")
    (tmp_path / "shifted.yaml").write_text(
        "model:\n  class_path: Decoding\n  init_args:\n    target: lab\n   draft: lab\n"
    )
    check(dgd("predict", "--config", tmp_path / "shifted.yaml"), "--config", "line 5")
    check(dgd("predict"), "--config", "received none")
    check(dgd("decode"), "subcommand", "predict")


def test_mismatched_pair(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    other = make_draft(Target(hf_model(vocab_size=288, hidden_size=48, head_dim=12)))
    save_draft(other, tmp_path / "draft")
    check(dgd("predict", "--config", config(model={"draft": str(tmp_path / "draft")})), "draft.hidden_size", "32")


def test_wrong_architecture(config: Config, dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    settings = json.loads((tiny_pair.target / "config.json").read_text())
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(
        json.dumps({**settings, "architectures": ["Bert"], "model_type": "bert"})
    )
    run = dgd("predict", "--config", config(model={"target": str(tmp_path / "bert")}))
    assert (run.code, len(run.err.splitlines())) == (2, 1)
    assert "bert" in run.err


@pytest.mark.parametrize("has", ["no template", "no tokenizer"])
def test_chat_needs_a_template(config: Config, dgd: Dgd, tmp_path: Path, has: str) -> None:
    hf_model(vocab_size=288).save_pretrained(tmp_path / "target")
    if has == "no template":
        byte_tokenizer(None).save_pretrained(tmp_path / "target")
    run = dgd("predict", "--config", config(model={"target": str(tmp_path / "target")}))
    check(run, "target", "chat template" if has == "no template" else "with a tokenizer")


def test_foreign_rows_in_the_folder(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    """A folder given by hand (a logger of one's own) may hold rows of another run."""
    write_jsonl(tmp_path / "predictions.rank0.jsonl", [{"idx": "a", "dgd": {"arm": "b", "config_hash": "0"}}])
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": ""}}
    check(dgd("predict", "--config", config(trainer={"logger": logger})), "logs_dir", "another folder")


@pytest.mark.slow
def test_whole_process_prints_one_line(tmp_path: Path) -> None:
    """As a user sees it, with everything that imports and Lightning print."""
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "Decoding", "init_args": {"targt": "x"}}})
    )
    command = [sys.executable, "-m", "dgd_lightning.cli", "predict", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    check(Run(done.returncode, done.stdout, done.stderr), "model.targt", "did you mean 'target'")


def test_some_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """Those that need no class to be looked at load neither torch, seconds of imports, nor scipy's statistics."""
    (tmp_path / "broken.yaml").write_text("model: [\n")
    program = f"""
import sys
from dgd_lightning.cli import main
for command in (
    "predict --config nowhere.yaml",
    "fit --trainer.devices 1 --config=nowhere.yaml",
    "test -c {tmp_path}/broken.yaml",
    "score {tmp_path} --nonsense 1",
    "report {tmp_path} --nonsense 1",
    "show nope",
    "score --allow_code_execution nope",
    "predict --config quickstart --data.limit -1",
    "fit --config quickstart",
    "predict --config quickstart --model.arms [1]",
):
    assert main(command.split()) == 2, command
    assert not {{"torch", "scipy.stats"}} & sys.modules.keys(), command
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    begun = {
        "--config: ": ("nowhere", "nowhere", "line 2"),
        "--nonsense: ": ("nonsense",) * 2,
        "run: ": ("nope",),
        "runs: ": ("nope",),
        "data.limit: ": ("at least 1",),
        "subcommand: ": ("predict, for Decoding",),
        "model.arms: ": ("received 1",),
    }
    expected = [(start, word) for start, words in begun.items() for word in words]
    for line, (start, word) in zip(done.stderr.splitlines(), expected, strict=True):
        assert line.startswith(f"dgd: error: {start}")
        assert word in line


@pytest.mark.parametrize("command", ["configs", "predict --help"])
def test_nobody_needs_to_read_to_the_end(command: str, tmp_path: Path) -> None:
    """As in `dgd … | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed, (tmp_path / "err").open("wb") as err:
        assert launch(*command.split(), stdout=closed, stderr=err).wait(60) == 128 + signal.SIGPIPE
    assert (tmp_path / "err").read_text() == ""


def test_a_config_may_come_through_a_pipe(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    """As from a shell's ``<(…)``: it can be read once."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[config().read_bytes()], daemon=True)
    writer.start()
    run = dgd("predict", "--config", tmp_path / "pipe", "--print_config")
    assert run.code == 0, run.err
    assert yaml.safe_load(run.out)["model"]["init_args"]["max_new_tokens"] == SHORT


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ('Key "foo" is not expected', "valid value"),
        ("Something\n  never seen\n before", "received Something never seen before"),
    ],
)
def test_unknown_parser_messages_still_fit_a_line(message: str, line: str) -> None:
    error = str(from_parser_message(message))
    assert "\n" not in error
    assert line in error


def test_lm_evaluation_harness_is_an_extra(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As `python -m dgd_lightning.lm_eval` where it is not installed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dgd_lightning.lm_eval", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("dgd_lightning.lm_eval", run_name="__main__")
    check(Run(end.value.code, *capfd.readouterr()), "lm_eval", "pip install 'dgd-lightning[lm-eval]'")
    with pytest.raises(InputError, match="lm_eval: expected lm-evaluation-harness"):
        import_module("dgd_lightning.lm_eval")
