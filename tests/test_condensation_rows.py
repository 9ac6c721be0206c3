"""Rows that are put together when they are taken are the rows of the matrix."""

import pytest
import torch

from torch_dropout_ir import condensation as cd
from torch_dropout_ir.condensation import rows as module
from torch_dropout_ir.condensation.rows import Rows, UnitRows, row_norms, unit_rows

KINDS = ("plain", "zero", "huge", "tiny", "not finite", "half")


def weights(kind):
    made = torch.randn(90, 12)[torch.randint(90, (150,))] * (torch.rand(150, 1) + 0.1)
    if kind == "zero":
        made[::7] = 0
    if kind == "huge":
        made[3] *= 1e30
    if kind == "tiny":
        made[4] *= 1e-30
    if kind == "not finite":
        made[5, 2], made[9, 3] = torch.nan, torch.inf
    return made.half() if kind == "half" else made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_unit_rows_are_those_of_the_matrix(monkeypatch, kind, biased):
    matrix = weights(kind)
    expected = unit_rows(matrix)
    given = Rows(matrix[:, :-1], matrix[:, -1]) if biased else matrix
    monkeypatch.setattr(module, "_HELD", 0)
    monkeypatch.setattr(module, "_SHORT", 0)
    rows = UnitRows(given)
    some = torch.tensor([8, 3, 3, 4, 5, 149])
    same = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(row_norms(given), row_norms(matrix), equal_nan=True)
    for found in (rows[:], rows.at(torch.arange(150))[:]):
        torch.testing.assert_close(found, expected, **same)
    torch.testing.assert_close(rows.at(some)[1:], expected[some][1:], **same)
    torch.testing.assert_close(rows[some], expected[some], **same)
    tile = expected[:20] @ expected[30:].T
    torch.testing.assert_close(rows.tile(slice(20), slice(30, 150)), tile, **same)
    columns = torch.randn(12, 2)
    torch.testing.assert_close(rows @ columns, expected @ columns, **same)
    sound = rows.norms.isfinite()
    sums = rows.at(sound).sums(torch.ones(int(sound.sum()), 2))
    torch.testing.assert_close(sums[:, 0], expected[sound].sum(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_rows_is_what_is_said_of_the_matrix(monkeypatch, kind):
    matrix = weights(kind)

    def said(given):
        found = cd.effective_neurons(given, 0.9, 0.01)
        return (
            found.labels,
            torch.tensor(found.lower_bound),
            cd.cluster_order(given, found.labels),
            cd.cosine_statistics(given).counts,
            cd.orientation_angles(given),
        )

    whole = said(matrix)
    monkeypatch.setattr(module, "_HELD", 0)
    monkeypatch.setattr(module, "_SHORT", 0)
    for given in (matrix, Rows(matrix[:, :-1], matrix[:, -1])):
        *counts, angles = said(given)
        assert all(torch.equal(a, b) for a, b in zip(counts[:2], whole, strict=False))
        # Two neurons of one angle and a cosine on the edge of a bin may be exchanged.
        assert sorted(counts[2].tolist()) == list(range(150))
        clusters = [whole[0][order].unique_consecutive() for order in counts[2:3]]
        assert torch.equal(clusters[0], whole[0][whole[2]].unique_consecutive())
        assert int((counts[3] - whole[3]).abs().sum()) <= 4
        away = torch.remainder(angles - whole[4] + torch.pi, 2 * torch.pi) - torch.pi
        assert torch.equal(angles.isnan(), whole[4].isnan())
        assert float(away.nan_to_num().abs().max()) < 1e-3


def test_layers_give_rows_of_what_they_are():
    layers = (
        torch.nn.Linear(6, 9),
        torch.nn.Conv2d(4, 6, 3, groups=2),
        torch.nn.ConvTranspose2d(4, 6, 3),
        torch.nn.MultiheadAttention(6, 2),
        torch.nn.Linear(6, 9, bias=False),
    )
    for layer in layers:
        pairs = [
            *zip(
                cd.layers.named_rows(torch.nn.Sequential(layer)),
                cd.named_input_weights(torch.nn.Sequential(layer)),
                strict=True,
            )
        ]
        assert pairs
        for (name, rows), (other, matrix) in pairs:
            assert name == other and rows.shape == matrix.shape
            assert torch.equal(rows[2:5], matrix[2:5])


def test_norms_read_are_those_of_the_outgoing_weights():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.Conv2d(6, 4, 3, groups=2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 16, 5),
    )  # fmt: skip
    torch.nn.init.normal_(net[1].weight)
    modules = dict(net.named_modules())
    found = cd.outgoing_weights(net)
    for name in ("0", "3"):
        out = found[name]
        norms = cd.graph.norms_read(modules, name, out.consumers, out.norm)
        torch.testing.assert_close(norms, out.weight.norm(dim=0))
        assert cd.graph.readers(net)[name].weight is None
