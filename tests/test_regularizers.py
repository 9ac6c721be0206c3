"""R_1 and R_2 against enumeration of every mask, closed forms and autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_dropout_ir as tdi
from tests.reference.enumeration import every_mask, expected_risk
from torch_dropout_ir import losses, output_hessian
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    last_layer,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.regularizers.masked import clean_risk
from torch_dropout_ir.regularizers.online import online

MSE = (F.mse_loss, nn.MSELoss(), nn.MSELoss(reduction="sum"), tdi.half_squared_error)


def excess(net, widths, batch, loss):
    """``E[R_drop] - R_S`` by enumeration."""
    clean = float(clean_risk(net, batch, losses.resolve_loss(loss)).detach())
    return expected_risk(net, widths, batch, loss) - clean


def features_of(net, x):
    return net[:-2](x)


@settings(max_examples=80)
@given(tdi.testing.problems(), st.sampled_from(range(len(MSE))))
def test_lemma_1_holds_exactly(problem, which):
    """Any width, depth, activation, p and batch: the two sides are equal."""
    net, batch = problem
    p, width = net[-2].p, net[-1].in_features
    loss = MSE[which]
    closed = last_layer(features_of(net, batch[0]), net[-1].weight, p, loss=loss)
    exact = gauss_newton(net, batch, loss, num_samples=None)
    truth = excess(net, [width], batch, loss)
    scale = max(1.0, abs(truth))
    assert abs(float(closed.detach()) - truth) < 1e-10 * scale
    assert abs(float(exact.value) - truth) < 1e-10 * scale
    assert exact.exact and float(exact.standard_error) == 0


def test_last_layer_in_the_papers_normalization():
    h, w = torch.randn(7, 5).double(), torch.randn(3, 5).double()
    expected = (0.2 / 0.8) / 2 * (h**2 @ (w**2).sum(0)).mean()
    paper = last_layer(h, w, 0.2, loss=tdi.half_squared_error)
    torch.testing.assert_close(paper, expected)
    torch.testing.assert_close(last_layer(h, w, 0.2), expected * 2 / 3)


def general_losses():
    weight = torch.tensor([0.5, 2.0, 1.0]).double()
    labels = torch.tensor([0, 2, 1, 1, 2])
    soft = torch.randn(5, 3).double().softmax(1)
    return (
        (F.cross_entropy, labels),
        (nn.CrossEntropyLoss(reduction="sum"), labels),
        (nn.CrossEntropyLoss(label_smoothing=0.1), labels),
        (nn.CrossEntropyLoss(weight=weight), labels),
        (nn.CrossEntropyLoss(ignore_index=1), labels),
        (nn.CrossEntropyLoss(label_smoothing=0.2), 0.5 * soft),
        (nn.BCEWithLogitsLoss(), soft),
        (lambda f, t: F.mse_loss(f, t), soft),
        (lambda f, t: -((f - t) ** 2).cos().mean(), soft),  # indefinite
    )


@pytest.mark.parametrize("case", range(9))
def test_every_loss_gives_the_second_order_form_of_its_own_hessian(case):
    loss, targets = general_losses()[case]
    torch.manual_seed(case)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    net = net.double()
    x = torch.randn(5, 4).double()
    h = features_of(net, x).detach()
    outputs = net[-1](h)
    full = torch.autograd.functional.hessian(lambda f: loss(f, targets), outputs)
    blocks = torch.stack([full[i, :, i] for i in range(5)])
    o = h[:, :, None] * net[-1].weight.T[None]  # (n, units, outputs)
    expected = (0.3 / 0.7) / 2 * torch.einsum("nja,nab,njb->", o, blocks, o)
    closed = last_layer(
        h, net[-1].weight, 0.3, loss=loss, outputs=outputs, targets=targets
    )
    torch.testing.assert_close(closed, expected)
    exact = gauss_newton(net, (x, targets), loss, num_samples=None)
    torch.testing.assert_close(exact.value, expected.detach())
    sampled = gauss_newton(net, (x, targets), loss, num_samples=400)
    error = sampled.standard_error
    assert error > 0
    assert (sampled.value - expected).abs() < 4 * error
    assert exact.exact == (case == 7)  # it adds squares
    assert not sampled.exact


def test_roots_multiply_to_the_hessian():
    outputs = torch.randn(4, 3).double()
    for loss, targets in general_losses():
        resolved = losses.resolve_loss(loss)
        few = targets[:4]
        product = HessianProduct(resolved, outputs, few)
        blocks = output_hessian.hessian_columns(product).movedim(0, -1)
        multiplied = sum(
            torch.einsum("na,nb->nab", s, s) * torch.as_tensor(sign).view(-1, 1, 1)
            for s, sign in output_hessian.HessianRoots(resolved, outputs, few).exact()
        )
        torch.testing.assert_close(multiplied, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coupled", [False, True])
def test_the_part_of_a_single_site_is_r1_itself_online(dtype, coupled):
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 4), nn.Tanh(),
        nn.Linear(4, 2),
    ).to(dtype)  # fmt: skip
    batch = torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)
    pairs = lambda f, t: F.mse_loss(f - f.flip(0).tanh(), t)  # noqa: E731
    loss = losses.resolve_loss(pairs if coupled else "mse")
    found, how, _ = online(net, batch, loss)
    assert found.per_site == {"2": found.value} and "by site" not in how
    assert found.per_site_standard_error == {"2": found.standard_error}
    assert found.standard_error > 0 and found.value.dtype == dtype


@pytest.mark.parametrize("kind", ["mse", "cross_entropy"])
def test_without_targets_it_is_the_form_which_squares_alone_make_exact(kind):
    last = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    deep = nn.Sequential(*last, nn.Tanh(), nn.Linear(2, 2))
    x, loss = torch.randn(5, 3), losses.resolve_loss(kind)
    found, how, risk = online(last, (x, None), loss)
    assert risk is None and found.exact == (kind == "mse")
    assert how.startswith("exact" if found.exact else "second order (approximate")
    found, how, _ = online(deep, (x, None), loss)
    assert "approximate" in how and not found.exact
    assert found.num_samples == 2 and found.standard_error > 0
    with pytest.raises(ValueError, match="finite"):
        online(deep, (x * float("nan"), None), loss)


def test_channels_and_sites_that_drop_everything_have_no_closed_form_online():
    net = nn.Sequential(nn.Dropout1d(0.3), nn.Linear(2, 2)).double()
    batch = torch.randn(3, 3, 2).double(), torch.randn(3, 3, 2).double()
    mse = losses.resolve_loss("mse")
    found, how, _ = online(net, batch, mse)
    assert "closed form" not in how and not found.exact
    net[0] = nn.Dropout(1.0)
    found, how, risk = online(net, batch, mse)
    assert "closed form" not in how
    nothing = F.mse_loss(net[1](0 * batch[0]), batch[1]).detach()
    torch.testing.assert_close(found.value, nothing - risk)


def test_random_roots_of_wide_blocks_square_to_the_hessian():
    """Of more outputs than are taken at once, and curved both ways."""
    n, mix = 1500, torch.randn(10, 10).double()

    def loss(f, _):
        return (f @ mix).sin().sum()

    row = torch.randn(1, 10).double()
    block = torch.autograd.functional.hessian(lambda f: loss(f, None), row)[0, :, 0]
    outputs = row.expand(n, 10).contiguous()
    roots = output_hessian.HessianRoots(losses.resolve_loss(loss), outputs, None)
    found = [(root[:n], sign) for root, sign in roots.sample()]
    assert {sign for _, sign in found} == {1.0, -1.0}
    squares = sum(sign * root.T @ root / n for root, sign in found)
    size = block.diagonal().abs().max()
    assert (squares - block).abs().max() < 0.3 * size
    own = torch.tensor([3, 0])
    assert all(root.shape == (2, 10) for root, _ in roots.sample(own))


def test_cross_entropy_of_images_reads_classes_in_dimension_one():
    net = nn.Sequential(nn.Dropout(0.4), nn.Conv2d(2, 3, 1)).double()
    x, y = torch.randn(2, 2, 2, 2).double(), torch.randint(3, (2, 2, 2))
    known = gauss_newton(net, (x, y), F.cross_entropy, num_samples=None)
    general = gauss_newton(
        net, (x, y), lambda f, t: F.cross_entropy(f, t), num_samples=None
    )
    torch.testing.assert_close(known.value, general.value)


def test_channel_dropout_squares_the_sum_over_positions():
    net = nn.Sequential(nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(12, 2)).double()
    batch = torch.randn(3, 3, 2, 2).double(), torch.randn(3, 2).double()
    found = gauss_newton(net, batch, "mse", num_samples=None)
    clean = float(clean_risk(net, batch, losses.resolve_loss("mse")).detach())
    total = 0.0
    for mask, chance in every_mask(3, 0.3):
        noise = (mask / 0.7)[None, :, None, None]
        total += chance * float(
            F.mse_loss(net[1:](batch[0] * noise), batch[1]).detach()
        )
    assert abs(float(found.value) - (total - clean)) < 1e-12


def test_several_sites_add_and_linear_networks_agree_to_second_order():
    net = nn.Sequential(
        nn.Dropout(0.01), nn.Linear(3, 4), nn.Dropout(0.02), nn.Linear(4, 2)
    ).double()
    batch = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    found = gauss_newton(net, batch, "mse", num_samples=None)
    assert set(found.per_site) == {"0", "2"}
    assert not found.exact
    torch.testing.assert_close(sum(found.per_site.values()), found.value)
    assert float(found.value) == pytest.approx(
        excess(net, [3, 4], batch, F.mse_loss), rel=0.03
    )


@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy])
def test_sampled_gauss_newton_is_unbiased_with_batch_norm(loss):
    """Batch normalization couples the samples: both forms must know."""
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.3), nn.BatchNorm1d(4), nn.Linear(4, 3)
    ).double()
    y = torch.tensor([0, 1, 2, 1]) if loss is F.cross_entropy else torch.randn(4, 3)
    batch = torch.randn(4, 3).double(), y if y.dtype == torch.int64 else y.double()
    exact = gauss_newton(net, batch, loss, num_samples=None)
    sampled = gauss_newton(net, batch, loss, num_samples=200)
    assert (sampled.value - exact.value).abs() < 4 * sampled.standard_error
    h = net[0](batch[0]).detach()
    jacobian = torch.autograd.functional.jacobian(lambda h: net[2:](h), h)
    outputs = net[2:](h).detach()
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, batch[1]), outputs)
    blocks = torch.stack([hessian[i, :, i] for i in range(4)])
    by_hand = torch.einsum("lahj,lab,lbhj->hj", jacobian, blocks, jacobian) * h**2
    torch.testing.assert_close(exact.value, (0.3 / 0.7) / 2 * by_hand.sum())


def test_standard_error_shrinks_and_covers():
    net = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip
    batch = torch.randn(16, 4).double(), torch.randn(16, 3).double()
    truth = gauss_newton(net, batch, "mse", num_samples=None).value
    draws = [gauss_newton(net, batch, "mse", num_samples=4) for _ in range(200)]
    z = torch.stack([(d.value - truth) / d.standard_error for d in draws])
    assert 0.8 < z.std() < 1.25
    assert z.mean().abs() < 4 / 200**0.5
    single = [gauss_newton(net, batch, "mse", num_samples=1) for _ in range(400)]
    claimed = torch.stack([d.standard_error for d in single]).square().mean()
    spread = torch.stack([d.value for d in single]).var()
    assert claimed > 0.9 * spread  # one sample: an upper bound, on average


class Sites(nn.Module):
    """A site at the input, one that is used twice, and one that does not matter."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.idle = map(nn.Dropout, (0.2, 0.5, 0.4))
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 8)
        self.three = nn.Linear(8, 3)

    def forward(self, x):
        h = self.twice(self.one(self.first(x)).tanh())
        self.idle(h)
        return self.three(self.twice(self.two(h).tanh()))


