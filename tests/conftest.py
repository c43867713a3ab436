"""Fixtures shared by the tests: tiny random pairs, a seeded generator, the folders of
reference values and of real data sets where there are such."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the process that only hands out tests need not wait for torch
    from torch import Generator

    from dgd_lightning.pair import Pair
    from dgd_lightning.target.model import Target

# The default suite never asks the network. The Hub's client reads this once, when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# Collections amid the imports of packages find nothing in a million objects, and neither do later ones.
gc.disable()


def pytest_collection_finish() -> None:
    import torch

    torch.set_num_threads(1)  # tiny models: a second thread only waits, and spins while it does
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    import fork_server

    if not session.config.option.collectonly and not getattr(session.config.option, "numprocesses", None):
        fork_server.start()


def pytest_unconfigure() -> None:
    if "fork_server" in sys.modules:
        sys.modules["fork_server"].stop()
    gc.disable()
    gc.unfreeze()  # extension modules complain of what is still there at the end


@pytest.fixture(params=["qwen3", "llama", "qwen3_moe"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def target(family: str) -> Target:
    """A tiny random target of each family, fp64."""
    from tiny import make_target

    return make_target(family)


@pytest.fixture
def pair() -> Pair:
    """A tiny random Qwen3 target and a matching draft, fp64."""
    from tiny import make_pair

    return make_pair()


@pytest.fixture
def generator() -> Generator:
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def conformance() -> Path:
    """What the original code computes: the folder DGD_CONFORMANCE names, or one beside the checkout; else a skip."""
    beside = Path(__file__).parents[2] / "shared" / "conformance"
    folder = Path(os.environ.get("DGD_CONFORMANCE", beside))
    if not folder.is_dir():
        pytest.skip("there is no conformance folder: set DGD_CONFORMANCE")
    return folder


@pytest.fixture
def bench_data() -> Path:
    """Real data sets (GSM8K, HumanEval, MATH-500, CL-bench): the folder DGD_BENCH_DATA names, or one beside the
    checkout; else a skip."""
    folder = Path(os.environ.get("DGD_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("there is no folder of real data sets: set DGD_BENCH_DATA")
    return folder


@pytest.fixture
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: the one that DGD_SMOLLM2 names; else a skip."""
    folder = Path(os.environ.get("DGD_SMOLLM2", ""))
    if not (folder / "config.json").is_file():
        pytest.skip("there is no folder of SmolLM2-135M-Instruct: set DGD_SMOLLM2")
    return folder
