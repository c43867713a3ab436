"""`PairSource`: where a module's pair comes from; pinned to one commit per run, and loaded on this rank's device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dgd_lightning.checks import check_integer
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.pair import Commits, Pair, load_pair, outline_pair, resolve_commits, source_fingerprint
from dgd_lightning.target.dtypes import chosen_dtype, named_dtype, short, stored_dtype, warn_if_slow, why_chosen
from dgd_lightning.target.folder import bundled, fetch_folder, read_json
from dgd_lightning.target.load import MODEL_FILES
from dgd_lightning.target.model import Target


@dataclass
class PairSource:
    """What the modules with a pair share; its settings are theirs.

    Args:
        target: folder or Hub id of the target; ``lab`` for the bundled one.
        draft: folder or Hub id of the draft; ``lab`` for the bundled one; None for none.
        dtype: ``float32``, ``bfloat16`` …; ``auto``: the checkpoint's where the device computes it natively, else
            ``float32``. A run says which, and records that; so it is not continued where ``auto`` comes to another.
        attn_implementation: of the target, ``sdpa`` (default) or ``eager``.
        revision: Hub revision of the target: branch, tag or commit. It is looked up once per run; everything is loaded
            from that commit, and ``provenance.json`` names it.
        draft_revision: Hub revision of the draft.
        device_map: spread the target over this process's GPUs (``auto`` or a map of module names); None: one device.
        cpu_threads: threads that torch uses on a CPU; None leaves torch's choice. Small models run fastest on one.
    """

    target: str
    draft: str | None
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    draft_revision: str | None = None
    device_map: str | dict[str, int | str] | None = None
    cpu_threads: int | None = None

    def __post_init__(self) -> None:
        check_integer("model.cpu_threads", self.cpu_threads, optional=True)
        self.target, self.draft = bundled(self.target, "target"), self.draft and bundled(self.draft, "draft")

    @cached_property
    def commits(self) -> Commits:
        """The commits of the Hub ids."""
        return resolve_commits(self.target, self.draft, self.revision, self.draft_revision, prefix="model.")

    def fingerprint(self) -> dict[str, Any]:
        """What the run starts from, for its provenance: revisions count by their commits."""
        return {
            "target": source_fingerprint("target", self.target, self.commits.target),
            "draft": self.draft and source_fingerprint("draft", self.draft, self.commits.draft),
        }

    def load(self, trainer: Any = None, *, device: Any = "auto", draft_dtype: torch.dtype | None = None) -> Pair:
        """The pair on this rank's device, or spread over all devices of the only rank.

        Args:
            trainer: asked for the device, and to give every rank rank 0's commits (a branch may move between two
                look-ups); None loads on ``device``.
            draft_dtype: of the draft; None for the target's.
        """
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        kind = self.dtype
        if trainer is not None:
            self.commits = trainer.strategy.broadcast(self.commits)
            device, here = self._placement(trainer), trainer.strategy.root_device
            kind = self.dtype_name(trainer)
            if self.dtype == "auto":
                rank_zero_only(print)(self.why_dtype(trainer))
            if trainer.precision == "bf16-mixed":
                warn_if_slow(torch.bfloat16, here, "trainer.precision bf16-mixed")
        return load_pair(
            self.target,
            self.draft,
            dtype=kind,
            draft_dtype=draft_dtype,
            device=device,
            attn_implementation=self.attn_implementation,
            revision=self.commits.target,
            draft_revision=self.commits.draft,
        )

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """That of the target's checkpoint."""
        folder = fetch_folder("target", self.target, self.commits.target, ("config.json",))
        config = read_json(folder / "config.json", "target")
        if named_dtype(config) is None:  # the weights tell
            folder = fetch_folder("target", self.target, self.commits.target, MODEL_FILES)
        return stored_dtype(folder, config)

    def dtype_name(self, trainer: Any) -> str:
        """``dtype``, and in place of ``auto`` what it comes to on the trainer's device."""
        if self.dtype != "auto" or trainer is None:
            return self.dtype
        return short(chosen_dtype(self.stored_dtype, trainer.strategy.root_device))

    def why_dtype(self, trainer: Any) -> str:
        """What ``auto`` comes to on the trainer's device, and why, in one line."""
        return why_chosen(self.stored_dtype, trainer.strategy.root_device)

    def outline(self) -> Pair:
        """The pair without weights; see `pair.outline_pair`."""
        return outline_pair(self.target, self.draft, *self.commits)

    def described(self, pair: Pair) -> str:
        """What pair this is, in one line."""
        config = pair.target.model.config
        line = f"pair: target {self.target}, {config.model_type} of {pair.target.num_layers} layers"
        if pair.draft is None:
            return f"{line}; no draft"
        theirs = pair.draft.config
        return f"{line}; draft {self.draft}, {theirs.num_layers} layers, blocks of {theirs.block_size}"

    def _placement(self, trainer: Any) -> Any:
        if self.device_map is None:
            return trainer.strategy.root_device
        if trainer.world_size > 1:
            raise InputError(
                "model.device_map",
                expected="null with several ranks: each holds the whole target on a device of its own",
                received=f"{self.device_map!r} with {trainer.world_size} ranks",
                hint=f"{LEAVE_OUT}, or set trainer.devices: 1",
            )
        return "balanced" if self.device_map == "auto" else self.device_map  # load_target's auto is one device


def check_rows_run(trainer: Any, stage: str, wanted: str) -> None:
    """Refuses another subcommand, and a precision that the weights are not loaded in, for runs that write rows."""
    if stage != wanted:
        raise InputError("subcommand", expected=wanted, received=stage, hint=f"run `dgd {wanted}`")
    if trainer.precision != "32-true":
        hint = "set model.dtype instead: weights are loaded in it"
        raise InputError("trainer.precision", expected="the default", received=trainer.precision, hint=hint)


def room_before(target: Target, argument: str, new_tokens: int) -> int:
    """Tokens of the longest prompt that leaves the target room for so many new ones; ``argument`` names these."""
    if (room := target.max_positions - new_tokens) < 1:
        expected = f"less than the target's {target.max_positions} positions"
        raise InputError(argument, expected=expected, received=new_tokens, hint="lower it")
    return room
