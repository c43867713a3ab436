"""`PairSource`: where a module's pair comes from; pinned to one commit per run, and loaded on this rank's device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dgd_lightning.checks import check_integer
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Commits, Pair, load_pair, resolve_commits, source_fingerprint
from dgd_lightning.target.folder import bundled


class PairSettings(NamedTuple):
    """The settings of every module that loads a pair, under the names that its constructor has for them."""

    target: str
    draft: str | None
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    draft_revision: str | None = None
    device_map: str | dict[str, int | str] | None = None
    cpu_threads: int | None = None


class PairSource:
    """What the modules with a pair share.

    Args:
        settings: ``lab`` in them is the bundled pair.

    Raises:
        InputError: ``cpu_threads`` is not a positive integer.
    """

    def __init__(self, settings: PairSettings) -> None:
        check_integer("model.cpu_threads", settings.cpu_threads, optional=True)
        target, draft = settings.target, settings.draft
        self.settings = settings._replace(target=bundled(target, "target"), draft=draft and bundled(draft, "draft"))
        self.commits: Commits | None = None

    def pin(self) -> Commits:
        """The commits of the Hub ids, looked up when first asked and kept.

        Raises:
            InputError: no such folder, Hub id or revision, or no way to reach the Hub.
        """
        if self.commits is None:
            target, draft, _, _, revision, draft_revision, *_ = self.settings
            self.commits = resolve_commits(target, draft, revision, draft_revision, prefix="model.")
        return self.commits

    def fingerprint(self) -> dict[str, Any]:
        """What the run starts from, for its provenance: revisions count by their commits."""
        commits, (target, draft, *_) = self.pin(), self.settings
        return {
            "target": source_fingerprint("target", target, commits.target),
            "draft": draft and source_fingerprint("draft", draft, commits.draft),
        }

    def load(self, trainer: Any = None, *, device: Any = "auto", draft_dtype: torch.dtype | None = None) -> Pair:
        """The pair on this rank's device, or spread over all devices of the only rank.

        Args:
            trainer: asked for the device, and to give every rank rank 0's commits (a branch may move between two
                look-ups); None loads on ``device``.
            draft_dtype: of the draft; None for the target's.

        Raises:
            InputError: the pair can't be loaded, or ``device_map`` does not suit the ranks.
        """
        settings = self.settings
        if settings.cpu_threads is not None:
            torch.set_num_threads(settings.cpu_threads)
        if trainer is not None:
            self.commits = trainer.strategy.broadcast(self.pin())
            device = self._placement(trainer)
        commits = self.pin()
        return load_pair(
            settings.target,
            settings.draft,
            dtype=settings.dtype,
            draft_dtype=draft_dtype,
            device=device,
            attn_implementation=settings.attn_implementation,
            revision=commits.target,
            draft_revision=commits.draft,
        )

    def _placement(self, trainer: Any) -> Any:
        device_map = self.settings.device_map
        if device_map is None:
            return trainer.strategy.root_device
        if trainer.world_size > 1:
            raise InputError(
                "model.device_map",
                expected="null with several ranks: each holds the whole target on a device of its own",
                received=f"{device_map!r} with {trainer.world_size} ranks",
                hint="leave it out, or set trainer.devices: 1",
            )
        return "balanced" if device_map == "auto" else device_map  # load_target's auto is one device


def check_rows_run(trainer: Any, stage: str, wanted: str) -> None:
    """What every run that writes rows asks of its trainer.

    Raises:
        InputError: another subcommand, or a precision that the weights are not loaded in.
    """
    if stage != wanted:
        raise InputError("subcommand", expected=wanted, received=stage, hint=f"run `dgd {wanted}`")
    if trainer.precision != "32-true":
        raise InputError(
            "trainer.precision",
            expected="the default",
            received=trainer.precision,
            hint="set model.dtype instead: weights are loaded in it",
        )
