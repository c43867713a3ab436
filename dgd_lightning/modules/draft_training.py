"""Training of a DFlash draft on its frozen target's own responses: the recipe of the DFlash paper (DESIGN §3.9).

A step reads a batch of conversations with the target (no gradients), draws random anchors inside the responses, runs
all their blocks in one multi-anchor forward and weights slot k by exp(−(k − 1)/γ). Validation is the real decoding
loop: τ.
"""

import copy
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer, check_number
from dgd_lightning.data.licence import check_clbench
from dgd_lightning.draft.attention import Wanted, choose_attention
from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.draft.objective import BlockLoss, block_ids, block_loss, default_gamma, pooled, sample_anchors
from dgd_lightning.errors import InputError
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.metrics.acceptance import AcceptanceLength
from dgd_lightning.modules.fit_estimate import estimate_fit, said
from dgd_lightning.modules.new_draft import Start, new_draft, new_draft_config, unused_row
from dgd_lightning.modules.pair_source import PairSource, room_before
from dgd_lightning.modules.training import (
    best_checkpoint,
    checked,
    copy_provenance,
    require_finite,
    require_writable,
    scheduled,
)
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.folder import bundled

ALIKE = 0.75  # rows that are read together: of the longest's tokens


class DraftTraining(L.LightningModule):
    """Train a draft from scratch, or continue a published one, for a frozen target.

    Training batches have ``input_ids`` [B, S] (padded on the right) and ``loss_mask`` [B, S] (true at response tokens).
    Validation (and test) batches are lists of prompts, 1-D LongTensors, decoded speculatively by the draft in the
    target's dtype, as it is exported; a prompt that does not fit the target's positions loses its first tokens.

    Args:
        target: Hub id or folder of the frozen target, or ``lab``.
        draft: Hub id or folder of a draft to continue, or ``lab``; None trains a new one of the sizes below.
        num_layers: layers of a new draft.
        block_size: K of a new draft, the anchor included.
        target_layer_ids: tapped layers of a new draft; None takes ``num_layers`` points evenly from 1 to L − 3.
        start: a new draft's first weights: ``random``, or as far as they fit those of the ``target``'s last layers.
        mask_token_id: the mask token of a new draft, a row of the target's embedding. None takes a row that is not in
            use, and says which: the first one beyond the tokenizer's ids, as the published drafts do; else a reserved
            token, or an id, that the training data does not have.
        num_anchors: N, anchors per sequence and step.
        gamma: decay of the slot weights; None takes the paper's for the block size.
        attention: ``flex`` (FlexAttention, CUDA), ``tiles`` (made for CPUs), ``sdpa`` (anywhere) or ``dense`` (one mask
            over all: much memory); ``auto`` is ``flex`` on CUDA where Triton works, ``tiles`` on a CPU, else ``sdpa``.
        gradient_checkpointing: recompute the draft's layers in the backward pass.
        lr: peak learning rate of AdamW.
        weight_decay: AdamW's.
        warmup_share: share of the steps that warm up linearly before the cosine.
        val_max_new_tokens: tokens decoded per validation prompt.
        export_dir: where the draft goes at the end, in the published layout and the target's dtype: the best checkpoint
            where a ``ModelCheckpoint`` with a monitor is among the callbacks, else the last step. None exports nothing.
        seed: of a new draft's weights and of the anchors, which depend on it, the step and the rank alone.
        accept_clbench_license: you have obtained permission to train on CL-bench's rows, which its licence forbids.
        pair: see `PairSource`; ``dtype`` is the target's, the draft trains in fp32 under ``trainer.precision``.
    """

    continues = True  # from a checkpoint, as if it had not been interrupted

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        *,
        num_layers: int = 5,
        block_size: int = 16,
        target_layer_ids: list[int] | None = None,
        start: Start = "random",
        mask_token_id: int | None = None,
        num_anchors: int = 512,
        gamma: float | None = None,
        attention: Wanted = "auto",
        gradient_checkpointing: bool = False,
        lr: float = 6e-4,
        weight_decay: float = 0.01,
        warmup_share: float = 0.04,
        val_max_new_tokens: int = 128,
        export_dir: Path | None = None,
        seed: int = 0,
        accept_clbench_license: bool = False,
        **pair: Any,
    ) -> None:
        super().__init__()
        self.accept_clbench_license = accept_clbench_license
        check_integer("model.num_anchors", num_anchors)
        check_integer("model.num_layers", num_layers)
        check_integer("model.block_size", block_size, least=2)
        check_integer("model.val_max_new_tokens", val_max_new_tokens)
        check_number("model.gamma", gamma, least=1e-3, optional=True)
        self.recipe = {"lr": lr, "weight_decay": weight_decay, "warmup_share": warmup_share}
        for name, value in self.recipe.items():
            check_number(f"model.{name}", value, least=0)
        self.source = PairSource(target, draft, device_map=None, **pair)
        self.start = check_choice("model.start", start, get_args(Start))
        self.shape = (num_layers, block_size, target_layer_ids, mask_token_id)
        self.num_anchors, self.gamma, self.attention = num_anchors, gamma, attention
        self.gradient_checkpointing, self.val_max_new_tokens = gradient_checkpointing, val_max_new_tokens
        self.export_dir, self.seed = export_dir, seed

    def fingerprint(self) -> dict[str, Any]:
        """What the run starts from, for its provenance."""
        return {**self.source.fingerprint(), "dtype": self.source.dtype_name(self._trainer)}

    def setup(self, stage: str) -> None:
        """Checks what would else be found after the training, or never."""
        data, source = getattr(self._trainer, "datamodule", None), self.source
        target, revision = getattr(data, "target", None), getattr(data, "revision", source.revision)
        if isinstance(target, str) and _place(target) != _place(source.target):
            expected = f"the model's target, {source.target}: another tokenizer has other ids"
            hint = "give data.target and model.target the same name"
            raise InputError("data.target", expected=expected, received=target, hint=hint)
        if revision != source.revision:
            expected = f"the model's revision, {source.revision}: another may have another template"
            hint = "give data.revision and model.revision the same value"
            raise InputError("data.revision", expected=expected, received=revision, hint=hint)
        if stage == "fit":
            check_clbench(data, self.accept_clbench_license, "data.path")
        if stage == "fit" and self.export_dir is not None and self.trainer.is_global_zero:
            require_writable(Path(self.export_dir), "model.export_dir")

    def configure_model(self) -> None:
        """Load the pair once, on the rank's own device; only the draft is registered as a trainable child."""
        if hasattr(self, "pair"):
            return
        # Lightning moves the registered draft later, but never the target
        loaded = self.source.load(self._trainer, device=self.device, draft_dtype=torch.float32)
        self.longest = room_before(loaded.target, "model.val_max_new_tokens", self.val_max_new_tokens)  # prompt
        draft = loaded.draft
        if draft is None:
            layers, size, taps, mask = self.shape
            if mask is None:
                data = getattr(getattr(self._trainer, "datamodule", None), "train_set", None)
                mask, why = unused_row(loaded.target, loaded.tokenizer, data or ())
                rank_zero_only(print)(f"mask token: {mask}, {why}")
            config = new_draft_config(loaded.target, layers, size, taps, mask)
            draft = new_draft(loaded.target, config, self.start, self.seed)
        self.draft = draft.to(loaded.target.device, torch.float32).requires_grad_(True)
        self.draft.gradient_checkpointing = self.gradient_checkpointing
        self.attends = choose_attention(self.attention, self.draft.device, "model.attention")
        rank_zero_info(f"attention: {self.attends}")
        self.pair = Pair(loaded.target, self.draft, loaded.tokenizer)  # a plain record: the target is no child module
        self.tau = AcceptanceLength(self.draft.config.block_size)

    def on_train_start(self) -> None:
        """Says what the fit will take, where the data is known as conversations."""
        data = getattr(self.trainer, "datamodule", None)
        conversations, size = getattr(data, "train_set", None), getattr(data, "batch_size", None)
        if conversations and size and self.trainer.is_global_zero:
            found = estimate_fit(self.pair.target, self.draft, conversations, size, self.num_anchors)
            steps = int(self.trainer.estimated_stepping_batches) - self.trainer.global_step
            print(said(found, steps, self.draft.device), flush=True)

    def forward(self, input_ids: Tensor, loss_mask: Tensor, generator: torch.Generator) -> BlockLoss:
        """The loss of one batch, ``input_ids`` and ``loss_mask`` [B, S], at anchors drawn from ``generator``."""
        anchors, keep = sample_anchors(loss_mask, self.num_anchors, generator)
        ends = ((loss_mask > 0) * torch.arange(1, loss_mask.shape[1] + 1, device=loss_mask.device)).amax(1)
        ends, counts = torch.stack([ends, keep.sum(1)]).tolist()  # of each row, waiting for the device once
        parts = []
        for rows in rows_alike(ends):  # padded to their own longest, with as many blocks as they have
            length, blocks = max(2, *(ends[row] for row in rows)), max(1, *(counts[row] for row in rows))
            given = (x[rows, :length] for x in (input_ids, loss_mask))
            parts.append(self._part(*given, *(x[rows, :blocks] for x in (anchors, keep))))
        return pooled(parts)

    def _part(self, input_ids: Tensor, loss_mask: Tensor, anchors: Tensor, keep: Tensor) -> BlockLoss:
        """The loss of rows of about one length, [B, S] each, at anchors [B, N]."""
        target, config = self.pair.target, self.draft.config
        with torch.no_grad():
            features = target.features(input_ids, config.target_layer_ids)  # [B, S, F·H]
            embeddings = target.embed(block_ids(input_ids, anchors, config.block_size, config.mask_token_id))
        hidden = self.draft.multi_anchor(
            features.to(self.draft.dtype), embeddings.to(self.draft.dtype), anchors, keep, attention=self.attends
        )
        return block_loss(
            hidden,
            lambda states: target.lm_head(states.to(target.dtype)),
            input_ids,
            loss_mask,
            anchors,
            keep,
            block_size=config.block_size,
            gamma=self.gamma or default_gamma(config.block_size),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        seed = mixed_seed(self.seed, self.global_step, micro_batch, self.global_rank)
        result = self(batch.input_ids, batch.loss_mask, torch.Generator().manual_seed(seed))
        self.log("train/loss", checked(result.loss, self), prog_bar=True)
        self.log("train/accuracy", result.accuracy, prog_bar=True)
        slots = enumerate(result.per_slot_accuracy, 1)
        self.log_dict({f"train/accuracy_slot_{slot}": accuracy for slot, accuracy in slots})
        return result.loss

    def on_validation_epoch_start(self) -> None:
        """Make a copy of the draft in the target's dtype where that is another: caches and features have it."""
        target, draft = self.pair.target, self.draft
        if draft.dtype != target.dtype:
            draft = copy.deepcopy(draft).to(target.dtype)
        self.decoding_pair = Pair(target, draft.eval(), self.pair.tokenizer)
        self.tau.reset()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        prompts = [prompt[-self.longest :] for prompt in batch]
        with torch.autocast(self.device.type, enabled=False):
            outputs = speculative_generate(self.decoding_pair, prompts, max_new_tokens=self.val_max_new_tokens)
        for output in outputs:
            self.tau.update(output.acceptance_lengths)

    def on_validation_epoch_end(self) -> None:
        """τ over all ranks' responses: computing it is a collective, so every rank does, with or without prompts."""
        found = self.tau.compute()
        stage = "test" if self.trainer.testing else "val"
        self.log(f"{stage}/tau_micro", found.micro, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/tau_macro", found.macro, sync_dist=True)
        del self.decoding_pair

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end
    test_step = validation_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        lr, decay = self.recipe["lr"], self.recipe["weight_decay"]
        optimizer = torch.optim.AdamW(self.draft.parameters(), lr=lr, weight_decay=decay)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(total * self.recipe["warmup_share"]))
        return scheduled(optimizer, total=total, warmup=warmup)

    def on_train_end(self) -> None:
        """Exports the best draft, or the last."""
        log_dir = self.trainer.log_dir  # a collective: every rank asks
        if self.export_dir is None or not self.trainer.is_global_zero:
            return
        draft, step, why = self.draft, self.global_step, "the last"
        if (best := best_checkpoint(self.trainer)) is not None:
            draft, step, why = copy.deepcopy(draft), best.step, best.why
            draft.load_state_dict({name.removeprefix("draft."): value for name, value in best.state.items()})
        kind = self.pair.target.dtype
        require_finite(weight.to(kind) for weight in draft.parameters())
        folder = save_draft(draft, self.export_dir, dtype=kind)
        copy_provenance(log_dir, folder)
        print(f"exported the draft of step {step} ({why}) to {self.export_dir}")


def rows_alike(lengths: list[int]) -> list[list[int]]:
    """Rows of a batch in groups, the longest first, whose shortest has :data:`ALIKE` of the longest's tokens.

    A batch of a random order holds long and short conversations. Batches sorted by length would save the same padding,
    but half of the steps would then learn from a few slots of short answers: after 100 steps τ 1.20 where it was 1.29.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and lengths[row] >= ALIKE * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _place(target: str) -> str:
    """What two spellings of one target share: the folder, ``lab``'s too, or the Hub id."""
    folder = Path(bundled(target, "target")).expanduser()
    return str(folder.resolve()) if folder.is_dir() else target
