"""Numbers that would be no answer: 0 where a model rounds, curvature that is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    last_layer,
    leave_one_out,
    modified_loss,
    second_order,
)


class Rounds(nn.Module):
    """One site goes on, another is rounded."""

    def __init__(self, rounded):
        super().__init__()
        self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)
        self.out, self.rounded = nn.Linear(2, 2), rounded

    def forward(self, x):
        return self.out(self.a(x)) + self.rounded(self.b(x))


@pytest.mark.parametrize("rounded", [torch.sign, torch.round, lambda h: 0 * h])
@pytest.mark.parametrize("num_samples", [None, 1, 3])
@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_a_part_that_is_zero_is_said(form, num_samples, rounded):
    torch.manual_seed(0)
    batch = torch.randn(4, 2), torch.randn(4, 2)
    found = form(Rounds(rounded), batch, "mse", num_samples=num_samples)
    assert found.per_site["b"] == 0 < found.per_site["a"]
    (note,) = found.notes
    assert "`b`: 0" in note and "monte_carlo" in note


@pytest.mark.parametrize("num_samples", [None, 1])
def test_a_part_of_a_linear_loss_is_zero_for_another_reason(num_samples):
    """The loss does depend on the site."""
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    batch = torch.randn(4, 2), torch.randn(4, 2)
    loss = lambda f, y: (f * y).mean()  # noqa: E731
    found = second_order(net, batch, loss, num_samples=num_samples)
    (note,) = found.notes
    assert found.value == 0 and "`0`: 0" in note and "linear in it" in note


@pytest.mark.parametrize("num_samples", [None, 1, 30])
@pytest.mark.parametrize(
    "loss",
    [
        lambda f, _: (f - f.detach()).norm(dim=1).mean() + f.prod(1).square().sum(),
        lambda f, _: ((f.prod(1) * 0).sqrt() + f[:, 0] * f[:, 1]).sum(),
        lambda f, y: F.mse_loss(f, y) + (f - f.detach()).prod(1).sqrt().sum(),
    ],
)
def test_curvature_that_is_not_finite_is_named(loss, num_samples):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3))
    with pytest.raises(ValueError, match="expected a finite estimate"):
        gauss_newton(
            net, (torch.randn(4, 2), torch.randn(4, 3)), loss, num_samples=num_samples
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", nn.BCEWithLogitsLoss()])
def test_what_is_not_finite_goes_through_what_is_trained(loss, bad):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 2))
    x, y = torch.randn(4, 2), torch.rand(4, 2)
    y = y.argmax(1) if loss == "cross_entropy" else y
    h, out = net[:2](x), net[3]
    h = torch.where(torch.arange(3) == 1, bad, h)
    given = {"loss": loss, "outputs": out(h), "targets": y}
    for form in (last_layer, leave_one_out):
        assert not form(h, out.weight, 0.5, **given).isfinite()
    with torch.no_grad():
        out.weight[0, 1] = bad
    for kind in ("L1", "L2", "L3", "L4", "regu"):
        found = modified_loss(net, (x, y), loss, kind=kind, lr=0.1)
        assert not found.isfinite()


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_masks_that_make_no_difference_show_no_error(p):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 3))
    batch = torch.randn(5, 3), torch.randn(5, 3)
    found = gradient_norm(net, batch, "mse", lr=0.1, num_masks=4)
    assert found.value > 0 and found.dropout_noise == 0
    errors = found.standard_error, found.dropout_noise_standard_error
    assert all(error.isnan() for error in errors)
    assert any("no two masks" in note for note in found.notes)
    idle = gradient_norm(net, batch, "mse", lr=0.0, num_masks=4)
    assert idle.standard_error == 0 and not idle.notes
    for none, said in ((0.0, "no dropout site"), (1.0, "drops everything")):
        net[2].p = none
        same = gradient_norm(net, batch, "mse", lr=0.1, num_masks=4)
        assert same.value > 0 and same.standard_error == 0  # there are no other masks
        assert len(same.notes) == 1 and said in same.notes[0]
    net[2].p = 0.5
    known = gradient_norm(net, batch, "mse", lr=0.1, num_masks=4)
    assert known.dropout_noise_standard_error > 0 and not known.notes
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        net[2].p = p
        F.mse_loss(net(batch[0]), batch[1]).backward()
        sgd.step()
    error = "regularizer/R2_dropout_noise_standard_error"
    assert error not in analysis.latest and "no two masks" in analysis.absent[error]


def test_units_that_are_zero_show_no_error():
    """Of 32 units one is alive: in every fifth run all masks keep it."""
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.05), nn.Linear(32, 1)).double()
    x = -torch.ones(1, 32, dtype=torch.float64)
    x[0, 3] = 1.0
    batch = x, torch.zeros(1, 1, dtype=torch.float64)
    for num_masks in (32, 500):
        for seed in range(20 if num_masks < 500 else 2):
            torch.manual_seed(seed)
            found = tdi.regularizers.monte_carlo(
                model, batch, "mse", num_masks=num_masks
            )
            known = bool(found.standard_error.isfinite())
            assert known == (num_masks == 500)
            assert known != any("no standard error" in note for note in found.notes)
    exact = gauss_newton(model, batch, "mse", num_samples=None).value
    assert abs(found.value - exact) < 4 * found.standard_error
