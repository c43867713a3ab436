"""Hub revisions: the right commit is loaded, every part comes from it, and an unknown one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hub_cache import NEW, OLD, add_snapshot, set_ref, use
from tiny import make_pair
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dgd_lightning import pair as pair_module
from dgd_lightning.data import responses
from dgd_lightning.data.responses import ResponsesData
from dgd_lightning.draft.checkpoint import load_draft, save_draft
from dgd_lightning.errors import InputError
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.modules.arms import Arm
from dgd_lightning.modules.decoding import Decoding
from dgd_lightning.modules.draft_training import DraftTraining
from dgd_lightning.pair import Commits, Pair, load_pair, resolve_commits
from dgd_lightning.target.load import load_target

TARGET, DRAFT = "org/target", "org/draft"
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    """One weight of the target and one of the draft, by commit."""
    return {}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Weights) -> Path:
    """Two commits of a pair with other weights and templates; main is the new one, the tag v1 the old one."""
    path = tmp_path / "hub"
    for seed, commit in ((0, OLD), (5, NEW)):
        made = make_pair(dtype=torch.float32, seed=seed)
        assert made.draft is not None
        made.target.model.save_pretrained(tmp_path / commit / "target")
        words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words, chat_template=commit).save_pretrained(
            tmp_path / commit / "target"
        )
        save_draft(made.draft, tmp_path / commit / "draft")
        add_snapshot(path, TARGET, commit, tmp_path / commit / "target")
        add_snapshot(path, DRAFT, commit, tmp_path / commit / "draft")
        weights[commit] = (made.target.embedding.weight, made.draft.fc.weight)
    for name, commit in (("main", NEW), ("v1", OLD), ("user/branch", OLD)):
        set_ref(path, TARGET, name, commit)
        set_ref(path, DRAFT, name, commit)
    use(path, monkeypatch)
    return path


def loaded_commits(pair: Pair, weights: Weights) -> tuple[str, str, str]:
    """Which commit the target's weights, its chat template and the draft's weights are of."""
    assert pair.draft is not None
    assert pair.tokenizer is not None
    target = [c for c, (weight, _) in weights.items() if torch.equal(weight, pair.target.embedding.weight)]
    draft = [c for c, (_, weight) in weights.items() if torch.equal(weight, pair.draft.fc.weight)]
    assert len(target) == len(draft) == 1
    return target[0], pair.tokenizer.chat_template, draft[0]


@pytest.mark.parametrize(
    ("revision", "draft_revision", "commits"),
    [
        (None, None, (NEW, NEW)),
        ("v1", None, (OLD, NEW)),
        (None, "v1", (NEW, OLD)),
        ("user/branch", OLD, (OLD, OLD)),
        (NEW, "main", (NEW, NEW)),
    ],
)
def test_revisions_pick_weights(
    cache: Path, weights: Weights, revision: str | None, draft_revision: str | None, commits: tuple[str, str]
) -> None:
    pair = load_pair(TARGET, DRAFT, device="cpu", revision=revision, draft_revision=draft_revision)
    assert loaded_commits(pair, weights) == (commits[0], commits[0], commits[1])
    assert resolve_commits(TARGET, DRAFT, revision, draft_revision) == Commits(*commits)


def move_main(cache: Path, commit: str) -> None:
    for hub_id in (TARGET, DRAFT):
        set_ref(cache, hub_id, "main", commit)


def test_a_branch_that_moves_while_loading(cache: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_then_move(*args: Any, **kwargs: Any) -> Any:
        target = load_target(*args, **kwargs)
        move_main(cache, OLD)
        return target

    monkeypatch.setattr(pair_module, "load_target", load_then_move)
    assert loaded_commits(load_pair(TARGET, DRAFT, device="cpu"), weights) == (NEW, NEW, NEW)
    assert resolve_commits(TARGET, DRAFT, None, None) == Commits(OLD, OLD)  # it did move


@pytest.mark.parametrize("kind", ["decoding", "training"])
def test_modules_load_the_commits_that_they_name(cache: Path, weights: Weights, kind: str) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    module: Decoding | DraftTraining
    if kind == "decoding":
        module = Decoding(TARGET, DRAFT, [Arm("a", Speculative())], draft_revision="v1")
    else:
        module = DraftTraining(TARGET, DRAFT, draft_revision="v1")
    module.trainer = trainer
    named = module.fingerprint()
    assert (named["target"], named["draft"]) == (f"{TARGET}@{NEW}", f"{DRAFT}@{OLD}")
    move_main(cache, OLD)  # between the look-up that the run folder records and the loading
    set_ref(cache, DRAFT, "v1", NEW)
    module.setup("predict")
    module.configure_model()
    pair = module.decoder.pair if isinstance(module, Decoding) and module.decoder else module.pair
    assert loaded_commits(pair, weights) == (NEW, NEW, OLD)
    assert module.fingerprint() == named


@pytest.mark.parametrize(("revision", "template"), [(None, NEW), ("v1", OLD)])
def test_responses_are_rendered_by_the_revision_that_they_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None, template: str
) -> None:
    templates = list[str]()

    def prompt_ids(tokenizer: Any, *_: Any, **__: Any) -> torch.Tensor:
        templates.append(tokenizer.chat_template)
        return torch.tensor([1])

    monkeypatch.setattr(responses, "prompt_ids", prompt_ids)
    row = {"messages": [{"role": "user", "content": "b"}], "model_output": "a", "dgd": {"output_ids": [1, 0]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    ResponsesData(str(tmp_path / "rows.jsonl"), TARGET, val_share=0.0, revision=revision).setup("fit")
    assert templates == [template]


def test_responses_count_by_the_commit(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")

    def fingerprint(revision: str | None, target: str = TARGET) -> str:
        return ResponsesData(str(path), target, revision=revision).fingerprint()

    before = fingerprint(None)
    assert before == fingerprint(NEW) != fingerprint("v1") == fingerprint(OLD)
    move_main(cache, OLD)
    assert fingerprint(None) == fingerprint("v1") != before
    assert fingerprint(None, str(tmp_path)) == fingerprint("v1", str(tmp_path))  # folders have none


def test_a_draft_learns_from_rows_of_its_targets_revision(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    module = DraftTraining(TARGET, DRAFT, revision="v1")
    module._trainer = SimpleNamespace(datamodule=ResponsesData(str(tmp_path / "rows.jsonl"), TARGET))
    with pytest.raises(InputError, match=r"^data\.revision: expected the model's revision, v1: .* received None"):
        module.setup("validate")
    module._trainer.datamodule.revision = "v1"
    module.setup("validate")


def test_responses_of_an_unknown_revision(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"^data\.revision: expected a revision of .* received v9"):
        ResponsesData(str(tmp_path / "rows.jsonl"), TARGET, revision="v9").setup("fit")


def test_folders_have_no_commit(tmp_path: Path, cache: Path) -> None:
    source = str(tmp_path / OLD / "target")
    assert resolve_commits(source, "lab", None, None) == Commits(None, None)
    first = DraftTraining(source).fingerprint()
    assert first["draft"] is None
    assert first != DraftTraining(str(tmp_path / NEW / "target")).fingerprint()  # told apart by their files


@pytest.mark.parametrize(
    ("settings", "setting", "hub_id"),
    [({"revision": "v9"}, "revision", TARGET), ({"draft_revision": "v9"}, "draft_revision", DRAFT)],
)
def test_unknown_revisions(cache: Path, settings: dict[str, str], setting: str, hub_id: str) -> None:
    expected = (
        rf"expected a revision of {hub_id} in the Hub's cache \(main, user/branch, v1, a+ and 1 more\).*received v9"
    )
    with pytest.raises(InputError, match=f"^{setting}: {expected}"):
        load_pair(TARGET, DRAFT, device="cpu", **settings)  # type: ignore[arg-type]
    for module in (
        Decoding(TARGET, DRAFT, [Arm("a", Speculative())], **settings),
        DraftTraining(TARGET, DRAFT, **settings),
    ):  # type: ignore[arg-type]
        with pytest.raises(InputError, match=rf"^model\.{setting}: {expected}"):
            module.fingerprint()


def test_a_cache_without_main(cache: Path) -> None:
    (cache / "models--org--draft" / "refs" / "main").unlink()
    with pytest.raises(InputError, match=r"^revision: .*received none, which is main\. Hint"):
        load_draft(DRAFT)
    assert load_draft(DRAFT, revision=NEW).fc.weight.isfinite().all()


def test_a_known_revision_without_files_is_no_unknown_one(cache: Path) -> None:
    set_ref(cache, DRAFT, "next", "c" * 40)  # looked up, never downloaded
    with pytest.raises(InputError, match=r"^draft: .*no cached copy"):
        load_draft(DRAFT, revision="next")


@pytest.mark.parametrize("argument", ["target", "draft"])
def test_what_the_hub_says_of_revisions(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    def refuse(name: str, **_: Any) -> str:  # the Hub's own answer cannot be had offline
        if name == f"org/{argument}":
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        return f"/snapshots/{OLD}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    setting = {"target": "revision", "draft": "draft_revision"}[argument]
    module = Decoding(TARGET, DRAFT, [Arm("a", Speculative())], revision="v8", draft_revision="v8")
    with pytest.raises(InputError, match=rf"^model\.{setting}: expected one of org/{argument}, received v8"):
        module.fingerprint()
