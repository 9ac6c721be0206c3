"""The modified losses: their values, their gradients, and training on them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import torch_dropout_ir as tdi
from tests.reference.enumeration import every_mask
from tests.reference.second_order import second_order_form
from torch_dropout_ir.normalization import ComposedNormalization
from torch_dropout_ir.regularizers import (
    gauss_newton,
    last_layer,
    leave_one_out,
    modified_loss,
    second_order,
)
from torch_dropout_ir.testing import problems

KINDS = ("L1", "L2", "L3", "L4", "regu")


def small(p=0.3):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(p), nn.Linear(5, 2))
    return net.double(), (torch.randn(4, 3).double(), torch.randn(4, 2).double())


def gradient(value, net):
    params = list(net.parameters())
    found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    pairs = zip(found, params, strict=True)
    return torch.cat([(x * 0 if g is None else g).flatten() for g, x in pairs])


@given(problems(max_width=4))
def test_l1_is_the_expected_dropout_loss_and_so_is_its_gradient(problem):
    net, (x, y) = problem
    p, h = net[-2].p, net[:-2](x)
    value = modified_loss(net, (x, y), "mse", kind="L1")
    if p == 0:
        torch.testing.assert_close(value, F.mse_loss(net(x), y))
        return
    expected = sum(
        chance * F.mse_loss(net[-1](h * mask / (1 - p)), y)
        for mask, chance in every_mask(h.shape[1], p)
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient(value, net), gradient(expected, net))


def pieces(net, batch, seed):
    """The risks and the penalty of one draw of torch's own dropout, by hand."""
    x, y = batch
    torch.manual_seed(seed)
    drop = F.mse_loss(net(x), y)
    found = torch.autograd.grad(drop, list(net.parameters()), create_graph=True)
    penalty = 0.2 / 4 * sum(g.square().sum() for g in found)
    h = net[:2](x)
    clean = F.mse_loss(net[3](h), y)
    return clean, drop, penalty, last_layer(h, net[3].weight, net[2].p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [nn.Dropout, tdi.Dropout])
def test_every_kind_is_its_formula_at_one_draw_of_masks(kind, layer):
    net, batch = small()
    net[2] = layer(0.3)
    clean, drop, penalty, r1 = pieces(net, batch, seed=5)
    expected = {
        "L1": clean + r1,
        "L2": clean + penalty,
        "L3": drop - penalty,
        "L4": drop - r1,
        "regu": drop + penalty,
    }[kind]
    torch.manual_seed(5)
    value = modified_loss(net, batch, "mse", kind=kind, lr=0.2)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient(value, net), gradient(expected, net))


def test_learning_rates_by_parameter():
    net, batch = small()
    rates = {name: 0.1 * i for i, (name, _) in enumerate(net.named_parameters())}

    def at(lr):
        torch.manual_seed(0)
        return modified_loss(net, batch, "mse", kind="regu", lr=lr)

    none = at(0.0)
    parts = [at({n: r if n == m else 0.0 for n, r in rates.items()}) for m in rates]
    torch.testing.assert_close(at(rates) - none, sum(parts) - 4 * none)
    with pytest.raises(ValueError, match="none for"):
        at({"0.weight": 0.1})


@pytest.mark.parametrize("form", ["gauss_newton", "second_order", "monte_carlo"])
def test_drawn_forms_of_r1_are_unbiased_with_their_gradients(form):
    net, (x, y) = small()
    h = net[:2](x)
    clean = F.mse_loss(net[3](h), y)
    exact = last_layer(h, net[3].weight, 0.3)
    slope = gradient(exact, net)
    values, slopes = [], []
    for _ in range(200):
        value = modified_loss(net, (x, y), "mse", kind="L1", r1=form) - clean
        values.append(value.detach())
        slopes.append(gradient(value, net))
    values, slopes = torch.stack(values), torch.stack(slopes)
    assert (values.mean() - exact).abs() < 4 * values.std() / 200**0.5
    z = (slopes.mean(0) - slope) / (slopes.std(0) / 200**0.5).clamp(min=1e-12)
    assert z.abs().max() < 5


def test_forms_of_cross_entropy():
    net, (x, _) = small()
    y = torch.tensor([0, 1, 1, 0])
    h = net[:2](x)
    f = net[3](h)
    clean = F.cross_entropy(f, y)
    for name, form in (("last_layer", last_layer), ("leave_one_out", leave_one_out)):
        r1 = form(h, net[3].weight, 0.3, loss="cross_entropy", outputs=f, targets=y)
        value = modified_loss(net, (x, y), "cross_entropy", kind="L1", r1=name)
        torch.testing.assert_close(value, clean + r1)
        torch.testing.assert_close(gradient(value, net), gradient(clean + r1, net))


