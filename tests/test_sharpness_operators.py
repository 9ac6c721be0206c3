"""Hessian and Gauss-Newton operators: dense oracles, frozen masks, loaders, errors."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import torch_dropout_ir as tdi
from torch_dropout_ir import sharpness, vectors


def dense(net, f):
    """The Hessian of ``f()`` in the parameters, by autograd's own functional."""
    params = dict(net.named_parameters())
    flat = vectors.to_vector(params).detach()

    def of(flat):
        moved = vectors.to_params(flat, params)
        return torch.func.functional_call(
            Wrapped(net, f), {f"net.{n}": x for n, x in moved.items()}, ()
        )

    return torch.autograd.functional.hessian(of, flat)


class Wrapped(nn.Module):
    def __init__(self, net, f):
        super().__init__()
        self.net = net
        self.f = f

    def forward(self):
        return self.f(self.net)


def data(n=9, inputs=3, outputs=2):
    return torch.randn(n, inputs).double(), torch.randn(n, outputs).double()


def mlp(p=0.5, dropout=nn.Dropout):
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), dropout(p), nn.Linear(5, 2)
    ).double()


class Functional(nn.Module):
    """Dropout called as a function, in attention and in a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.GRU(4, 3, num_layers=2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        h = F.dropout(torch.tanh(self.embed(x)), 0.5, self.training)
        h = h.unsqueeze(1).repeat(1, 3, 1)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.recurrent(h)[0][:, -1])


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", F.smooth_l1_loss])
def test_ggn_is_the_jacobians_product(loss):
    net = mlp()
    x, y = data()
    y = torch.randint(2, (9,)) if loss == "cross_entropy" else y
    function = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}.get(loss, loss)
    op = sharpness.ggn(net, loss, (x, y))
    net.eval()
    params = {n: p.detach() for n, p in net.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(
        params
    )
    rows = torch.cat([j.reshape(18, -1) for j in jacobian.values()], 1)
    curve = torch.autograd.functional.hessian(lambda f: function(f, y), net(x).detach())
    torch.testing.assert_close(
        op.dense(), rows.T @ curve.reshape(18, 18) @ rows, atol=1e-12, rtol=1e-9
    )


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv1d(1, 2, 3)])
def test_ggn_of_many_samples_is_as_exact_as_its_numbers(layer):
    """What is sent back to get at ``J v`` is next to zero, and no part of a product."""
    net = nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Tanh(), nn.Flatten())
    net = nn.Sequential(net, nn.Linear(8, 3))
    batch = torch.randn(2048, 6), torch.randint(3, (2048,))
    op = sharpness.ggn(net, "cross_entropy", batch)
    single = torch.stack([op @ v for v in torch.eye(op.shape[0])])
    exact = sharpness.ggn(
        copy.deepcopy(net).double(), "cross_entropy", (batch[0].double(), batch[1])
    ).dense()
    assert (single - exact).norm() < 3e-6 * exact.norm()
    assert (single - single.T).norm() < 1e-6 * exact.norm()


def test_ggn_of_a_linear_model_is_the_hessian_and_it_streams():
    net = nn.Linear(3, 2).double()
    x, y = data()
    pieces = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])]
    whole = sharpness.hessian(net, "mse", (x, y)).dense()
    torch.testing.assert_close(sharpness.ggn(net, "mse", pieces).dense(), whole)


@pytest.mark.parametrize("make", [mlp, lambda: mlp(dropout=tdi.Dropout), Functional])
@pytest.mark.parametrize("kind", [sharpness.hessian, sharpness.ggn])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_masks_give_one_symmetric_matrix(make, kind, mode):
    """Two products with live dropout are two matrices; a mixed GGN is not symmetric."""
    net = getattr(make().double(), mode)()
    x, y = data()
    batch = x, y
    for batches in (batch, [(x[:4], y[:4]), (x[4:], y[4:])]):
        op = kind(net, "mse", batches, masks=3)
        matrix = op.dense()
        assert (matrix - matrix.T).abs().max() <= 1e-6 * matrix.abs().max()
        torch.testing.assert_close(op.dense(), matrix)
        torch.testing.assert_close(kind(net, "mse", batches, masks=3).dense(), matrix)
        for other in (4, "off"):
            apart = kind(net, "mse", batches, masks=other).dense() - matrix
            assert apart.abs().max() > 1e-3
    assert net.training == (mode == "train")


@pytest.mark.parametrize("make", [mlp, lambda: mlp(dropout=tdi.Dropout), Functional])
def test_the_masks_are_those_of_frozen_masks(make):
    net = make().double()
    x, y = data()
    op = sharpness.hessian(net, "mse", (x, y), masks=7)
    with tdi.frozen_masks(net, 7):
        expected = dense(net, lambda net: F.mse_loss(net(x), y))
    torch.testing.assert_close(op.dense(), expected)


def test_an_operator_says_what_it_is_of():
    op = sharpness.hessian(nn.Linear(2, 1), "mse", (torch.eye(2), torch.ones(2, 1)))
    op @ torch.ones(3, 2)
    assert repr(op) == "<hessian of Linear, [3, 3], masks off, 2 products>"
    several = sharpness.ggn(mlp(), "mse", data(), masks=range(2))
    assert "<ggn of Sequential" in repr(several) and "masks 0, 1, 0 pr" in repr(several)
    found = sharpness.top_eigenvalues(op), sharpness.spectral_density(op, num_steps=2)
    assert max(len(repr(one)) for one in found) < 300  # not whole vectors and grids


def test_mean_over_masks_and_its_standard_error():
    net, batch = mlp(), data()
    each = torch.stack([
        sharpness.hessian(net, "mse", batch, masks=s).dense() for s in range(5)
    ])
    op = sharpness.hessian(net, "mse", batch, masks=range(5))
    torch.testing.assert_close(op.dense(), each.mean(0))
    v = vectors.random_like(op.params)
    mean, error = op.with_standard_error(v)
    products = each @ vectors.to_vector(v)
    torch.testing.assert_close(vectors.to_vector(mean), products.mean(0))
    torch.testing.assert_close(vectors.to_vector(error), products.std(0) / 5**0.5)
    with pytest.raises(ValueError, match="several masks"):
        sharpness.hessian(net, "mse", batch, masks=1).with_standard_error(v)


def test_frozen_masks_leave_no_trace_on_our_layers():
    net = mlp(dropout=tdi.Dropout)
    x, y = data()
    net(x)
    before = net[2].last_mask.clone(), net[2].statistics.num_elements
    state = torch.get_rng_state()
    keys = set(net[2].__dict__)
    sharpness.hessian(net, "mse", (x, y), masks=1).dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net[2].last_mask, before[0])
    assert net[2].statistics.num_elements == before[1] and net[2].track
    assert set(net[2].__dict__) == keys


@pytest.mark.parametrize("kind", [sharpness.hessian, sharpness.ggn])
def test_batch_norm_in_either_mode_with_masks_keeps_its_statistics(kind):
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)
    ).double()
    batch = data()
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    found = []
    for mode in (True, False):
        net[1].train(mode)
        found.append(kind(net, "mse", batch, masks=1).dense())
        torch.testing.assert_close(found[-1], found[-1].T)
    assert not torch.allclose(*found)
    net.eval()  # everything: dropout is switched on, batch norm stays
    torch.testing.assert_close(kind(net, "mse", batch, masks=1).dense(), found[1])
    for name, value in net.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_the_operator_stays_at_the_buffers_and_modes_of_its_making():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    net(data()[0])
    net.eval()
    x, y = data()
    op = sharpness.hessian(net, "mse", [(x[:4], y[:4]), (x[4:], y[4:])])
    before = op.dense()
    net.train()
    net(x)
    torch.testing.assert_close(op.dense(), before)


def test_a_shuffling_loader_is_one_matrix_and_keeps_its_generator():
    net = mlp()
    x, y = data(10)
    own = torch.Generator().manual_seed(5)
    for generator in (None, own):
        loader = DataLoader(
            TensorDataset(x, y), 3, shuffle=True, drop_last=True, generator=generator
        )
        state, kept = torch.get_rng_state(), own.get_state()
        op = sharpness.hessian(net, "mse", loader, masks=2)
        matrix = op.dense()
        torch.testing.assert_close(op.dense(), matrix)
        torch.testing.assert_close(matrix, matrix.T)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(own.get_state(), kept)
        list(loader)  # an epoch of training between two products
        torch.testing.assert_close(op.dense(), matrix)
    whole = DataLoader(TensorDataset(x, y), 3, shuffle=True)
    torch.testing.assert_close(
        sharpness.hessian(net, "mse", whole).dense(),
        sharpness.hessian(net, "mse", (x, y)).dense(),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_batches_weigh_what_the_loss_counts_in_them(smoothing):
    net, (x, _) = mlp(), data(10)
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    y = torch.tensor([0, 1, -100, 1, 0, 1, 1, -100, -100, -100])
    parts = [(x[k : k + n], y[k : k + n]) for k, n in ((0, 4), (4, 3), (7, 3))]
    whole = sharpness.hessian(net, loss, (x, y))
    torch.testing.assert_close(
        sharpness.hessian(net, loss, parts).dense(), whole.dense()
    )
    found = sharpness.trace(sharpness.hessian(net, loss, parts))
    assert float(found.value) == pytest.approx(float(whole.dense().trace()))


@pytest.mark.parametrize("count", [6, 10])
def test_a_sampler_with_a_generator_of_its_own_may_shuffle_and_no_more(count):
    class Own(torch.utils.data.Sampler):
        def __init__(self):
            self.generator = np.random.default_rng(0)

        def __iter__(self):
            return iter(self.generator.permutation(10)[:count].tolist())

        def __len__(self):
            return count

    net, (x, y) = mlp(), data(10)
    loader = DataLoader(TensorDataset(x, y), 3, sampler=Own())
    op = sharpness.hessian(net, "mse", loader)
    if count == 10:
        torch.testing.assert_close(
            op.dense(), sharpness.hessian(net, "mse", (x, y)).dense()
        )
    else:
        with pytest.raises(ValueError, match="the same data each time"):
            op.dense()
            op.dense()
        with pytest.raises(ValueError, match="the same data each time"):
            op.dense()  # nor later


def test_data_are_compared_once_not_in_every_product(monkeypatch):
    from torch_dropout_ir.sharpness import reading

    sums = []
    monkeypatch.setattr(reading, "_sum", lambda batch: sums.append(1) or 1.0)
    loader = DataLoader(TensorDataset(*data(10)), 5)
    op = sharpness.hessian(mlp(), "mse", loader)
    for _ in range(5):
        op @ torch.ones(op.shape[0])
    assert len(sums) <= 2 * len(loader)


def test_random_transforms_are_the_same_in_every_product():
    import random

    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            x = torch.full((3,), float(i)) + random.random() + torch.rand(3)
            return x.double(), torch.zeros(2).double()

    op = sharpness.hessian(mlp(), "mse", DataLoader(Augmented(), 4))
    matrix = op.dense()
    random.random(), torch.rand(1)  # what a script draws between two products
    before = random.getstate()
    torch.testing.assert_close(op.dense(), matrix)
    assert random.getstate() == before


@pytest.mark.parametrize("batches", ["one", "several"])
def test_subsets_of_the_parameters_are_blocks(batches):
    net = mlp()
    x, y = data()
    given = (x, y) if batches == "one" else [(x[:4], y[:4]), (x[4:], y[4:])]
    matrix = sharpness.hessian(net, "mse", given).dense()
    # 0.weight 15, 0.bias 5, 3.weight 10, 3.bias 2
    op = sharpness.hessian(net, "mse", given, params=["3.weight", "0.bias"])
    assert list(op.params) == ["0.bias", "3.weight"] and op.shape == (15, 15)
    torch.testing.assert_close(op.dense(), matrix[15:30, 15:30])
    op = sharpness.ggn(net, "mse", given, params=lambda name: name.startswith("0."))
    assert op.shape == (20, 20)
    with pytest.raises(ValueError, match=r"\['nothing'\]"):
        sharpness.hessian(net, "mse", given, params=["nothing"])
    with pytest.raises(ValueError, match="chooses none"):
        sharpness.hessian(net, "mse", given, params=lambda name: False)
    with pytest.raises(TypeError, match=r"`params` to be names.*got int"):
        sharpness.hessian(net, "mse", given, params=3)


@pytest.mark.parametrize("budget", [0, 700, 2**26])
@pytest.mark.parametrize("kind", [sharpness.hessian, sharpness.ggn])
def test_blocks_are_columns_whatever_the_budget(kind, budget):
    net = mlp()
    x, y = data()
    for given in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):
        op = kind(net, "mse", given, block_bytes=budget)
        block = torch.randn(32, 5).double()
        expected = torch.stack([op @ v for v in block.T], 1)
        count = op.num_matvecs
        torch.testing.assert_close(op @ block, expected)
        assert op.num_matvecs == count + 5
    assert (op @ block[:, :0]).shape == (32, 0)


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(6, 4).double())

    def forward(self, x):
        return torch.cdist(x, self.centres)


@pytest.mark.parametrize("kind", [sharpness.hessian, sharpness.ggn])
def test_what_torch_batches_wrongly_is_taken_column_by_column(kind):
    op = kind(Distances(), "mse", (torch.randn(5, 4).double(), torch.rand(5, 6)))
    eye = torch.eye(24).double()
    torch.testing.assert_close(op.dense(), torch.stack([op @ v for v in eye], 1))


def test_a_budget_bounds_the_columns_at_once():
    net, batch = mlp(), data()
    seen = []
    real = torch.func.vmap

    def counted(f, chunk_size):
        seen.append(chunk_size)
        return real(f, chunk_size=chunk_size)

    op = sharpness.hessian(net, "mse", batch, block_bytes=3 * 2**13)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "vmap", counted)
        op.dense()
    each = op._cached.bytes_each
    assert seen == [3 * 2**13 // each] and 2 * 32 * 8 < each < 2**13


def test_checkpointed_blocks_have_the_same_curvature():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            h = checkpoint(self.net[:3], x, use_reentrant=False)
            return self.net[3](h)

    net, batch = Checkpointed(), data()
    for masks in ("off", 5):
        torch.testing.assert_close(
            sharpness.hessian(net, "mse", batch, masks=masks).dense(),
            sharpness.hessian(net.net, "mse", batch, masks=masks).dense(),
        )


def test_half_precision_and_mixed_dtypes():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    net[0].to(torch.float64)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net[2](self.net[1](self.net[0](x)).float())

    x, y = data()
    op = sharpness.hessian(Mixed(), "mse", (x, y.float()))
    matrix = op.dense()
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix, matrix.T, atol=1e-6, rtol=1e-5)
    product = op @ vectors.random_like(op.params)
    assert {x.dtype for x in product.values()} == {torch.float32, torch.float64}


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("kind", [sharpness.hessian, sharpness.ggn])
def test_bad_input_is_named(kind):
    x, y = data()
    net = mlp()
    with pytest.raises(ValueError, match=r"finite loss, got nan on batch 0"):
        kind(net, "mse", (x * float("nan"), y))
    op = kind(net, "mse", [(x, y), (x, y * float("inf"))])
    with pytest.raises(ValueError, match=r"batch 1"):
        op @ torch.ones(32)
    idle = Unused().double()
    message = r"\['idle.weight', 'idle.bias'\].*params="
    with pytest.raises(ValueError, match=message):
        kind(idle, "mse", (x, y))
    with pytest.raises(ValueError, match=message):
        kind(idle, "mse", [(x, y), (x, y)]) @ torch.ones(16)
    assert kind(idle, "mse", (x, y), params=["used.weight", "used.bias"]).shape[0] == 8
    with pytest.raises(ValueError, match="argmax"):
        kind(net, lambda f, t: f.argmax(1).double().mean(), (x, y))
    none = x[:0], y[:0]
    for empty in ([], none, DataLoader(TensorDataset(*none), 2), [none] * 2):
        with pytest.raises(ValueError, match="at least one batch"):
            kind(net, "mse", empty) @ torch.ones(32)
    for masks in ("on", -1, 0.5, True, []):
        with pytest.raises(ValueError, match="`masks`"):
            kind(net, "mse", (x, y), masks=masks)
    with pytest.raises(ValueError, match="columns"):
        kind(net, "mse", (x, y)) @ torch.ones(31, 2)
    with pytest.raises(TypeError, match="real numbers"):
        kind(net, "mse", (x, y)) @ torch.ones(32, dtype=torch.complex128)


class Stepped(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.below, self.above = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.step = step

    def forward(self, x):
        return self.above(self.step(self.below(x)))


STEPS = [torch.round, torch.floor, torch.ceil, torch.trunc, torch.sign]


@pytest.mark.parametrize("kind", [sharpness.hessian, sharpness.ggn])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_hides_parameters_is_no_zero_curvature(kind, step):
    net, batch = Stepped(step), data()
    message = r"\['below.weight', 'below.bias'\], or by steps.*params="
    with pytest.raises(ValueError, match=message):
        kind(net, "mse", batch)
    used = sharpness.used_parameters(net, "mse", batch)
    assert used == ["above.weight", "above.bias"]
    assert kind(net, "mse", batch, params=used).shape[0] == 10
    for way in (lambda h: h + (step(h) - h).detach(), lambda h: h - step(h)):
        assert kind(Stepped(way), "mse", batch).shape[0] == 26


def test_dictionaries_are_told_where_to_go():
    """Collators give one dictionary with the labels in it."""
    net, (x, y) = mlp(), data()
    batch = {"input": x, "labels": y}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    with pytest.raises(TypeError, match=r"got dict\. A dictionary goes"):
        sharpness.hessian(net, "mse", batch)
    for batches in ([batch], [batch] * 3, loader):
        with pytest.raises(
            TypeError, match=r"form `\(inputs, targets\)`, got one of d"
        ):
            sharpness.hessian(net, "mse", batches) @ torch.ones(32).double()
    inside = sharpness.hessian(net, "mse", [({"input": x}, y)]).dense()
    torch.testing.assert_close(inside, sharpness.hessian(net, "mse", (x, y)).dense())


def test_an_operation_without_second_derivative_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2).double()

        def forward(self, x):
            return Once.apply(self.net(x))

    for kind in (sharpness.hessian, sharpness.ggn):
        with pytest.raises(NotImplementedError, match="differentiated twice"):
            kind(Net(), "mse", data())


def test_ggn_wants_one_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x), x

    x, y = data()

    def loss(f, t):
        return F.mse_loss(f[0], t)

    assert sharpness.hessian(Pair(), loss, (x, y)).dense().shape == (32, 32)
    with pytest.raises(TypeError, match="one tensor"):
        sharpness.ggn(Pair(), loss, (x, y))


def test_modes_and_hooks_are_given_back_after_an_error():
    net = mlp()

    def fails(f, t):
        raise KeyError("mine")

    for masks in ("off", 1):
        with pytest.raises(KeyError, match="mine"):
            sharpness.hessian(net, fails, data(), masks=masks)
        assert all(m.training and not m._forward_hooks for m in net.modules())


class Counts(nn.Module):
    """Its output depends on a buffer that every pass moves, and it can break."""

    def __init__(self):
        super().__init__()
        self.out, self.broken = nn.Linear(3, 2), False
        self.register_buffer("passes", torch.ones(()))

    def forward(self, x):
        self.passes += 1
        y = self.out(x) * self.passes
        if self.broken:
            raise RuntimeError("broken")
        return y


@pytest.mark.parametrize("masks", ["off", 3])
def test_passes_do_not_see_each_others_buffers(masks):
    net, (x, y) = Counts().double(), data()
    for batches in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):
        op = sharpness.ggn(net, "mse", batches, masks=masks)
        once = op.dense()
        torch.testing.assert_close(op.dense(), once)
        assert net.passes == 1
        net.eval()
        other = sharpness.hessian(net, "mse", (x, y)).dense()
        torch.testing.assert_close(other, once)  # linear in its parameters


def everything(net, batch):
    """All that looks at a model."""
    op = sharpness.hessian(net, "mse", batch)
    sharpness.trace(op, 20, method="layerwise")
    sharpness.top_eigenvalues(op), sharpness.ggn(net, "mse", batch).dense()
    sharpness.hessian(net, "mse", batch, masks=3).dense()
    noise = sharpness.gradient_covariance(net, batch, "mse", num_masks=3)
    sharpness.variance_flatness(net, "mse", batch, noise, k=1)
    direction = sharpness.filter_normalized_direction(net)
    sharpness.loss_slice(net, "mse", batch, [0.0, 1.0], direction)
    sharpness.sam_sharpness(net, "mse", batch)


def test_nothing_is_written_on_models_modules_or_parameters():
    net, batch = mlp(), data()
    held = [*net.modules(), *net.parameters()]
    before = [{k: str(v) for k, v in vars(x).items()} for x in held]
    everything(net, batch)
    assert [{k: str(v) for k, v in vars(x).items()} for x in held] == before


def test_hooks_are_taken_off_where_a_pass_fails():
    net, batch = Counts().double(), data()
    op = sharpness.hessian(net, "mse", batch)
    net.broken = True
    for run in (
        lambda: sharpness.trace(op, 20, method="layerwise"),
        lambda: sharpness.hessian(net, "mse", batch),
        lambda: sharpness.gradient_covariance(net, batch, "mse", num_masks=2),
    ):
        with pytest.raises(RuntimeError, match="broken"):
            run()
        for module in net.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("masks", ["off", 3])
def test_weight_normalization_has_its_second_derivative(masks):
    """That of torch's kernel is not symmetric."""
    net = nn.Sequential(weight_norm(nn.Linear(3, 5)), nn.ReLU(), nn.Linear(5, 2))
    net, x, y = net.double(), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    op = sharpness.hessian(net, "mse", (x, y), masks=masks)
    found = op.dense()
    torch.testing.assert_close(found, found.T)
    v, step = torch.randn(op.shape[0]).double(), 1e-5

    def gradient(sign):
        moved = vectors.to_vector(op.params) + sign * step * v
        leaves = vectors.to_params(moved, op.params)
        leaves = {n: p.requires_grad_() for n, p in leaves.items()}
        risk = F.mse_loss(torch.func.functional_call(net, leaves, (x,)), y)
        return torch.cat([
            g.flatten() for g in torch.autograd.grad(risk, list(leaves.values()))
        ])  # fmt: skip

    expected = (gradient(1) - gradient(-1)) / (2 * step)
    torch.testing.assert_close(op @ v, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", [sharpness.hessian, sharpness.ggn])
def test_a_penalty_on_the_weights_is_refused(make):
    """Its derivatives would be missing: they are at other tensors than it reads."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    batch = torch.randn(5, 2), torch.randn(5, 1)

    def penalized(outputs, targets):
        decay = sum(p.square().sum() for p in net.parameters())
        return nn.functional.mse_loss(outputs, targets) + 0.1 * decay

    for take in (lambda op: op.dense(), sharpness.trace):
        with pytest.raises(ValueError, match=r"depends on 4 parameters.*0\.weight"):
            take(make(net, penalized, batch))

    class Scaled(nn.Module):  # a parameter of the loss itself is a constant
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs, targets):
            return self.scale * nn.functional.mse_loss(outputs, targets)

    found = make(net, Scaled(), batch).dense()
    torch.testing.assert_close(found, 2 * make(net, "mse", batch).dense())


class Twice(torch.autograd.Function):
    """Doubles, and asks a module of the model on the way back."""

    @staticmethod
    def forward(ctx, x, drop):
        ctx.drop = drop
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.drop(g), None


class AsksOnTheWayBack(nn.Module):
    """A backward pass runs its dropout, from a node or to give a tensor back."""

    def __init__(self, how):
        super().__init__()
        self.how, self.drop = how, nn.Dropout(0.5)
        self.below, self.above = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.below(x))
        if self.how == "node":
            return self.above(Twice.apply(h, self.drop))
        if self.how == "hook":
            with saved_tensors_hooks(lambda x: x, self.drop):
                return self.above(2 * h.square().sqrt() * h.sign())
        return self.above(2 * h)


@pytest.mark.parametrize("how", ["node", "hook", "neither"])
def test_modes_are_in_place_only_where_a_product_runs_the_model(how):
    torch.manual_seed(0)
    net = AsksOnTheWayBack(how).double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    plain = AsksOnTheWayBack("neither").double()
    plain.load_state_dict(net.state_dict())
    expected = sharpness.hessian(plain.eval(), "mse", batch).dense()
    op = sharpness.hessian(net, "mse", batch)
    held, runs = op.surface.held, []

    def counted(seed):
        runs.append(seed)
        return held(seed)

    op.surface.held = counted
    torch.testing.assert_close(op.dense(), expected)
    v, total = torch.randn(len(expected)).double(), torch.zeros(len(expected)).double()
    torch.testing.assert_close(op @ v, expected @ v)
    op.add_product(v, total)
    torch.testing.assert_close(total, expected @ v)
    assert len(runs) == (0 if how == "neither" else 3)
