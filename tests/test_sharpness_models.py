"""Curvature of models that are seldom met, against dense matrices in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from torch_dropout_ir import sharpness, vectors


class Tied(nn.Module):
    """Embedding and output share their weight."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embed = nn.Embedding(5, 3, padding_idx=0, sparse=sparse)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        if not sparse:
            self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.mix(self.embed(x)))).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell, self.out = kind(3, 2, batch_first=True, **options), nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1, :2])


class Counts(nn.Module):
    """A buffer changed in each forward pass, and parameters of no dimension or size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.b.bias.requires_grad_(False)
        self.register_buffer("passes", torch.ones(()))

    def forward(self, x):
        self.passes += 1
        return self.b(F.silu(self.a(x)) * self.passes) * self.scale.exp()


class Routed(nn.Module):
    """Samples go to one of two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        left = x[:, 0] > 0
        h = x.new_zeros(x.shape[0], 4)
        h[left], h[~left] = F.relu(self.a(x[left])), torch.tanh(self.b(x[~left]))
        return self.out(h)


def volumes():
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 3)), nn.ConvTranspose2d(1, 4, 2, stride=2, groups=1),
        nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(48, 2),
    )  # fmt: skip


CASES = {
    "tied embedding": (Tied, None),
    "sparse embedding": (lambda: Tied(True), None),
    "spectral norm": (lambda: nn.Sequential(
        spectral_norm(nn.Linear(3, 4)), nn.ELU(), nn.Linear(4, 2)), (3,)),
    "gru": (lambda: Recurrent(nn.GRU), (3, 3)),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), (3, 3)),
    "transposed convolution": (volumes, (3,)),
    "counts": (Counts, (3,)),
    "routed": (Routed, (3,)),
}  # fmt: skip


def task(name):
    make, shape = CASES[name]
    net = make().double()
    if shape is None:
        return net, torch.randint(5, (6, 3)), torch.randint(5, (6,))
    return net, torch.randn(6, *shape).double(), torch.randint(2, (6,))


def outputs_of(net, x):
    """The outputs as a function of the flat parameters, by torch alone."""
    params = {n: p for n, p in net.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    dense = {f"{n}.sparse": m for n, m in net.named_modules() if hasattr(m, "sparse")}

    def of(flat):
        state = {n: b.clone() for n, b in buffers.items()}
        for module in dense.values():
            module.sparse = False
        return torch.func.functional_call(
            net, {**state, **vectors.to_params(flat, params)}, (x,)
        )

    return of, vectors.to_vector(params).detach()


@pytest.mark.parametrize("name", CASES)
def test_operators_equal_the_dense_matrices(name):
    net, x, y = task(name)
    hessian = sharpness.hessian(net, "cross_entropy", (x, y))
    found = hessian.dense()
    gauss_newton = sharpness.ggn(net, "cross_entropy", (x, y)).dense()
    of, flat = outputs_of(net, x)
    expected = torch.autograd.functional.hessian(
        lambda v: F.cross_entropy(of(v), y), flat
    )
    torch.testing.assert_close(found, expected)
    out = of(flat).detach()
    jacobian = torch.autograd.functional.jacobian(of, flat).reshape(out.numel(), -1)
    curve = torch.autograd.functional.hessian(lambda f: F.cross_entropy(f, y), out)
    curve = curve.reshape(out.numel(), -1)
    torch.testing.assert_close(gauss_newton, jacobian.T @ curve @ jacobian)
    trace = sharpness.trace(hessian, 300, method="layerwise")
    error = (trace.value - expected.trace()).abs()
    assert error <= 5 * trace.standard_error + 1e-9 * expected.trace().abs()
    values = sharpness.top_eigenvalues(hessian, 2, tol=1e-8).values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(expected)[-2:].flip(0))


class Checkpointed(nn.Module):
    def __init__(self, normalize, again=True):
        super().__init__()
        self.a = nn.Sequential(
            normalize(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3)
        )
        self.b, self.again = nn.Linear(4, 2), again

    def forward(self, x):
        h = checkpoint(self.a, x, use_reentrant=False) if self.again else self.a(x)
        return self.b(h)