def test_deep_networks_with_several_sites():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 5), nn.Dropout(0.3),
        nn.Tanh(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    batch = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    clean = F.mse_loss(net.eval()(batch[0]), batch[1]).detach()
    net.train()
    for name, form in (("gauss_newton", gauss_newton), ("second_order", second_order)):
        exact = form(net, batch, "mse", num_samples=None).value
        drawn = torch.stack([
            modified_loss(net, batch, "mse", kind="L1", r1=name).detach()
            for _ in range(150)
        ])
        error = drawn.std() / 150**0.5
        assert (drawn.mean() - clean - exact).abs() < 4 * error
    with pytest.raises(ValueError, match="single site"):
        modified_loss(net, batch, "mse", kind="L1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["last_layer", "second_order", "monte_carlo"])
def test_batch_norm_moves_once_a_step_as_in_training(kind, form):
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    batch = torch.randn(8, 3), torch.randn(8, 2)
    modified_loss(net, batch, "mse", kind=kind, lr=0.1, r1=form).backward()
    assert net[1].num_batches_tracked == 1
    expected = nn.BatchNorm1d(4)
    expected(net[0](batch[0]))
    torch.testing.assert_close(net[1].running_mean, expected.running_mean)
    assert not any(m._forward_hooks for m in net.modules())
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_it_and_attention_can_be_penalized(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
        nn.Dropout(0.1), nn.Linear(8, 2),
    )  # fmt: skip
    x, y = torch.randn(16, 5, 8), torch.randn(16, 5, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        value = modified_loss(net, (x, y), "mse", kind=kind, lr=0.01, r1="second_order")
        value.backward()
        optimizer.step()
        seen.append(float(value.detach()))
    assert sum(seen[-5:]) < 0.95 * sum(seen[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_beside_an_attached_analysis(kind):
    """The pass of the main term is the script's: its batch and its targets are seen."""
    net, batch = small()
    net = net.float()
    batch = tuple(x.float() for x in batch)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    criterion = nn.MSELoss()
    analysis = tdi.attach_analysis(net, log_dir=False, every=2)
    for _ in range(5):
        optimizer.zero_grad()
        modified_loss(net, batch, criterion, kind=kind, lr=0.1).backward()
        optimizer.step()
    assert [step for step, _ in analysis.history["regularizer/R1"]] == [0, 2, 4]
    h = net[:2](batch[0])
    analysis.measure()
    expected = float(last_layer(h, net[3].weight, 0.3).detach())
    assert analysis.latest["regularizer/R1"] == pytest.approx(expected, rel=1e-5)
    drawn = kind != "L1"  # which draws no mask at all
    assert ("mask/keep_rate/2" in analysis.latest) is (drawn and kind != "L2")
    analysis.detach()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_sites_raise_rather_than_mislead(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh())
            self.last = nn.Linear(4, 1)

        def forward(self, x):
            return self.last(checkpoint(self.body, x, use_reentrant=reentrant))

    x = torch.randn(4, 3, requires_grad=True)
    net, batch = Net(), (x, torch.randn(4, 1))
    for kind, form in (("L1", "second_order"), ("L4", "monte_carlo"), ("L2", "")):
        with pytest.raises(RuntimeError, match="checkpoint"):
            modified_loss(
                net, batch, "mse", kind=kind, lr=0.1, r1=form or "last_layer"
            ).backward()
    if not reentrant:  # torch has no second derivative through the reentrant one
        modified_loss(net, batch, "mse", kind="regu", lr=0.1).backward()
        assert net.body[0].weight.grad.any()
    assert not any(m._forward_hooks for m in net.modules())


def test_bad_input():
    net, batch = small()
    with pytest.raises(ValueError, match="`kind`"):
        modified_loss(net, batch, "mse", kind="L5")
    with pytest.raises(ValueError, match="`r1`"):
        modified_loss(net, batch, "mse", kind="L1", r1="exact")
    for kind in ("L2", "L3", "regu"):
        with pytest.raises(ValueError, match="`lr`"):
            modified_loss(net, batch, "mse", kind=kind)
    with pytest.raises(ValueError, match="at least one sample"):
        modified_loss(net, (batch[0][:0], batch[1][:0]), "mse", kind="L1")
    with pytest.raises(ValueError, match="training mode"):
        modified_loss(net.eval(), batch, "mse", kind="L1")
    with pytest.raises(ValueError, match="second derivative"):
        modified_loss(net.train(), batch, nn.L1Loss(), kind="L1", r1="gauss_newton")
    # One mask for all positions, of which no closed form tells.
    shared = nn.Sequential(nn.Dropout1d(0.3), nn.Linear(3, 2))
    for form in ("last_layer", "leave_one_out"):
        with pytest.raises(ValueError, match="a single site"):
            long = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
            modified_loss(shared, long, "mse", kind="L1", r1=form)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_autograd_that_is_off_is_named(kind, off):
    net, batch = small()
    with off(), pytest.raises(RuntimeError, match="autograd to be on"):
        modified_loss(net, batch, "mse", kind=kind, lr=0.1)


@pytest.mark.parametrize("max_bytes", [None, 0, 2**26])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_nothing_reads_changes_nothing(kind, max_bytes):
    found = []
    for spare in (False, True):
        net, batch = small()
        params = list(net.parameters())
        if spare:
            net.idle = nn.Parameter(torch.ones(3).double())
            net.forward = nn.Sequential(*[net[k] for k in range(4)]).forward
        torch.manual_seed(3)
        value = modified_loss(net, batch, "mse", kind=kind, lr=0.1, max_bytes=max_bytes)
        found.append((value.detach(), torch.autograd.grad(value, params)))
    torch.testing.assert_close(*found)


class Apart(nn.Module):
    """Normalizes two channels of two positions each."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)

    def forward(self, x):
        return self.norm(x.view(-1, 2, 2)).flatten(1)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.BatchNorm1d(4), Apart()])
@pytest.mark.parametrize("form, loss", [
    ("gauss_newton", "mse"),
    ("gauss_newton", lambda f, t: (f - t).pow(4).sum()),
    ("second_order", "mse"),
])  # fmt: skip
def test_the_third_derivative_of_normalization(norm, form, loss):
    """Torch's own is wrong for layer norm, and refused for the others."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.3), norm, nn.Tanh(), nn.Linear(4, 2)
    ).double()  # fmt: skip
    batch = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    params = list(net.parameters())
    ways = [torch.randn_like(x) for x in params]

    def at(step):
        torch.manual_seed(5)  # the same signs
        with torch.no_grad():
            for x, way in zip(params, ways, strict=True):
                x.add_(step * way)
        value = modified_loss(net, batch, loss, kind="L1", r1=form)
        with torch.no_grad():
            for x, way in zip(params, ways, strict=True):
                x.sub_(step * way)
        return value

    def difference(step):
        return float((at(step) - at(-step)).detach()) / (2 * step)

    torch.manual_seed(5)
    value = modified_loss(net, batch, loss, kind="L1", r1=form)
    slopes = torch.autograd.grad(value, params)
    along = sum(float((g * way).sum()) for g, way in zip(slopes, ways, strict=True))
    expected = (4 * difference(1e-4) - difference(2e-4)) / 3
    assert along == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", [
    nn.LayerNorm((3, 4)), nn.LayerNorm(4, elementwise_affine=False),
    nn.LayerNorm(4, bias=False), nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None),
    nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval(),
    nn.InstanceNorm1d(3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    nn.InstanceNorm1d(3, track_running_stats=True).eval(),
])  # fmt: skip
def test_composed_normalization_is_torchs(norm):
    torch.manual_seed(0)
    norm, own = norm.double(), copy.deepcopy(norm).double()
    for x in (*norm.parameters(), *own.parameters()):
        torch.manual_seed(x.numel())
        nn.init.normal_(x)
    for _ in range(2):
        x = torch.randn(5, 3, 4).double().requires_grad_()
        expected = norm(x)
        with ComposedNormalization():
            found = own(x)
        torch.testing.assert_close(found, expected)
        slope = torch.autograd.grad(expected.sin().sum(), x)
        torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), x), slope)
    torch.testing.assert_close(own.state_dict(), norm.state_dict())
    half = torch.randn(5, 3, 4, dtype=torch.bfloat16)
    for precision in (torch.float32, torch.bfloat16):  # of the weights
        expected = norm.to(precision)(half)
        with ComposedNormalization():
            found = own.to(precision)(half)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("form", ["last_layer", "leave_one_out"])
