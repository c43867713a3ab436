"""Training: it learns, resumes exactly, keeps the frozen target out of checkpoints, exports what loads."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import make_target
from torch.utils.data import DataLoader

from dgd_lightning.data.responses import ResponseDataset, ResponsesData, pad_responses
from dgd_lightning.decode import autoregressive_generate, speculative_generate
from dgd_lightning.errors import InputError
from dgd_lightning.lab.stream import Stage
from dgd_lightning.lab.training_data import LabTargetData
from dgd_lightning.modules.draft_training import DraftTraining
from dgd_lightning.modules.schedule import cosine_with_warmup
from dgd_lightning.modules.target_pretraining import TargetPretraining
from dgd_lightning.pair import load_pair
from dgd_lightning.target.load import load_target

STAGES = [Stage(8, 48, 2, (3, 3), 0.2, 0.5, 0.1, ["glossary"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target, saved in fp32."""
    path = tmp_path_factory.mktemp("target")
    make_target("qwen3").model.to(torch.float32).save_pretrained(path)
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
        return DataLoader(ResponseDataset(self.pairs), 4, collate_fn=pad_responses)

    def val_dataloader(self):
        return DataLoader([prompt for prompt, _ in self.pairs], 4, collate_fn=list)


def module(target: Path, **overrides) -> DraftTraining:
    settings = {"num_layers": 1, "block_size": 4, "num_anchors": 8, "lr": 5e-3, "val_max_new_tokens": 12}
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
    torch.manual_seed(0)
    fitting = module(folder, export_dir=exported)
    run = trainer(tmp_path, 50, val_check_interval=50)
    before = module(folder)
    before.configure_model()
    batch = pad_responses(data.pairs)
    torch.manual_seed(1)
    first = before(batch.input_ids, batch.loss_mask).loss.item()
    run.fit(fitting, data)
    torch.manual_seed(1)
    last = fitting(batch.input_ids, batch.loss_mask).loss.item()
    assert last < 0.6 * first
    assert run.callback_metrics["val/tau_micro"] > 1.2

    pair = load_pair(folder, exported)
    prompts = [prompt for prompt, _ in data.pairs]
    outputs = speculative_generate(pair, prompts, max_new_tokens=24, stop_token_ids=[])
    for output, (_, response) in zip(outputs, data.pairs, strict=True):
        assert torch.equal(output.tokens, response)
    for name, value in fitting.draft.state_dict().items():
        assert torch.equal(value, pair.draft.state_dict()[name])


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_holds_the_draft_alone_and_resumes(folder: Path, tmp_path: Path):
    data = Copies(folder)
    torch.manual_seed(0)
    whole = module(folder)
    run = trainer(tmp_path, 4, val_check_interval=100)
    run.fit(whole, data)
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    state = torch.load(path, weights_only=False)["state_dict"]
    assert state
    assert all(name.startswith("draft.") for name in state)

    resumed = module(folder)
    trainer(tmp_path, 4, val_check_interval=100).fit(resumed, data, ckpt_path=path)
    for name, value in whole.draft.state_dict().items():
        assert torch.equal(value, resumed.draft.state_dict()[name])
    trainer(tmp_path, 8, val_check_interval=100).fit(resumed, data, ckpt_path=path)
    assert not torch.equal(whole.draft.fc.weight, resumed.draft.fc.weight)


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
    fitting(batch.input_ids, batch.loss_mask).loss.backward()
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
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    responses = ResponsesData(str(path), str(exported), val_share=0.0)
    responses.setup("fit")
    assert responses.train_pairs[0][1].tolist() == [5, 6, 7]
    assert len(responses.train_pairs) == 2
    assert data.tokenizer.decode(responses.train_pairs[1][1]) == "green.<|im_end|>"
    batch = pad_responses(responses.train_pairs)
    assert batch.loss_mask.sum(-1).tolist() == [len(pair[1]) for pair in responses.train_pairs]
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(InputError, match=r"data\.path: expected answers of at least two tokens"):
        ResponsesData(str(tmp_path / "none.jsonl"), str(exported)).setup("fit")


def test_schedule_warms_up_and_falls_to_its_floor():
    factors = [cosine_with_warmup(step, total=100, warmup=10, floor=0.1) for step in range(120)]
    assert factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1) == factors[119]