@pytest.mark.parametrize("form", [gauss_newton, second_order])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_standard_errors_of_the_sites_are_their_spread(form, num_samples):
    """Of equal samples one draw tells it without bias, for their means are equal."""
    torch.manual_seed(0)
    net, x, y = Sites().double(), torch.randn(1, 4).double(), torch.tensor([1])
    batch = x.expand(12, 4), y.expand(12)
    draws = [
        form(net, batch, "cross_entropy", num_samples=num_samples) for _ in range(400)
    ]
    exact = form(net, batch, "cross_entropy", num_samples=None)
    assert not any(exact.per_site_standard_error.values())
    for name in ("first", "twice"):
        parts = torch.stack([d.per_site[name] for d in draws])
        errors = torch.stack([d.per_site_standard_error[name] for d in draws])
        assert (parts.mean() - exact.per_site[name]).abs() < 4 * parts.std() / 20
        assert 0.85 < errors.square().mean().sqrt() / parts.std() < 1.15
        assert not torch.equal(errors[0], draws[0].standard_error)
    for d in draws:
        assert [*d.per_site_standard_error] == [*d.per_site]
        assert d.per_site_standard_error["idle"] == 0


@pytest.mark.parametrize("form", [gauss_newton, second_order])
def test_sites_below_samples_that_meet_have_an_error_from_two_draws_on(form):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(8, 3),
    ).double()  # fmt: skip
    batch = torch.randn(12, 4).double(), torch.randint(3, (12,))
    one = form(net, batch, "cross_entropy").per_site_standard_error
    assert [*one] == ["0", "4"] and all(x.isnan() for x in one.values())
    draws = [form(net, batch, "cross_entropy", num_samples=6) for _ in range(300)]
    for name in one:
        parts = torch.stack([d.per_site[name] for d in draws])
        errors = torch.stack([d.per_site_standard_error[name] for d in draws])
        assert 0.85 < errors.square().mean().sqrt() / parts.std() < 1.15
    assert not monte_carlo(net, batch, "cross_entropy").per_site_standard_error