@pytest.mark.parametrize("kind", ["L1", "L4"])
def test_a_site_that_drops_everything_is_named(kind, form):
    net, batch = small(p=1.0)
    said = pytest.warns(UserWarning, match="site `2` drops everything")
    with said, pytest.raises(ValueError, match="site `2`"):
        modified_loss(net, batch, "mse", kind=kind, r1=form)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_masks_alone_says_that_a_site_drops_everything(kind):
    net, batch = small(p=1.0)
    with pytest.warns(UserWarning, match="site `2` drops everything") as said:
        modified_loss(net, batch, "mse", kind=kind, lr=0.1, r1="monte_carlo")
    assert [x.filename for x in said] == [__file__]


def test_classes_in_another_dimension_than_the_last_layers():
    """Cross-entropy has them in dimension 1, a linear layer in the last."""
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3)).double()
    batch = torch.randn(5, 3, 4).double(), torch.randint(3, (5, 3))
    for form in ("last_layer", "leave_one_out"):
        with pytest.raises(ValueError, match="dimension 1"):
            modified_loss(net, batch, "cross_entropy", kind="L1", r1=form)
    flat = lambda f, t: F.cross_entropy(f.flatten(0, 1), t.flatten())  # noqa: E731
    value = modified_loss(net, batch, flat, kind="L1")
    f = net[1](batch[0])
    r1 = last_layer(
        batch[0], net[1].weight, 0.3, loss="cross_entropy", outputs=f, targets=batch[1]
    )
    torch.testing.assert_close(value, flat(f, batch[1]) + r1)


