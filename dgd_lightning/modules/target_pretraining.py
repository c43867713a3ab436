"""Pretraining of a small Qwen3 target from scratch: how the lab's bundled target is made."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from dgd_lightning.data.licence import check_clbench
from dgd_lightning.modules.training import checked, copy_provenance, require_finite, require_writable, scheduled

SIZES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size max_position_embeddings"
).split()  # of the model, under Qwen3's names


def weighted_next_token_loss(logits: Tensor, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the next token, weighted by the label's weight and divided by the sum of weights.

    Args:
        logits: [B, T, V].
        input_ids: [B, T].
        weights: [B, T], the weight of each token as a label.
    """
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
    )  # [B·(T−1)]
    label_weights = weights[:, 1:].flatten()
    return (losses * label_weights).sum() / label_weights.sum()


class TargetPretraining(L.LightningModule):
    """Train a Qwen3 causal LM from scratch and export it as a Hugging Face folder.

    Batches have ``input_ids`` and ``weights`` [B, T]; validation batches have ``input_ids``, ``answer_mask`` [B, T] and
    ``kinds``, and a probe counts as solved if every answer token is the argmax under teacher forcing, which is exactly
    when greedy decoding would give that answer.

    Args:
        vocab_size: rows of the embedding, the draft's mask token included.
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: the model.
        intermediate_size: width of the gated feed-forward layers.
        max_position_embeddings: longest input the exported model admits.
        rope_theta: base of the rotary embedding.
        lr: peak learning rate of AdamW.
        weight_decay: AdamW's, on matrices only.
        warmup_steps: linear warm-up.
        floor: the cosine's last learning rate as a share of ``lr``.
        schedule_steps: steps over which the cosine falls; None takes ``trainer.max_steps``. More: stops early.
        compile: compile the training step (about three times faster on CPU).
        export_dir: where the Hugging Face folder goes at the end; None exports nothing.
    """

    continues = True  # from a checkpoint, as if it had not been interrupted

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 128,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 32,
        intermediate_size: int = 384,
        max_position_embeddings: int = 262144,
        rope_theta: float = 10000.0,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        floor: float = 0.1,
        schedule_steps: int | None = None,
        compile: bool = True,
        export_dir: Path | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["export_dir", "compile"])
        self.export_dir, self.compile_step = export_dir, compile
        sizes = {name: value for name, value in self.hparams.items() if name in SIZES}
        rope = {"rope_type": "default", "rope_theta": rope_theta}
        config = Qwen3Config(**sizes, rope_parameters=rope, tie_word_embeddings=True, use_cache=False)
        self.model = Qwen3ForCausalLM(config)
        self.solved: dict[str, list[bool]] = defaultdict(list)

    def setup(self, stage: str) -> None:
        """Checks data and ``export_dir``, and chooses the loss."""
        check_clbench(getattr(self._trainer, "datamodule", None), False, "data")
        is_first = self._trainer is None or self.trainer.is_global_zero
        if stage == "fit" and self.export_dir is not None and is_first:
            require_writable(Path(self.export_dir), "model.export_dir")

        def loss(input_ids: Tensor, weights: Tensor) -> Tensor:
            return weighted_next_token_loss(self.model(input_ids).logits, input_ids, weights)

        self.loss = torch.compile(loss) if self.compile_step else loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = checked(self.loss(batch.input_ids, batch.weights), self)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/tokens_per_step", float(batch.input_ids.numel()))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.solved.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        guesses = self.model(batch.input_ids).logits[:, :-1].argmax(-1)  # [B, T−1]
        right = (guesses == batch.input_ids[:, 1:]) | ~batch.answer_mask[:, 1:]
        for kind, solved in zip(batch.kinds, right.all(-1).tolist(), strict=True):
            self.solved[kind].append(solved)

    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        for kind, solved in sorted(self.solved.items()):
            self.log(f"{stage}/solved/{kind}", sum(solved) / len(solved))
        everything = [value for solved in self.solved.values() for value in solved]
        self.log(f"{stage}/solved", sum(everything) / max(1, len(everything)), prog_bar=True)

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end
    test_step = validation_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.hparams["weight_decay"]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], betas=(0.9, 0.95))
        total = self.hparams["schedule_steps"] or int(self.trainer.estimated_stepping_batches)
        return scheduled(optimizer, total=total, warmup=self.hparams["warmup_steps"], floor=self.hparams["floor"])

    def on_train_end(self) -> None:
        """Writes a Hugging Face folder (safetensors) with the tokenizer and its end and padding tokens."""
        log_dir = self.trainer.log_dir  # a collective: every rank asks
        if self.export_dir is None or not self.trainer.is_global_zero:
            return
        require_finite(self.model.parameters())
        self.model.config.use_cache = True
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            for config in (self.model.config, self.model.generation_config):
                config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
            tokenizer.save_pretrained(self.export_dir)
        self.model.save_pretrained(self.export_dir)
        copy_provenance(log_dir, self.export_dir)
