"""Profiles and fixtures of all tests."""

import importlib
import os
import sys
from pathlib import Path

# A stale on-disk graph would be tested in place of this source.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")
# Tensors here are small; waiting for a second thread on a busy machine is not.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def data_root():
    """Folder with MNIST; see CONTRIBUTING.md."""
    default = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("DROPOUT_IR_DATA", default))
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip(f"MNIST is not under {root}; set DROPOUT_IR_DATA")
    return root


@pytest.fixture
def script(monkeypatch):
    """Import a script of the paper's figures by its name."""
    folder = Path(__file__).parents[1] / "tutorials" / "paper"
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]