@pytest.mark.parametrize("normalize", [nn.Identity(), weight_norm])
@pytest.mark.parametrize("masks", ["off", 3])
def test_blocks_that_run_again_run_where_they_ran(normalize, masks):
    """With the parameters and buffers of the operator, wherever the model is now."""
    nets = [Checkpointed(normalize, again).double() for again in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    batch = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    for kind in (sharpness.hessian, sharpness.ggn):
        expected = kind(nets[1], "mse", batch, masks=masks).dense()
        op = kind(nets[0], "mse", batch, masks=masks)
        own = list(nets[0].parameters())
        with torch.no_grad():
            for p in own:
                p.mul_(1.5)
        for _ in range(2):
            torch.testing.assert_close(op.dense(), expected)
        trace = sharpness.trace(op, 60, method="layerwise")
        error = (trace.value - expected.trace()).abs()
        assert error <= 6 * trace.standard_error + 1e-9
        assert all(p is q for p, q in zip(own, nets[0].parameters(), strict=True))
        nets[0].load_state_dict(nets[1].state_dict())
    climbs = [
        sharpness.adaptive_sharpness(net, "mse", batch, num_steps=3, masks=masks).value
        for net in nets
    ]
    assert climbs[0] == pytest.approx(climbs[1], rel=1e-9)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_are_measured_uncompiled(inside):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    net = net.double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    if inside:
        compiled = copy.deepcopy(net)
        compiled.compile(backend="aot_eager")
    else:
        compiled = torch.compile(net, backend="aot_eager")
    for masks in ("off", 2):
        for kind in (sharpness.hessian, sharpness.ggn):
            torch.testing.assert_close(
                kind(compiled, "mse", batch, masks=masks).dense(),
                kind(net, "mse", batch, masks=masks).dense(),
            )
    direction = sharpness.filter_normalized_direction(compiled)
    plain = {n.split("_orig_mod.")[-1]: d for n, d in direction.items()}
    for found, expected in (
        (sharpness.interval_flatness(compiled, "mse", batch, direction).width,
         sharpness.interval_flatness(net, "mse", batch, plain).width),
        (float(sharpness.loss_slice(compiled, "mse", batch, [0.5], direction)[0]),
         float(sharpness.loss_slice(net, "mse", batch, [0.5], plain)[0])),
    ):  # fmt: skip
        assert found == pytest.approx(expected)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (4, 3)), nn.Linear(3, 8), nn.ReLU(), nn.Flatten(),
            nn.Linear(32, 2),
        )  # fmt: skip

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


def test_low_precision():
    """As near to float64 as the precision allows, in each estimate."""
    cast, x, y = Autocast(), torch.randn(40, 12), torch.randn(40, 2)
    exact = sharpness.hessian(cast.net, "mse", (x, y)).dense()
    half = nn.Sequential(*cast.net).bfloat16(), x.bfloat16(), y.bfloat16()
    for net, *batch in ((Autocast(), x, y), half):
        if net is not half[0]:
            net.load_state_dict(cast.state_dict())
        op = sharpness.hessian(net, "mse", tuple(batch))
        for method in ("layerwise", "hutchpp", "xtrace"):
            found = sharpness.trace(op, 90, method=method)
            error = (found.value - exact.trace()).abs()
            assert error <= 5 * found.standard_error + 0.02 * exact.trace(), method
        top = sharpness.top_eigenvalues(op, tol=1e-2).values[0]
        assert top == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=0.02)


def test_complex_parameters_are_refused_by_name():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out((x.to(self.w.dtype) @ self.w).abs())

    batch = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(NotImplementedError, match=r"complex ones: \['w'\].*params="):
        sharpness.hessian(Complex(), "mse", batch)
    own = ["out.weight", "out.bias"]
    assert sharpness.hessian(Complex(), "mse", batch, params=own).shape == (10, 10)