def test_monte_carlo_is_unbiased_for_any_loss():
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
    net = net.double()
    batch = torch.randn(4, 2).double(), torch.tensor([0, 1, 2, 0])
    truth = excess(net, [5], batch, F.cross_entropy)
    # `excess` has put its own noise in the place of the dropout
    net[2] = nn.Dropout(0.5)
    found = monte_carlo(net, batch, "cross_entropy", num_masks=1000)
    assert abs(float(found.value) - truth) < 4 * float(found.standard_error)
    assert float(found.standard_error) < 0.2 * truth
    assert found.num_samples == 1000 and not found.exact


@given(tdi.testing.problems(max_width=4, max_depth=1), st.floats(0.001, 1.0))
def test_r2_decomposes(problem, lr):
    net, batch = problem
    r2 = gradient_norm(net, batch, "mse", lr=lr, num_masks=2)
    torch.testing.assert_close(r2.value, r2.mean_gradient + r2.dropout_noise)
    assert r2.dropout_noise >= 0
    assert bool(r2.standard_error.isnan())


@pytest.mark.parametrize("shared", [True, False])
def test_r2_is_the_enumerated_one(shared):
    """Shared mask: by enumeration. Per-sample masks: the closed form of two layers."""
    torch.manual_seed(1)
    n, m, p = 3, 4, 0.4
    net = nn.Sequential(
        nn.Linear(2, m, bias=False), nn.ReLU(), nn.Dropout(p),
        nn.Linear(m, 1, bias=False),
    ).double()  # fmt: skip
    batch = torch.randn(n, 2).double(), torch.randn(n, 1).double()
    found = gradient_norm(
        net, batch, tdi.half_squared_error, lr=0.1, num_masks=2000, shared_mask=shared
    )
    expected, mean = two_layer_closed_form(net, batch, p, shared)
    if shared:
        _, squares, mean_squares = expected_risk(
            net, [m], batch, tdi.half_squared_error, gradients=True
        )
        assert squares == pytest.approx(float(expected), rel=1e-10)
        assert mean_squares == pytest.approx(float(mean), rel=1e-10)
    for value, error, truth in (
        (found.value, found.standard_error, expected),
        (found.dropout_noise, found.dropout_noise_standard_error, expected - mean),
    ):
        assert abs(float(value) - 0.1 / 4 * float(truth)) < 4 * float(error)
        assert float(error) < 0.1 * float(value)
    assert found.shared_mask is shared


