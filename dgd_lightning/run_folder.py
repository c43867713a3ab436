"""The run folder `logs/<name>/version_n/`: which version a command continues, its shards, its merged rows.

`predict` writes `predictions.jsonl`, `test` of a diagnostic writes `diagnostic.jsonl`; a version holds one of them.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dgd_lightning import jsonl
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.old_rows import is_old, upgraded

PREDICTIONS, DIAGNOSTIC = "predictions.jsonl", "diagnostic.jsonl"
ROWS = {"predict": PREDICTIONS, "test": DIAGNOSTIC}  # by stage
PROVENANCE, DONE = "provenance.json", "DONE"
TIMINGS = tuple(  # the only fields that may differ in a rerun
    "prefix_seconds prefill_seconds decode_seconds rank_seconds seconds tokens_per_second "
    "ttt_prefill_seconds ttt_validation_seconds ttt_fit_seconds ttt_peak_memory".split()
)
SHARDS = ("predictions.rank*.*", "diagnostic.rank*.*")  # and their marks
POLL, FIRST_WORD, NEXT_WORD = 0.2, 10.0, 60.0  # seconds, of rank 0 that waits for other ranks
STARTED = (PROVENANCE, "config.yaml", "hparams.yaml", "events.out.tfevents.*", *SHARDS)

Key = tuple[str, str]  # (idx, arm)


def config_hash(module: Any, data: Any) -> str:
    """Hash of all that shapes a run's rows: the module's and the data's ``fingerprint()``."""
    return jsonl.content_key(module.fingerprint(), data.fingerprint())[:16]


def unfinished_version(root: Path, wanted: str) -> int | None:
    """The newest unfinished version of this configuration's hash that no living process writes."""
    for version in _versions(root):
        folder = root / f"version_{version}"
        busy = any(jsonl.held(shard(folder, 0, name)) for name in ROWS.values())
        if not (folder / DONE).exists() and _hash_of(folder) == wanted and not busy:
            return version
    return None


def next_version(root: Path) -> int:
    """The number of a new version."""
    return max(_versions(root), default=-1) + 1


def _versions(root: Path) -> list[int]:
    return sorted((int(p.name[8:]) for p in root.glob("version_*") if p.name[8:].isdecimal()), reverse=True)


def choose_version(root: Path, wanted: str | None, by_word: str | None = None) -> int:
    """The newest unfinished version of this configuration that no living process writes, or a new one.

    A new one's folder is made here, so that of several runs that start together each gets its own; until it names its
    configuration, no other run takes it. Where ``wanted``, a configuration's hash, is None, no version is continued.
    Of an unfinished version with the hash ``by_word``, which the configuration had before, is said why it is not.
    """
    if wanted is not None and (found := unfinished_version(root, wanted)) is not None:
        return found
    unfinished = (root / f"version_{v}" for v in _versions(root) if not (root / f"version_{v}" / DONE).exists())
    if wanted is not None and (old := next(filter(_has_old_rows, unfinished), None)) is not None:
        print(f"{old} is unfinished, but its rows have the form of before version 0.2: this run begins anew")
    if by_word not in (None, wanted) and (of_word := unfinished_version(root, str(by_word))) is not None:
        why = "began when `dtype: auto` was recorded as this word, not as what it came to"
        print(f"{root / f'version_{of_word}'} is unfinished, but {why}: this run begins anew")
    version = next_version(root)
    while True:
        try:
            (root / f"version_{version}").mkdir(parents=True)
            return version
        except FileExistsError:  # another run has just taken it
            version += 1


def newest_version(root: Path) -> Path | None:
    """The last version of a run's folder ``logs/<name>``, which holds rows of no run itself; None for any other."""
    return next((root / f"version_{version}" for version in _versions(root)), None)


def discard_start(folder: Path) -> None:
    """Removes a version that holds what every start writes, without a row, and nothing else.

    The provenance goes first: without it no other run continues the version.
    """
    files = sorted(folder.iterdir(), key=lambda path: path.name != PROVENANCE)
    rows = any(path.stat().st_size for name in ROWS.values() for path in sources(folder, name))
    if all(any(map(path.match, STARTED)) for path in files) and not rows:
        for path in files:
            path.unlink()
        folder.rmdir()


def _hash_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / PROVENANCE).read_text()).get("config_hash")
    except (OSError, ValueError):
        return None


def _has_old_rows(folder: Path) -> bool:
    first = next((line.text for path in sources(folder) for line in jsonl.lines(path)), b"{}")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        return is_old(json.loads(first))
    return False


def shard(folder: Path, rank: int, name: str = PREDICTIONS) -> Path:
    """The file that a rank appends to; the name is that of the merged file."""
    return folder / f"{Path(name).stem}.rank{rank}.jsonl"


