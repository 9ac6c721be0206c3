"""Sharpness in a training run: warm starts, notes, what cannot be differentiated."""

import weakref

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import Sharpness
from torch_dropout_ir.analysis.records import Histogram
from torch_dropout_ir.analysis.snapshot import Snapshot
from torch_dropout_ir.losses import resolve_loss


class Sink:
    def __init__(self):
        self.records, self.notes = [], {}

    def write(self, step, records, notes):
        self.records.append(dict(records))
        self.notes.update(notes)

    def close(self):
        pass


class Idle(nn.Module):
    """Has a parameter that the loss does not depend on."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 12), activation(), nn.Dropout(), nn.Linear(12, 3)
        )
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x)


def train(model, steps=4):
    torch.manual_seed(0)
    sink, criterion = Sink(), nn.CrossEntropyLoss()
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    spent = []
    real = tdi.sharpness.top_eigenvalues

    def counted(op, **arguments):
        found = real(op, **arguments)
        spent.append((arguments["start"] is not None, found.num_matvecs))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tdi.sharpness, "top_eigenvalues", counted)
        analysis = tdi.attach_analysis(model, log_dir=False, every=1, sinks=[sink])
        with analysis:
            for _ in range(steps):
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
    return analysis, sink, spent


def test_warm_starts_spend_less():
    _, _, spent = train(Idle())
    assert [warm for warm, _ in spent] == [False, True, True, True]
    assert all(count < spent[0][1] for _, count in spent[1:])


def test_records_notes_and_idle_parameters():
    torch.manual_seed(0)
    analysis, sink, _ = train(Idle())
    assert "sharpness" not in analysis.absent
    assert analysis.notes["sharpness/trace"].startswith("exact")
    assert analysis.latest["sharpness/trace_standard_error"] == 0
    last = sink.records[-1]
    density, slice_ = last["sharpness/spectral_density"], last["sharpness/loss_slice"]
    assert isinstance(density, Histogram)
    assert float(density.counts.sum()) == pytest.approx(1.0, abs=0.01)
    assert density.high > last["sharpness/top_eigenvalue"] * 0.9
    assert slice_.counts.numel() == 11
    assert float(slice_.counts[5]) == pytest.approx(last["loss/R_S"], rel=1e-5)
    smooth, *_ = train(Idle(nn.Tanh), 1)
    assert "Gauss-Newton" in smooth.notes["sharpness/trace"]


def test_used_parameters():
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    used = tdi.sharpness.used_parameters(Idle(), "cross_entropy", batch)
    assert used == ["net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"]


def test_the_basis_of_the_eigenvalue_is_let_go_of_before_the_rest(monkeypatch):
    sharpness, bases, alive = tdi.sharpness, [], []
    top, density = sharpness.top_eigenvalues, sharpness.spectral_density

    def with_basis(op, **arguments):
        assert arguments["max_bytes"] == 2**22
        found = top(op, **arguments)
        bases.append(weakref.ref(found))
        return found

    def looking(op, **arguments):
        alive.append(bases[-1]() is not None)
        return density(op, **arguments)

    monkeypatch.setattr(sharpness, "top_eigenvalues", with_basis)
    monkeypatch.setattr(sharpness, "spectral_density", looking)
    train_once(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)))
    assert alive == [False]


def train_once(model):
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    snapshot = Snapshot(
        model, 0, (), loss=resolve_loss("cross_entropy"), batches=[(x, y)]
    )
    return Sharpness()(snapshot)