def test_errors_of_r2_are_of_a_sample_of_pairs():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 1))
    batch = torch.randn(3, 2), torch.randn(3, 1)
    options = {"lr": 0.1, "shared_mask": True}
    torch.manual_seed(2)
    a, b = (gradient_norm(net, batch, "mse", **options) for _ in range(2))
    torch.manual_seed(2)
    both = gradient_norm(net, batch, "mse", num_masks=4, **options)
    for name in ("mean_gradient", "dropout_noise"):
        pair = torch.stack((getattr(a, name), getattr(b, name)))
        torch.testing.assert_close(getattr(both, name), pair.mean())
        found = getattr(both, f"{name}_standard_error")
        torch.testing.assert_close(found, (pair[0] - pair[1]).abs() / 2)
    torch.testing.assert_close(both.standard_error, (a.value - b.value).abs() / 2)
    assert a.standard_error.isnan()


def two_layer_closed_form(net, batch, p, shared):
    """``E||g||^2`` and ``||E g||^2``: sums over pairs of samples and units."""
    x, y = batch
    inner, outer = net[0].weight.detach(), net[3].weight.detach()[0]
    q, c, n = 1 - p, p / (1 - p), len(x)
    pre = x @ inner.T
    o = outer * pre.relu()
    e = o.sum(1) - y[:, 0]
    # gradients of o_ij in its own parameters (a_j, w_j)
    v = torch.cat(
        [pre.relu()[..., None], (outer * (pre > 0))[..., None] * x[:, None]], -1
    )
    gram = torch.einsum("ijp,ljp->ilj", v, v)
    a = e[:, None] + c * o
    aa = a[:, None] * a[None]
    s = (o @ o.T)[..., None] - o[:, None] * o[None]
    same = torch.ones(n, n) if shared else torch.eye(n)
    summand = torch.where(same[..., None] > 0, (aa + c * s) / q, aa)
    return (summand * gram).sum() / n**2, (aa * gram).sum() / n**2


