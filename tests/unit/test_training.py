"""Training: it learns, resumes exactly, keeps the frozen target out of checkpoints, exports what loads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import make_target
from torch.utils.data import DataLoader

from dgd_lightning.data.responses import ResponseOrder, ResponsesData, pad_responses
from dgd_lightning.draft.checkpoint import load_draft
from dgd_lightning.errors import InputError
from dgd_lightning.lab.training_data import LabTargetData, Stage
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.modules import new_draft as beginning
from dgd_lightning.modules.draft_training import DraftTraining, rows_alike
from dgd_lightning.modules.new_draft import new_draft, new_draft_config
from dgd_lightning.modules.target_pretraining import TargetPretraining
from dgd_lightning.modules.training import cosine_with_warmup, without_paths
from dgd_lightning.pair import Pair, load_pair
from dgd_lightning.target.load import load_target

STAGES = [Stage(8, 48, 2, (3, 3), 0.2, 0.5, 0.1, ["glossary"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target, saved in fp32."""
    path = tmp_path_factory.mktemp("target")
    make_target("qwen3", num_hidden_layers=6).model.to(torch.float32).save_pretrained(path)
    return path


class Copies(L.LightningDataModule):
    """Prompts with the target's own greedy responses."""

    def __init__(self, target: Path) -> None:
        super().__init__()
        pair = load_pair(target, None)
        prompts = [torch.randint(0, 20, (6 + i % 3,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
        outputs = autoregressive_generate(pair, prompts, max_new_tokens=24, stop_token_ids=[])
        self.pairs = [(prompt, output.tokens) for prompt, output in zip(prompts, outputs, strict=True)]

    def train_dataloader(self):
        order = ResponseOrder(self.pairs, 4, 3, self.trainer)
        return DataLoader(self.pairs, 4, sampler=order, collate_fn=pad_responses)

    def val_dataloader(self):
        return DataLoader([prompt for prompt, _ in self.pairs], 4, collate_fn=list)

    def test_dataloader(self):
        return self.val_dataloader()


def module(target: Path, **overrides) -> DraftTraining:
    settings = {"num_layers": 1, "block_size": 4, "num_anchors": 8, "lr": 5e-3, "val_max_new_tokens": 12}
    settings["mask_token_id"] = 63  # a target without a tokenizer does not show which rows are in use
    return DraftTraining(str(target), **settings | overrides)


def trainer(folder: Path, steps: int, **overrides) -> L.Trainer:
    settings = {
        "max_steps": steps,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1.0,
    }
    return L.Trainer(**settings | overrides)


@pytest.mark.filterwarnings("ignore")
def test_draft_learns_and_is_exported(folder: Path, tmp_path: Path):
    data, exported = Copies(folder), tmp_path / "draft"
    fitting = module(folder, export_dir=exported)
    run = trainer(tmp_path, 50, val_check_interval=50)
    before = module(folder)
    before.configure_model()
    batch = pad_responses(data.pairs)
    first = before(batch.input_ids, batch.loss_mask, torch.Generator().manual_seed(1)).loss.item()
    run.fit(fitting, data)
    last = fitting(batch.input_ids, batch.loss_mask, torch.Generator().manual_seed(1)).loss.item()
    assert first < 1.1 * math.log(64)
    assert last < 0.75 * math.log(64)
    assert run.callback_metrics["val/tau_micro"] > 1.2
    assert 0 < run.callback_metrics["train/accuracy_slot_3"] <= 1
    tested = trainer(tmp_path, 1).test(fitting, data, verbose=False)
    assert tested[0]["test/tau_micro"] == pytest.approx(float(run.callback_metrics["val/tau_micro"]))

    pair = load_pair(folder, exported)
    prompts = [prompt for prompt, _ in data.pairs]
    outputs = speculative_generate(pair, prompts, max_new_tokens=24, stop_token_ids=[])
    for output, (_, response) in zip(outputs, data.pairs, strict=True):
        assert torch.equal(output.tokens, response)
    for name, value in fitting.draft.state_dict().items():
        assert torch.equal(value, pair.draft.state_dict()[name])


@pytest.mark.parametrize("start", ["random", "target"])
def test_a_new_draft_knows_nothing(start: str, monkeypatch: pytest.MonkeyPatch):
    """Its first loss is about that of guessing, however large the embedding of its mask token is."""
    target = make_target("qwen2", tie_word_embeddings=True, initializer_range=0.8, num_hidden_layers=6)
    config = new_draft_config(target, 2, 4, None, 63)
    ids = torch.randint(0, 60, (4, 30), generator=torch.Generator().manual_seed(0))

    def first_loss() -> float:
        step = DraftTraining("the pair above", num_anchors=8)
        step.draft = new_draft(target, config, start, 0).to(target.dtype)
        step.pair, step.attends = Pair(target, step.draft, None), "sdpa"
        copied = target.model.get_decoder().layers[4].mlp.up_proj.weight
        assert torch.equal(step.draft.layers[0].mlp.up_proj.weight, copied) is (start == "target")
        return step(ids, torch.ones_like(ids, dtype=torch.bool), torch.Generator().manual_seed(0)).loss.item()

    assert first_loss() == pytest.approx(math.log(64) + 0.5, abs=0.5)
    monkeypatch.setattr(beginning, "_forget", lambda *_: None)
    monkeypatch.setattr(beginning, "_first_scale", lambda *_: 1.0)
    assert first_loss() > 2 * math.log(64)


def test_rows_of_about_one_length_are_read_together():
    assert rows_alike([100, 30, 80, 74, 0, 29]) == [[0, 2], [3], [1, 5], [4]]


class SaveAt(L.Callback):
    """Saves a checkpoint after one step, as `ModelCheckpoint` would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [4, 6], ids=["at an epoch's end", "inside an epoch"])
def test_a_resumed_run_equals_the_uninterrupted_one(folder: Path, tmp_path: Path, step: int):
    path = tmp_path / "half.ckpt"
    whole, resumed, reseeded = module(folder), module(folder), module(folder, seed=1)
    data = Copies(folder)  # 4 batches an epoch
    trainer(tmp_path, 9, val_check_interval=100, callbacks=[SaveAt(step, path)]).fit(whole, data)
    state = torch.load(path, weights_only=False)["state_dict"]
    assert state
    assert all(name.startswith("draft.") for name in state)
    assert not torch.equal(state["draft.fc.weight"], whole.draft.fc.weight)

    torch.manual_seed(99)  # the global generator has no say
    for other in (resumed, reseeded):
        trainer(tmp_path, 9, val_check_interval=100).fit(other, Copies(folder), ckpt_path=path)
    for name, value in whole.draft.state_dict().items():
        assert torch.equal(value, resumed.draft.state_dict()[name]), name
    assert not torch.equal(whole.draft.fc.weight, reseeded.draft.fc.weight)  # other anchors do show


def test_order_covers_the_data_every_epoch_and_ranks_share_it():
    dataset = [(torch.tensor([i]), torch.tensor([1, 2])) for i in range(11)]
    order = ResponseOrder(dataset, 2, 0, None)
    assert len(order) == 10
    first, second = order.epoch_order(0), order.epoch_order(1)
    assert len(set(first)) == len(set(second)) == 10
    assert first != second
    start = iter(order)
    assert [next(start) for _ in range(20)] == first + second
    ranks = [ResponseOrder(dataset, 2, 0, None) for _ in range(2)]
    for rank, sampler in enumerate(ranks):
        sampler.num_replicas, sampler.rank, sampler.batches = 2, rank, 2
    shares = [set(sampler.epoch_order(0)) for sampler in ranks]
    assert len(shares[0]) == len(shares[1]) == 4
    assert not shares[0] & shares[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_bf16_target_trains_an_fp32_draft(folder: Path, tmp_path: Path, precision: str):
    fitting = module(folder, dtype="bfloat16", export_dir=tmp_path / "draft")
    run = trainer(tmp_path, 2, val_check_interval=2, precision=precision)
    run.fit(fitting, Copies(folder))
    assert fitting.draft.dtype == torch.float32
    assert fitting.pair.target.dtype == torch.bfloat16
    assert run.callback_metrics["val/tau_micro"] >= 1.0
    assert load_pair(folder, tmp_path / "draft", dtype="bfloat16").draft.dtype == torch.bfloat16
    stored = load_draft(tmp_path / "draft")
    assert stored.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
def test_the_best_checkpoint_is_exported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    best = ModelCheckpoint(tmp_path, "best", monitor="val/tau_micro", mode="min", save_top_k=1)
    (tmp_path / "provenance.json").write_text(
        json.dumps({"sessions": [{"argv": ["/some/where/dgd", "--a=/b/c.yaml"]}]})
    )
    fitting = module(folder, export_dir=tmp_path / "draft", lr=2e-2)
    settings = {"enable_checkpointing": True, "callbacks": [best], "val_check_interval": 10}
    trainer(tmp_path, 40, **settings).fit(fitting, Copies(folder))
    saved = torch.load(best.best_model_path, weights_only=False)
    assert saved["global_step"] < 40  # τ grows, so the least is an early one
    assert f"exported the draft of step {saved['global_step']} (best val/tau_micro" in capsys.readouterr().out
    exported = load_draft(tmp_path / "draft")
    assert torch.equal(exported.fc.weight, saved["state_dict"]["draft.fc.weight"])
    assert not torch.equal(exported.fc.weight, fitting.draft.fc.weight)
    assert json.loads((tmp_path / "draft" / "provenance.json").read_text())["sessions"][0]["argv"] == [
        "dgd",
        "--a=c.yaml",
    ]


def test_provenance_keeps_what_is_no_machine_path():
    kept = ["https://a.b/c", "configs/lab/draft.yaml", "Qwen/Qwen3-8B", "3 of 4"]
    assert without_paths(kept) == kept
    assert without_paths({"x": "/home/me/run.yaml"}) == {"x": "run.yaml"}


@pytest.mark.filterwarnings("ignore")
def test_a_published_draft_is_continued(folder: Path, tmp_path: Path):
    data, exported = Copies(folder), tmp_path / "draft"
    first = module(folder, export_dir=exported)
    trainer(tmp_path, 4, val_check_interval=100).fit(first, data)
    again = module(folder, draft=str(exported), num_layers=7)
    again.configure_model()
    assert len(again.draft.layers) == 1  # the checkpoint decides
    assert torch.equal(again.draft.fc.weight, first.draft.fc.weight)


def test_frozen_target_takes_no_gradient(folder: Path):
    data, fitting = Copies(folder), module(folder)
    fitting.configure_model()
    batch = pad_responses(data.pairs[:2])
    fitting(batch.input_ids, batch.loss_mask, torch.Generator().manual_seed(0)).loss.backward()
    assert all(parameter.grad is None for parameter in fitting.pair.target.parameters())
    assert all(parameter.grad is not None for parameter in fitting.draft.parameters())


def test_mask_token_outside_the_embedding_is_refused(folder: Path):
    with pytest.raises(InputError, match=r"model\.mask_token_id: expected a row of the target's embedding"):
        module(folder, mask_token_id=10**6).configure_model()


@pytest.mark.filterwarnings("ignore")
def test_target_pretraining_exports_a_loadable_target(tmp_path: Path):
    exported = tmp_path / "target"
    torch.manual_seed(0)
    fitting = TargetPretraining(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        warmup_steps=2,
        compile=False,
        export_dir=exported,
    )
    data = LabTargetData(STAGES, probes=1, probe_sizes=(3, 3), num_workers=0)
    run = trainer(tmp_path, 8, val_check_interval=8, limit_val_batches=1)
    batch = next(iter(data.train_dataloader()))
    fitting.setup("fit")
    first = fitting.loss(batch.input_ids, batch.weights).item()
    run.fit(fitting, data)
    assert fitting.loss(batch.input_ids, batch.weights).item() < first
    assert "val/solved" in run.callback_metrics
    target = load_target(exported)
    assert target.stop_token_ids == (data.tokenizer.eos_token_id,)
    assert torch.equal(target.embedding.weight, fitting.model.get_input_embeddings().weight)
    assert load_pair(exported, None).tokenizer.decode(data.tokenizer("Hello").input_ids) == "Hello"


def test_responses_come_from_predictions(tmp_path: Path):
    exported = tmp_path / "target"
    data = LabTargetData(STAGES, num_workers=0)
    TargetPretraining(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, compile=False)
    data.tokenizer.save_pretrained(exported)
    (exported / "config.json").write_text("{}")
    chat = [{"role": "user", "content": "What is red?"}]
    rows = [
        {"idx": "a", "messages": chat, "model_output": "red: salt.", "dgd": {"output_ids": [5, 6, 7]}},
        {"idx": "a", "messages": chat, "model_output": "another arm's", "dgd": {"output_ids": [9, 9]}},
        {"idx": "b", "messages": chat, "model_output": None, "dgd": {"skipped": "too long"}},
        {"idx": "c", "messages": chat, "model_output": "green."},
        {
            "idx": "d",
            "prompt": "no template here",
            "model_output": "x",
            "dgd": {"prompt_ids": [3], "output_ids": [8, 9]},
        },
        {"idx": "e", "model_output": "x", "dgd": {"prompt_ids": [3] * 3072, "output_ids": [8, 9]}},
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    responses = ResponsesData(str(path), str(exported), val_share=0.0)
    with pytest.warns(UserWarning, match="1 of 4 rows of predictions.jsonl are left out"):
        responses.setup("fit")
    assert responses.train_set[0][1].tolist() == [5, 6, 7]
    assert len(responses.train_set) == 3
    assert [part.tolist() for part in responses.train_set[2]] == [[3], [8, 9]]
    assert data.tokenizer.decode(responses.train_set[1][1]) == "green.<|im_end|>"
    batch = pad_responses(responses.train_set)
    assert batch.loss_mask.sum(-1).tolist() == [len(pair[1]) for pair in responses.train_set]
    (tmp_path / "foreign.jsonl").write_text(json.dumps({"prompt": "Hm?", "model_output": "x"}) + "\n")
    with pytest.raises(InputError, match=r"data\.path line 1: expected a chat in 'messages'.*, or 'dgd\.prompt_ids'"):
        ResponsesData(str(tmp_path / "foreign.jsonl"), str(exported)).setup("fit")
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(InputError, match=r"data\.path: expected answers of at least two tokens"):
        ResponsesData(str(tmp_path / "none.jsonl"), str(exported)).setup("fit")


def test_schedule_warms_up_and_falls_to_its_floor():
    factors = [cosine_with_warmup(step, total=100, warmup=10, floor=0.1) for step in range(120)]
    assert factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1) == factors[119]