def sources(folder: Path, name: str = PREDICTIONS) -> list[Path]:
    """Files with rows, in the order in which a doubled row is looked for: the merged file, then the shards."""
    found = folder.glob(f"{Path(name).stem}.rank*.jsonl")
    shards = sorted(found, key=lambda path: int(path.stem.rpartition("rank")[2]))
    return [path for path in (folder / name, *shards) if path.exists()]


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a merged file or a shard, each after the byte where it begins; a torn last line is left out."""
    for number, (offset, line) in enumerate(jsonl.lines(path), 1):
        try:
            row = json.loads(line)
            row["idx"], row["dgd"]["arm"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} line {number}",
                expected="a row written by dgd",
                received=line[:60],
                hint="delete the line; the run makes it again",
            ) from error
        yield offset, upgraded(row)


def rows_so_far(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder whose run may still be going on, each once."""
    seen: set[Key] = set()
    for path in sources(folder):
        for _, row in read_rows(path):
            if key(row) not in seen:
                seen.add(key(row))
                yield row


def key(row: dict[str, Any]) -> Key:
    """What a row is about: no two rows of a run share it."""
    return row["idx"], row["dgd"]["arm"]


def batch_share(record: dict[str, Any]) -> float:
    """Of a row with this ``dgd``: its share of the tokens that its batch decoded, and so of the batch's time."""
    return record["decoded_tokens"] / record["batch_tokens"] if record["batch_tokens"] else 0.0


def mark(folder: Path, rank: int, name: str = PREDICTIONS) -> Path:
    """The file that says that a rank's shard is whole, by the shard's size."""
    return shard(folder, rank, name).with_suffix(".done")


def mark_whole(folder: Path, rank: int, name: str = PREDICTIONS) -> None:
    """Says that a rank's shard, which is closed, has all of the rank's rows."""
    path = mark(folder, rank, name)
    with whole_files(folder, path.name) as scratch:
        (scratch / path.name).write_text(str(shard(folder, rank, name).stat().st_size))


def _is_whole(folder: Path, rank: int, name: str) -> bool:
    """Whether a rank has marked its shard, and all of it can be seen here: rows of another machine may come late."""
    try:
        return shard(folder, rank, name).stat().st_size >= int(mark(folder, rank, name).read_text())
    except FileNotFoundError:
        return False


def await_shards(folder: Path, ranks: Iterable[int], name: str, seconds: float) -> None:
    """Returns when these ranks have marked their shards as whole, within so many seconds; says for whom it waits."""
    started, next_word = time.monotonic(), FIRST_WORD
    while missing := [shard(folder, rank, name).name for rank in ranks if not _is_whole(folder, rank, name)]:
        waited, shards = time.monotonic() - started, ", ".join(missing)
        if waited >= seconds:
            raise InputError(
                str(folder),
                expected=f"the rows of all ranks within {seconds / 3600:g} hours of rank 0's last (merge_wait)",
                received=f"none or not all in {shards}",
                hint="the same command continues; give PredictionWriter a longer merge_wait if ranks still decode",
            )
        if waited >= next_word:
            print(f"waiting for the last rows of {shards}: {waited / 60:.1f} minutes so far", flush=True)
            next_word += NEXT_WORD
        time.sleep(POLL)


def index(folder: Path, name: str = PREDICTIONS) -> dict[Key, tuple[Path, int]]:
    """In which file, and from which byte on, each finished row is; a row written twice counts once."""
    found: dict[Key, tuple[Path, int]] = {}
    for path in sources(folder, name):
        for offset, row in read_rows(path):
            found.setdefault(key(row), (path, offset))
    return found


def merge(folder: Path, order: Sequence[Key], name: str = PREDICTIONS) -> int:
    """Writes the file of this name from all shards, atomically, in the given order; returns how many rows are there.

    The result depends on the rows alone: not on ranks, on kills, or on how often it is done.
    """
    places = index(folder, name)
    for left in folder.glob(".writing-*"):  # by a merge that was killed: rank 0 alone writes here
        shutil.rmtree(left, ignore_errors=True)
    rows = [places[wanted] for wanted in order if wanted in places]  # copied one by one: memory need not hold them
    with whole_files(folder, name) as scratch, contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in rows}}
        out = stack.enter_context((scratch / name).open("wb"))
        for path, offset in rows:
            files[path].seek(offset)
            out.write(files[path].readline())
        out.flush()
        os.fsync(out.fileno())
    return len(rows)


def finish(folder: Path, name: str = PREDICTIONS) -> None:
    """Marks the run complete and removes the shards, whose rows are all in the merged file, with their marks."""
    (folder / DONE).touch()
    for path in folder.glob(f"{Path(name).stem}.rank*"):
        path.unlink()


def read_predictions(folder: str | Path, name: str = PREDICTIONS) -> Iterator[dict[str, Any]]:
    """Rows of the merged file, one at a time."""
    path = Path(folder) / name
    yield from (row for _, row in read_rows(path)) if path.exists() else ()