def test_r2_of_parameter_groups_weighs_each():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).double()
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    rates = {"1.weight": 0.1, "1.bias": 0.4}

    def of(lr):
        torch.manual_seed(5)
        return gradient_norm(net, batch, "mse", lr=lr).value

    parts = [
        of({n: r if n == name else 0.0 for n, r in rates.items()}) for name in rates
    ]
    torch.testing.assert_close(of(rates), sum(parts))


def test_last_layer_is_a_training_loss():
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda h, w: last_layer(h, w, 0.3), (h, w))
    for loss in (F.cross_entropy, lambda f, t: F.cross_entropy(f, t)):
        assert torch.autograd.gradcheck(
            lambda h, w, loss=loss: last_layer(
                h, w, 0.3, loss=loss, outputs=h @ w.T, targets=labels
            ),
            (h, w),
        )


def test_measuring_leaves_the_model_alone():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    net[1].eval()
    batch = torch.randn(8, 3), torch.randn(8, 2)
    net(batch[0]).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [x.grad.clone() for x in net.parameters()]
    modes = [m.training for m in net.modules()]
    gauss_newton(net, batch, "mse")
    monte_carlo(net, batch, "mse", num_masks=2)
    gradient_norm(net, batch, "mse", lr=0.1)
    net[1].train()
    gauss_newton(net, batch, "mse")
    net[1].eval()
    assert modes == [m.training for m in net.modules()]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(
        torch.equal(x.grad, g) for x, g in zip(net.parameters(), grads, strict=True)
    )
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ZeroDivisionError):
        gauss_newton(net, batch, lambda f, t: 1 / 0)
    assert not any(m._forward_hooks for m in net.modules())
    assert modes == [m.training for m in net.modules()]


def test_bad_input():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="'mse', 'cross_entropy'"):
        gauss_newton(net, batch, "l1")
    with pytest.raises(TypeError, match="callable"):
        gauss_newton(net, batch, 3)
    with pytest.raises(ValueError, match="reduction"):
        gauss_newton(net, batch, nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match="scalar"):
        monte_carlo(net, batch, lambda f, t: f - t)
    with pytest.raises(ValueError, match="num_samples"):
        gauss_newton(net, batch, "mse", num_samples=0)
    with pytest.raises(ValueError, match="num_masks"):
        monte_carlo(net, batch, "mse", num_masks=1)
    with pytest.raises(ValueError, match="even"):
        gradient_norm(net, batch, "mse", lr=0.1, num_masks=3)
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="got"):
            last_layer(torch.ones(2, 3), torch.ones(1, 3), p)
    with pytest.raises(ValueError, match="features"):
        last_layer(torch.ones(2, 3), torch.ones(1, 4), 0.5)
    with pytest.raises(ValueError, match="outputs"):
        last_layer(torch.ones(2, 3), torch.ones(1, 3), 0.5, loss="cross_entropy")
    net[0].p = 1.0
    with pytest.raises(ValueError, match="site `0`"):
        gauss_newton(net, batch, "mse")
    pair = nn.LSTM(3, 2)
    with pytest.raises(TypeError, match="one tensor"):
        gauss_newton(pair, (torch.randn(4, 1, 3), None), "mse")


