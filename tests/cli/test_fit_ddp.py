"""`dgd fit` of a draft on two CPU processes: it trains, the ranks agree to the last bit, and it is exported once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import yaml
from cli_tools import TinyPair, ranks_of, write_jsonl
from fork_server import launched
from hub_cache import OLD, add_snapshot, set_ref
from safetensors.torch import load_file

STEPS = 4

# What a rank leaves behind: its weights before the first and after the last step, and the batches that it read.
RECORDER = """
import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file


class Recorder(Callback):
    def __init__(self, folder: str) -> None:
        self.folder, self.batches = folder, []

    def on_fit_start(self, trainer, module):
        self.first = {"before." + name: value.clone() for name, value in module.draft.state_dict().items()}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(batch.input_ids)

    def on_train_end(self, trainer, module):
        state = {name: value.contiguous() for name, value in module.draft.state_dict().items()}
        batches = {f"batch.{i}": ids for i, ids in enumerate(self.batches)}
        save_file(state | self.first | batches, f"{self.folder}/rank{trainer.global_rank}.safetensors")
"""


def test_two_ranks_train_one_draft(tiny_pair: TinyPair, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    add_snapshot(cache, "org/target", OLD, tiny_pair.target)
    set_ref(cache, "org/target", "main", OLD)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "idx": str(i),
            "model_output": "text",
            "dgd": {
                "prompt_ids": [i, *torch.randint(0, 280, (5,), generator=generator).tolist()],
                "output_ids": torch.randint(0, 280, (20 + i,), generator=generator).tolist(),
            },
        }
        for i in range(12)
    ]
    (tmp_path / "recorder.py").write_text(RECORDER)
    model = {
        "target": "org/target",
        "dtype": "float32",
        "num_layers": 1,
        "block_size": 4,
        "num_anchors": 4,
        "lr": 1e-3,
        "val_max_new_tokens": 4,
        "export_dir": str(tmp_path / "draft"),
    }
    data = {
        "path": str(write_jsonl(tmp_path / "predictions.jsonl", rows)),
        "target": "org/target",
        "batch_size": 1,
        "val_share": 0.25,  # three prompts
        "val_batch_size": 2,
    }
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "val/tau_micro", "mode": "max", "save_last": True},
    }
    settings = {
        "name": "draft",
        "logs_dir": str(tmp_path / "logs"),
        "model": {"class_path": "DraftTraining", "init_args": model},
        "data": {"class_path": "ResponsesData", "init_args": data},
        "trainer": {
            "max_steps": STEPS,
            "val_check_interval": 2,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
            "callbacks": [checkpoint, {"class_path": "recorder.Recorder", "init_args": {"folder": str(tmp_path)}}],
        },
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(settings))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    options = [*ranks_of(2), "--trainer.accelerator", "cpu"]
    run = launched("fit", "--config", tmp_path / "fit.yaml", *options, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr

    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    weights = [name for name in ranks[0] if not name.startswith(("before.", "batch."))]
    for name in weights:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    assert any(not torch.equal(ranks[0][name], ranks[0]["before." + name]) for name in weights)
    # A row's first token is its number: the ranks read different rows, together eight of the nine.
    read = [[int(rank[f"batch.{step}"][0, 0]) for step in range(STEPS)] for rank in ranks]
    assert len({*read[0], *read[1]}) == 2 * STEPS

    assert run.stdout.count("exported the draft") == 1
    assert run.stdout.count("run folder:") == 1
    assert sorted(path.name for path in (tmp_path / "logs" / "draft").iterdir()) == ["version_0"]
    exported = load_file(tmp_path / "draft" / "model.safetensors")
    assert exported.keys() == set(weights)
    record = json.loads((tmp_path / "draft" / "provenance.json").read_text())
    assert record["model"] == {"target": f"org/target@{OLD}", "draft": None, "dtype": "float32"}
    assert (record["sessions"][0]["ranks"], len(record["sessions"])) == (2, 1)
