"""Second-order forms by chunks of rows against the same by the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir.regularizers import row_chunks, second_order


def convolutional():
    net = nn.Sequential(
        nn.Dropout(0.2), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Dropout2d(0.3),
        nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    return net, torch.randn(7, 2, 6, 6)


def transformer():
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.1, activation="gelu", batch_first=True
    )
    net = nn.Sequential(nn.Dropout(0.2), layer, nn.Flatten(), nn.Linear(40, 3))
    return net, torch.randn(9, 5, 8)


class Several(nn.Module):
    """A mapping in, a mapping out; an argument that has no rows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 2)])

    def forward(self, x, scale):
        h = self.net(x * scale)
        return {"a": self.heads[0](h), "unread": self.heads[1](h)}


def several():
    return Several(), {"x": torch.randn(6, 4), "scale": torch.tensor(1.5)}


def weighted(outputs, targets):
    weight = torch.tensor([0.5, 2.0, 1.0]).double()
    outputs = outputs["a"] if isinstance(outputs, dict) else outputs
    return F.cross_entropy(outputs, targets, weight=weight, ignore_index=1)


LOSSES = {
    "weighted": weighted,
    "module": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]).double(), ignore_index=1
    ),
}


def of_both(monkeypatch, net, batch, loss, num_samples):
    """The estimate by chunks and by the whole, with the same signs."""
    found = []
    for least in (0, 2**62):
        monkeypatch.setattr(row_chunks, "_FEWEST_ELEMENTS", least)
        torch.manual_seed(5)
        found.append(second_order(net, batch, loss, num_samples=num_samples))
    return found


CASES = [
    (make, loss, count)
    for make, loss in (
        (convolutional, "weighted"),
        (convolutional, "module"),
        (transformer, "module"),
        (several, "weighted"),
    )
    for count in (1, 6, None)
    if (make, count) != (transformer, None)  # a pass a unit of each of its sites
]


@pytest.mark.parametrize(("make", "loss", "num_samples"), CASES)
def test_chunks_of_rows_give_what_the_whole_batch_gives(
    monkeypatch, make, loss, num_samples
):
    torch.manual_seed(0)
    net, x = make()
    net = net.double()
    x = {k: v.double() for k, v in x.items()} if isinstance(x, dict) else x.double()
    count = len(x["x"] if isinstance(x, dict) else x)
    batch = x, torch.arange(count) % 3
    seen = []
    chunk = row_chunks.RowChunks._chunk
    monkeypatch.setattr(
        row_chunks.RowChunks,
        "_chunk",
        lambda self, read, rows, *rest: (
            seen.append(rows) or chunk(self, read, rows, *rest)
        ),
    )
    parts, whole = of_both(monkeypatch, net, batch, LOSSES[loss], num_samples)
    assert len(seen) >= 3 and max(r.stop - r.start for r in seen) <= -(-count // 4)
    assert not parts.notes and not whole.notes
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(parts.value, whole.value, **close)
    torch.testing.assert_close(parts.standard_error, whole.standard_error, **close)
    assert parts.per_site.keys() == whole.per_site.keys()
    for name, value in whole.per_site.items():
        torch.testing.assert_close(parts.per_site[name], value, **close)


class Masked(nn.Module):
    """Attention over as many positions as there are samples, with a mask of theirs."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(3, 3)

    def forward(self, x, mask):
        return self.out(torch.tanh(mask @ self.drop(x))).sum(1)


def meeting():
    norm = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    )
    below = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 3)
    )
    return (
        (norm, torch.randn(8, 3)),
        (below, torch.randn(8, 3)),
        (Masked(), (torch.randn(8, 8, 3), torch.randn(8, 8))),
    )


@pytest.mark.parametrize("case", range(3))
def test_samples_that_do_not_run_apart_run_together_and_it_is_said(monkeypatch, case):
    torch.manual_seed(1)
    net, x = meeting()[case]
    net = net.double()
    x = tuple(v.double() for v in x) if isinstance(x, tuple) else x.double()
    batch = x, torch.arange(8) % 3
    parts, whole = of_both(monkeypatch, net, batch, "cross_entropy", None)
    assert any("whole batch" in note for note in parts.notes)
    assert not any("whole batch" in note for note in whole.notes)
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-12, atol=1e-14)