@pytest.mark.parametrize("where", ["between", "after"])
def test_operations_in_place_do_not_pass_for_a_last_layer(where):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 2)

        def forward(self, x):
            h = self.drop(x)
            if where == "between":
                return self.last(h.mul_(0.1))
            return self.last(h).div_(10)

    net = Net().double()
    batch = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    found = gauss_newton(net, batch, "mse", num_samples=None)
    assert not found.exact
    truth = monte_carlo(net, batch, "mse", num_masks=4000)
    assert (found.value - truth.value).abs() < 5 * truth.standard_error
    best, how, _ = online(net, batch, losses.resolve_loss("mse"), num_masks=500)
    assert "unbiased" in how
    assert (best.value - truth.value).abs() < 5 * best.standard_error


def test_hidden_noise_makes_nothing_exact():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
            self.drop, self.last = nn.Dropout(0.2), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.drop(self.cell(x)[0][:, -1]))

    batch = torch.randn(5, 6, 3), torch.randn(5, 2)
    net = Net()
    assert not gauss_newton(net, batch, "mse", num_samples=None).exact
    net.drop.p = 0.0
    assert not gauss_newton(net, batch, "mse", num_samples=None).exact


def test_samples_coupled_by_message_passing():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2)
            self.drop = nn.Dropout(0.4)
            self.register_buffer("edges", torch.softmax(torch.randn(6, 6), 1))

        def forward(self, x):
            h = self.edges @ self.one(x)
            return self.edges @ self.two(self.drop(h))

    net = Graph().double()
    batch = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    found = gauss_newton(net, batch, "mse", num_samples=None)
    truth = monte_carlo(net, batch, "mse", num_masks=4000)
    assert (found.value - truth.value).abs() < 5 * truth.standard_error
    draws = [gauss_newton(net, batch, "mse", num_samples=8) for _ in range(100)]
    z = torch.stack([(d.value - found.value) / d.standard_error for d in draws])
    assert 0.8 < z.std() < 1.6


def test_log_probabilities_with_nll_are_cross_entropy():
    body = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3)).double()
    batch = torch.randn(6, 4).double(), torch.randint(3, (6,))
    expected = gauss_newton(body, batch, "cross_entropy", num_samples=None)
    log = nn.Sequential(*body, nn.LogSoftmax(1))
    for loss in (F.nll_loss, nn.NLLLoss()):
        found = gauss_newton(log, batch, loss, num_samples=None)
        torch.testing.assert_close(found.value, expected.value)
        assert not found.exact
        linear = gauss_newton(body, batch, loss, num_samples=None)  # of raw outputs
        assert linear.value == 0 and "linear in the outputs" in linear.notes[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)).to(dtype)
    batch = torch.randn(6, 4).to(dtype), torch.rand(6, 3).to(dtype)
    wide = gauss_newton(
        net.double(), tuple(b.double() for b in batch), nn.BCEWithLogitsLoss(),
        num_samples=None,
    )  # fmt: skip
    found = gauss_newton(net.to(dtype), batch, nn.BCEWithLogitsLoss(), num_samples=None)
    assert float(found.value) == pytest.approx(float(wide.value), rel=0.1)


def test_more_bad_input():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="batch dimension"):
        gauss_newton(net, (torch.randn(3), torch.tensor(1)), "cross_entropy")
    with pytest.raises(ValueError, match="half_squared_error"):
        tdi.half_squared_error(torch.ones(5, 1), torch.ones(5))
    with pytest.raises(ValueError, match=r"1\.bias"):
        gradient_norm(
            net, (torch.randn(4, 3), torch.randn(4, 2)), "mse", lr={"1.weight": 0.1}
        )
