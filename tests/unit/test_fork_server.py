"""Children of the fork server are what fresh processes would be, to what the tests ask of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fork_server import launch, launched


def test_a_child_has_its_own_arguments_environment_and_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("json.__doc__", None)  # as any change that a test makes in its own process
    code = "import json, os, sys; assert json.__doc__; print(sys.argv[1:], os.environ, os.getcwd())\n"
    code += "print('oh', file=sys.stderr); sys.exit(7)"
    done = launched("a", "b c", code=code, env={"ONLY": "this"})
    assert done.returncode == 7
    assert done.stdout == f"['a', 'b c'] environ({{'ONLY': 'this'}}) {tmp_path}\n"
    assert done.stderr == "oh\n"
    assert launched("--help").stdout.startswith("usage: dgd")
    mistake = launched("decode")
    assert (mistake.returncode, len(mistake.stderr.splitlines())) == (2, 1)


def test_a_traceback_is_an_exit_code_of_one() -> None:
    done = launched(code="raise ValueError('no')")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: no"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_meet_the_default_handlers(number: signal.Signals) -> None:
    child = launch(code="import time; print('up', flush=True); time.sleep(60)")
    assert os.getpgid(child.pid) == child.pid  # a group of its own
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    assert child.poll() is None
    time.sleep(0.2)
    child.send_signal(number)
    out, err = child.communicate(20)
    assert out == "up\n"
    if number == signal.SIGINT:
        assert (child.returncode, err.splitlines()[-1]) == (1, "KeyboardInterrupt")
    else:
        assert (child.returncode, err) == (-number, "")


def test_a_full_disk(tmp_path: Path) -> None:
    done = launched(
        tmp_path / "much", code="import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(b'x' * 9000)", room=5000
    )
    assert "File too large" in done.stderr
    assert (tmp_path / "much").stat().st_size == 5000