@pytest.mark.parametrize("kind", ["L2", "L3", "regu"])
def test_penalties_of_half_precision_do_not_vanish(kind):
    net, batch = small(p=0.0)
    loss = lambda f, t: 1e-4 * F.mse_loss(f, t)  # noqa: E731

    def penalty(dtype):
        net.to(dtype)
        both = [
            modified_loss(net, [x.to(dtype) for x in batch], loss, kind=kind, lr=lr)
            for lr in (1e4, 0.0)
        ]
        return float((both[0] - both[1]).detach())

    expected = penalty(torch.float64)
    assert penalty(torch.float16) == pytest.approx(expected, rel=0.05)


class Parts(nn.Module):
    """A residual block, which is an output too, weights that are tied, two heads."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = nn.Linear(2, 2), nn.Dropout(0.3)
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        h = x + self.drop(torch.tanh(self.inner(x)))
        two = self.two(torch.sigmoid(h @ self.inner.weight))
        return self.one(h), {"two": two, "h": h}


def of_parts(f, t):
    heads = F.mse_loss(f[0], t[:, :2]) + 2 * (f[1]["two"] - t[:, 2:]).pow(4).sum()
    return heads + f[1]["h"].square().mean()


def unlike_models():
    """Model, shapes of its masks, batch and loss."""
    torch.manual_seed(0)
    x, labels = torch.randn(2, 2), torch.tensor([1, 0])
    two = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(2, 2), nn.Tanh(), nn.Dropout(0.4), nn.Linear(2, 3)
    )
    channels = nn.Sequential(
        nn.Conv1d(1, 2, 2), nn.Dropout1d(0.3), nn.GELU(), nn.Flatten(), nn.Linear(4, 2)
    )
    frozen = nn.Sequential(
        nn.Linear(2, 2), nn.Dropout(0.6), nn.Softplus(), nn.Linear(2, 2)
    )
    frozen[0].weight.requires_grad_(False)
    pair = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 3.0]).double())
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    long = x[:, None, :].repeat(1, 1, 2)[..., :3]
    pixels = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Dropout(0.3), nn.Conv1d(2, 3, 2))
    return {
        "two sites": (two, [(2, 2), (2, 2)], (x, labels), smooth),
        "channels": (channels, [(2, 2, 1)], (long, torch.rand(2, 2)), pair),
        "labels": (channels, [(2, 2, 1)], (long, labels), F.cross_entropy),
        "pixels": (pixels, [(1, 2, 3)], (long[:1], labels[None]), F.cross_entropy),
        "frozen": (frozen, [(2, 2)], (x, labels), F.cross_entropy),
        "parts": (Parts(), [(2, 2)], (x, torch.randn(2, 3)), of_parts),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["two sites", "channels", "labels", "pixels", "frozen", "parts"]
)
@pytest.mark.parametrize("form", ["gauss_newton", "second_order"])
def test_over_all_signs_it_is_the_dense_form_with_its_gradient(form, name, monkeypatch):
    net, shapes, batch, loss = unlike_models()[name]
    net.double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in batch)
    rooted = form == "gauss_newton" and name in (
        "two sites",
        "labels",
        "pixels",
        "frozen",
    )
    outputs = net(batch[0])
    drawn = [outputs.shape] if rooted else shapes  # on outputs, or on units
    sizes = [torch.Size(shape).numel() for shape in drawn]
    patterns = list(itertools.product((-1.0, 1.0), repeat=sum(sizes)))
    mean = 0
    for pattern in patterns:
        left = iter(torch.tensor(pattern).double().split(sizes))
        monkeypatch.setattr(
            "torch_dropout_ir.regularizers.site_curvature.signs",
            lambda site, h, left=left: next(left).view(site.mask_shape(h.shape)),
        )
        monkeypatch.setattr(
            "torch_dropout_ir.regularizers.trained_roots._signs",
            lambda f, left=left: next(left).view(f.shape),
        )
        value = modified_loss(net, batch, loss, kind="L1", r1=form)
        slopes = gradient(value, only_trained(net))
        mean = mean + torch.cat((value.detach()[None], slopes)) / len(patterns)
    same = copy.deepcopy(net)
    r1 = second_order_form(same, shapes, batch, loss, linearized=form == "gauss_newton")
    for module in same.modules():
        if hasattr(module, "noise"):
            module.noise = 1.0
    expected = loss(same(batch[0]), batch[1]) + r1
    both = torch.cat((expected.detach()[None], gradient(expected, only_trained(same))))
    torch.testing.assert_close(mean, both)


def only_trained(net):
    """A stand-in whose parameters are those that are trained."""
    return nn.ParameterList([x for x in net.parameters() if x.requires_grad])


def test_operators_without_a_second_derivative_are_named():
    class Bag(torch.nn.EmbeddingBag):
        def forward(self, x):
            return super().forward(x.abs().long() % 3)

    class Gamma(torch.nn.Linear):
        def forward(self, x):
            return torch.distributions.Gamma(super().forward(x).exp(), 1.0).rsample()

    class Dirichlet(torch.nn.Linear):
        def forward(self, x):
            return torch.distributions.Dirichlet(super().forward(x).exp()).rsample()

    for first, name in (
        (Bag(3, 4, scale_grad_by_freq=True), "EmbeddingBag"),
        (Gamma(3, 4), "StandardGamma"),
        (Dirichlet(3, 4), "Dirichlet"),
    ):
        named = rf"none \(\w*{name}\w*\)"  # and no other operator
        net = torch.nn.Sequential(first, torch.nn.Dropout(0.5), torch.nn.Linear(4, 4))
        batch = torch.randn(5, 3), torch.zeros(5, 4)
        for kind in ("L2", "L3", "regu"):
            with pytest.raises(NotImplementedError, match=named):
                modified_loss(net, batch, "mse", kind=kind, lr=1)
        modified_loss(net, batch, "mse", kind="L1", r1="monte_carlo").backward()


class Forward(torch.autograd.Function):
    """A function without a derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.exp()


