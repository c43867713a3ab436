"""`PairSources`: where a module's pair comes from, each Hub id pinned to one commit per run."""

from __future__ import annotations

from typing import Any

from dgd_lightning.pair import Commits, resolve_commits, source_fingerprint


class PairSources:
    """What the modules with a pair share; they set the sources and the revisions."""

    target_source: str
    draft_source: str | None
    revision: str | None
    draft_revision: str | None
    commits: Commits | None = None

    def pin(self) -> Commits:
        """The commits of the Hub ids, looked up when first asked and kept.

        Raises:
            InputError: no such folder, Hub id or revision, or no way to reach the Hub.
        """
        if self.commits is None:
            self.commits = resolve_commits(
                self.target_source, self.draft_source, self.revision, self.draft_revision, prefix="model."
            )
        return self.commits

    def fingerprint(self) -> dict[str, Any]:
        """What the run starts from, for its provenance."""
        commits = self.pin()
        return {
            "target": source_fingerprint("target", self.target_source, commits.target),
            "draft": self.draft_source and source_fingerprint("draft", self.draft_source, commits.draft),
        }
