"""`dgd predict` to `dgd test`: what the target really read is what a draft trains on, whatever the template."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_tools import Config, Dgd, TinyPair, predictions, write_jsonl

from dgd_lightning.data.responses import ResponsesData


@pytest.mark.filterwarnings("ignore")
def test_predictions_carry_the_prompt_that_was_fed(config: Config, dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("Hm?", "x" * 600)])
    data = {"path": str(path), "template": "Say: {prompt}!", "system": "Be brief.", "batch_size": 2}
    arms = [{"name": "ar", "method": "autoregressive"}]
    written = config({"arms": arms, "draft": None, "too_long": "truncate_left"}, data, data_class="PromptsData")
    assert dgd("predict", "--config", written).code == 0
    folder = tmp_path / "logs" / "run" / "version_0"
    rows = predictions(folder)
    responses = ResponsesData(str(folder / "predictions.jsonl"), str(tiny_pair.target), val_share=0.0)
    responses.setup("fit")
    assert responses.train_set is not None
    short, long = (prompt for prompt, _ in responses.train_set.pairs)
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(tiny_pair.target).decode(short)
    assert "Be brief." in text
    assert "Say: Hm?!" in text
    assert len(long) == 512 - 12  # cut as the target's was
    assert [len(short), len(long)] == [min(row["dgd"]["prompt_tokens"], 500) for row in rows]

    training = tmp_path / "train.yaml"
    training.write_text(f"""
name: train
logs_dir: {tmp_path / "logs"}
model:
  class_path: DraftTraining
  init_args: {{target: {tiny_pair.target}, draft: {tiny_pair.draft}, dtype: float32, val_max_new_tokens: 8}}
data:
  class_path: ResponsesData
  init_args: {{path: {folder / "predictions.jsonl"}, target: {tiny_pair.target}, val_share: 0.5}}
trainer: {{accelerator: cpu, devices: 1}}
""")
    for stage in ("test", "validate"):
        run = dgd(stage, "--config", training)
        assert run.code == 0, run.err
        assert ("test" if stage == "test" else "val") + "/tau_micro" in run.out