@pytest.mark.parametrize("kind", ["L2", "L3", "regu"])
def test_a_function_without_a_derivative_is_named(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

        def forward(self, x):
            return Forward.apply(self.drop(self.inner(x)))

    batch = torch.randn(5, 3), torch.zeros(5, 2)
    with pytest.raises(NotImplementedError, match=r"modified_loss: .* twice"):
        modified_loss(Net(), batch, "mse", kind=kind, lr=0.1)


@pytest.mark.parametrize("max_bytes", [None, 0, 2**26])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_one_sample_without_a_batch_is_a_batch_of_one(loss, max_bytes):
    net, (x, y) = small()
    y = torch.tensor([1, 0, 1, 1]) if loss == "cross_entropy" else y
    found = []
    for batch in ((x[0], y[0]), (x[:1], y[:1])):
        torch.manual_seed(3)
        value = modified_loss(
            net, batch, loss, kind="L1", r1="gauss_newton", max_bytes=max_bytes
        )
        found.append((value.detach(), gradient(value, net)))
    torch.testing.assert_close(*found)


class Taught(nn.Module):
    """Returns what it is taught by, which learns nothing."""

    def __init__(self):
        super().__init__()
        self.net = small()[0]

    def forward(self, x):
        f = self.net(x)
        return f, (f.detach() * 2 - f.detach().mean(0)).softmax(-1)


def taught(outputs, _):
    f, target = outputs
    return -(target * f.log_softmax(-1)).sum(-1).mean()


def test_outputs_that_learn_nothing_are_constants_of_the_form():
    net, (x, _) = Taught(), small()[1]
    net.eval()
    target = net(x)[1]
    net.train()
    pair = []
    for model, loss in (
        (net, taught), (net.net, lambda f, _: taught((f, target), None)),
    ):  # fmt: skip
        torch.manual_seed(3)
        value = modified_loss(model, (x, None), loss, kind="L1", r1="gauss_newton")
        pair.append((value, gradient(value, model)))
    torch.testing.assert_close(*pair)
