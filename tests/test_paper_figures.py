"""The paper's figures, in a reduced form."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import torch_dropout_ir as tdi

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tutorial():
    path = ROOT / "tutorials" / "paper" / "fig4_condensation.py"
    spec = importlib.util.spec_from_file_location("fig4_condensation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gradient_written_by_hand_is_autograds(tutorial):
    state = torch.randn(3, 3, 20, requires_grad=True)
    noise = tdi.dropout(torch.ones(15, 20), tutorial.P)
    h = torch.tanh(tutorial.X @ state[:, :1] + state[:, 1:2])
    risks = [
        ((read @ state[run, 2] - tutorial.Y) ** 2).mean() / 2
        for run, read in enumerate((h[0], h[1] * noise, h[2]))
    ]
    r1 = tdi.regularizers.last_layer(
        h[2], state[2, 2][None], tutorial.P, loss=tdi.half_squared_error
    )
    (expected,) = torch.autograd.grad(sum(risks) + r1, state)
    torch.testing.assert_close(tutorial.gradient(state.detach(), noise), expected)


def test_fig_4_reduced(tutorial, tmp_path, monkeypatch, capsys):
    """A quarter of the steps: R_1 has condensed, the run without it has not."""
    path = tmp_path / "picture.png"
    arguments = ["fig4_condensation.py", "--steps", "24000", "--png", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    tutorial.main()
    printed = capsys.readouterr().out
    rows = {
        name: re.search(rf"^{name}\s+(.*)$", printed, re.MULTILINE)[1].split()
        for name in tutorial.RUNS
    }
    shares = {name: float(row[2]) for name, row in rows.items()}
    assert shares["without dropout"] < 0.2
    assert shares["with R_1 in the loss"] > 0.9
    assert shares["with dropout"] > 2 * shares["without dropout"]
    merged = rows["with R_1 in the loss"]
    assert int(merged[4]) <= 12
    assert float(merged[6]) <= 1.1 * float(merged[5]) * 1.01
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
