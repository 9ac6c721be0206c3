"""Laws of the masks, and the layer under everything that torch does to a module."""

import hashlib
import os

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_dropout_ir as tdi
from torch_dropout_ir import ops

KEYS = [torch.tensor([3 * i + 1, 7 * i - 2]) for i in range(8)]
RATES = [2.0**-20, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-20]
QUIET = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)


def kept(key, p, *shape):
    numel = torch.Size(shape).numel()
    packed = ops._mask_draw(key, torch.tensor(p, dtype=torch.float64), numel)
    return ops.mask_unpack(packed, shape)


# A key gives one mask for ever: (key, p, elements, first bytes, SHA-256 of all).
GOLDEN = (
    (
        (0, 0),
        0.5,
        1000,
        "5e504f575edba9748d96ceeecec987fa",
        "232739ec79d8ea757378d452e03e31e332f846ccfe893a5cfdca9278c6c1b6d4",
    ),
    (
        (1, 2),
        0.1,
        4097,
        "77ffb7ffd7ffffbefffffd7f7ffff6bf",
        "40926ac6a99a8d1677b8c5adcd38ecb12f966134fbb5dcc895ed3fc80a241ee2",
    ),
    (
        (-1, 2**62),
        0.9,
        100_003,
        "0010010000208080040040a200080000",
        "8403f1ad20a705f785875f6ac7297b6255806c65fe5b8eb559b2d3bc79cfef7c",
    ),
)


@pytest.mark.parametrize(("key", "p", "numel", "first", "digest"), GOLDEN)
def test_golden_masks(key, p, numel, first, digest):
    rate = torch.tensor(p, dtype=torch.float64)
    packed = ops._mask_draw(torch.tensor(key), rate, numel).numpy().tobytes()
    assert packed[:16].hex() == first
    assert hashlib.sha256(packed).hexdigest() == digest


@pytest.mark.parametrize("p", RATES)
def test_counts_of_all_units_and_pairs(p):
    """Keep counts, by unit and by pair of units, are binomial; keys are fixed."""
    q, rows, units = 1 - p, 2**14, 16
    masks = torch.stack([kept(key, p, rows, units) for key in KEYS]).double()
    flat = masks.view(-1, units)
    n = len(flat)
    z = (flat.sum(0) - n * q) / (n * q * p) ** 0.5
    assert z.abs().max() < 5
    total = (flat.sum() - n * units * q) / (n * units * q * p) ** 0.5
    assert abs(float(total)) < 5
    if p * q < 1e-2:
        return  # too few events for a normal law of pairs
    both = flat.T @ flat
    above = torch.ones(units, units).triu(1).bool()
    excess = (both[above] - n * q * q) / (n * q * q * (1 - q * q)) ** 0.5
    assert excess.abs().max() < 5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_serial_correlation_along_elements_keys_and_streams(p):
    signs = [(kept(key, p, 2**18).double() - (1 - p)) for key in KEYS]
    neighbours = torch.tensor([1234, 5])
    series = [kept(neighbours + torch.tensor(step), p, 2**18).double() - (1 - p)
              for step in ([0, 0], [1, 0], [0, 1])]  # fmt: skip
    spread = 2**9 * p * (1 - p)
    for lag in (1, 2, 3, 4, 5, 63, 64, 128, 1024):
        assert abs(float(signs[0] @ signs[0].roll(lag))) < 5 * spread, lag
    for other in signs[1:]:
        assert abs(float(signs[0] @ other)) < 5 * spread
    for other in series[1:]:
        assert abs(float(series[0] @ other)) < 5 * spread


def test_consecutive_calls_are_independent():
    torch.manual_seed(11)
    masks = [(tdi.dropout(torch.ones(2**18)) - 1).double() for _ in range(6)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs(float(first @ second)) < 5 * 2**9


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_runs_of_kept_elements_are_geometric(p):
    """Lengths of runs of ones: P(length = k) = p q^(k-1)."""
    bits = kept(KEYS[0], p, 2**18).int()
    edges = torch.diff(bits, prepend=bits.new_zeros(1), append=bits.new_zeros(1))
    lengths = (edges == -1).nonzero() - (edges == 1).nonzero()
    n, q = len(lengths), 1 - p
    for k in range(1, 8):
        share = p * q ** (k - 1)
        z = (int((lengths == k).sum()) - n * share) / (n * share * (1 - share)) ** 0.5
        assert abs(z) < 5, k


def test_probability_is_exact_to_two_to_the_minus_32():
    """The threshold, seen through a word that lies right at it."""
    words = tdi.kernels.philox4x32_10(KEYS[0], torch.arange(1000)).flatten()
    for i in (0, 5, 999):
        at = int(words[i]) / 2**32
        assert bool(kept(KEYS[0], at, 4000)[i])
        assert not bool(kept(KEYS[0], at + 2.0**-32, 4000)[i])


def test_rates_as_tensors():
    x = torch.randn(1000)
    key = KEYS[0]
    for p in (0.0, 0.3, 1.0):
        expected = tdi.dropout(x, p, rng=key)
        for dtype in (torch.float64, torch.float32):
            given = torch.tensor(p, dtype=dtype)
            torch.testing.assert_close(tdi.dropout(x, given, rng=key), expected)
    for bad in (float("nan"), -0.5, 2.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            tdi.dropout(x, torch.tensor(bad))
    with pytest.raises(ValueError, match="0-d"):
        tdi.dropout(x, torch.tensor([0.5]))


@QUIET
def test_a_schedule_of_rates_compiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    scheduled = torch.compile(tdi.dropout, fullgraph=True, backend=counter)
    x, key = torch.ones(4096), KEYS[0]
    for p in (0.1, 0.2, 0.7):
        share = (scheduled(x, torch.tensor(p), rng=key) == 0).float().mean()
        assert float(share) == pytest.approx(p, abs=0.05)
    assert counter.frame_count == 1


@QUIET
def test_a_layer_with_a_rate_as_tensor_compiles_in_both_modes():
    torch._dynamo.reset()
    layer, x = tdi.Dropout(torch.tensor(0.25)), torch.ones(4096)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert float((compiled(x) == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
    layer.eval()
    assert torch.equal(compiled(x), x)
    layer.p = torch.tensor(1.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer(x)


def network():
    return nn.Sequential(nn.Linear(8, 32), tdi.Dropout(0.5), nn.Linear(32, 2))


@QUIET
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer_is_the_eager_one(backend):
    torch._dynamo.reset()
    net = network()
    x = torch.randn(16, 8, requires_grad=True)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        outcomes = []
        for model in (net, compiled):
            torch.manual_seed(5)
            y = model(x)
            (g,) = torch.autograd.grad(y.sum(), x)
            outcomes.append((y, g, net[1].fingerprint))
    (y, g, mask), (compiled_y, compiled_g, compiled_mask) = outcomes
    torch.testing.assert_close(compiled_y, y)
    torch.testing.assert_close(compiled_g, g)
    assert mask == compiled_mask


@QUIET
def test_compiled_transforms_leave_nothing_behind():
    torch._dynamo.reset()
    layer = tdi.Dropout(0.5)
    gradient = torch.func.grad(lambda x: layer(x).sum())
    found = torch.compile(gradient, fullgraph=True, backend="aot_eager")(torch.ones(64))
    assert set(found.tolist()) == {0.0, 2.0}
    assert layer.last_mask is None


def test_aot_autograd_saves_the_packed_mask():
    from functorch.compile import aot_function, nop

    kept_sizes = []

    def backward(graph, inputs):
        kept_sizes.extend((t.dtype, t.numel()) for t in inputs)
        return nop(graph, inputs)

    def f(x, key):
        return tdi.dropout(x, rng=key) * 3

    traced = aot_function(f, fw_compiler=nop, bw_compiler=backward)
    x = torch.randn(4096, requires_grad=True)
    y = traced(x, KEYS[0])
    torch.testing.assert_close(y, f(x, KEYS[0]))
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, 6.0 * (y != 0))
    assert (torch.uint8, 512) in kept_sizes
    assert all(dtype is not torch.bool for dtype, _ in kept_sizes)


@QUIET
def test_exports():
    net = network()
    program = torch.export.export(net, (torch.ones(4, 8),))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("mask_draw" in name for name in names)
    first, second = (program.module()(torch.ones(4, 8)) for _ in range(2))
    assert first.shape == (4, 2) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    net = nn.Sequential(nn.Linear(64, 64), tdi.Dropout(0.5))
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = net(x)
    assert y.dtype == dtype
    kept_share = float((y != 0).float().mean())
    assert kept_share == pytest.approx(0.5, abs=0.05)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_error_is_that_of_the_plain_formula(dtype):
    x = torch.randn(10_000).to(dtype)
    mask = kept(KEYS[0], 0.1, 10_000)
    exact = torch.where(mask, x.double() / 0.9, 0.0)
    ours = (tdi.dropout(x, 0.1, rng=KEYS[0]).double() - exact).abs().max()
    plain = (torch.where(mask, x / 0.9, 0.0).double() - exact).abs().max()
    assert ours <= 2 * plain


@pytest.mark.parametrize("memory_format", ["channels_last", "transposed", "expanded"])
def test_strides_change_neither_mask_nor_derivative(memory_format):
    x = torch.randn(4, 6, 5, 3)
    if memory_format == "channels_last":
        other = x.contiguous(memory_format=torch.channels_last)
    elif memory_format == "transposed":
        other = x.transpose(0, 3).contiguous().transpose(0, 3)
    else:
        x = torch.randn(4, 1, 5, 3).expand(4, 6, 5, 3).contiguous()
        other = x[:, :1].expand(4, 6, 5, 3)
    assert not other.is_contiguous()
    leaf = other.detach().requires_grad_()
    y = tdi.dropout(leaf, rng=KEYS[1])
    assert torch.equal(y, tdi.dropout(x, rng=KEYS[1]))
    outputs = [y, torch.func.vjp(tdi.dropout, leaf)[0], tdi.Dropout()(other)]
    if memory_format != "expanded":
        outputs += [tdi.Dropout2d()(other), tdi.Dropout(inplace=True)(other)]
    assert {y.stride() for y in outputs} == {nn.Dropout()(other).stride()}
    weight = torch.randn_like(x).transpose(1, 2).contiguous().transpose(1, 2)
    (g,) = torch.autograd.grad(y, leaf, weight)
    torch.testing.assert_close(g, torch.where(y != 0, 2 * weight, 0.0))


@QUIET
def test_what_a_tracer_records_drops_anew_at_every_call():
    model = nn.Sequential(nn.Linear(4, 500), tdi.Dropout())
    traced = torch.jit.trace(model, torch.ones(2, 4), check_trace=False)
    a, b = traced(torch.ones(2, 4)), traced(torch.ones(2, 4))
    assert not torch.equal(a, b)
    kept = a != 0
    torch.testing.assert_close(a[kept], (2 * model[0](torch.ones(2, 4)))[kept])
    a.sum().backward()
    assert model[0].weight.grad is not None
    assert model[1].statistics.num_calls == 0


def test_the_rate_gets_no_derivative_in_any_mode():
    rate = torch.tensor(0.3, requires_grad=True)
    assert not tdi.dropout(torch.ones(9), rate, rng=KEYS[0]).requires_grad

    def total(p):
        return tdi.dropout(torch.ones(9), p, rng=KEYS[0]).sum()

    assert torch.func.grad(total)(rate.detach()) == 0


def test_a_key_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"on cpu, got .* on meta"):
        tdi.dropout(torch.ones(3), rng=torch.zeros(2, dtype=torch.int64, device="meta"))


def test_meta_tensors_have_shapes():
    y = tdi.dropout(torch.empty(5, 7, device="meta"))
    assert y.shape == (5, 7) and y.device.type == "meta"


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    net = network()
    model = nn.parallel.DistributedDataParallel(net)
    torch.manual_seed(rank)  # what every distributed script does
    model(torch.ones(64, 8)).sum().backward()
    torch.save((net[1].last_mask, net[0].weight.grad), os.path.join(folder, str(rank)))
    torch.distributed.destroy_process_group()


def test_ranks_draw_different_masks_and_share_gradients(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    (first, grad), (second, other) = (torch.load(tmp_path / str(r)) for r in (0, 1))
    assert not torch.equal(first, second)
    agree = float((first == second).float().mean())
    assert abs(agree - 0.5) < 5 * 0.5 / first.numel() ** 0.5
    assert torch.equal(grad, other)


@QUIET
@pytest.mark.parametrize("ours", [tdi.Dropout, tdi.Dropout2d])
def test_compiles_with_dynamic_shapes(ours):
    torch._dynamo.reset()
    layer = ours(0.5)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9, 30):
        x = torch.ones(rows, 7, 2, 3, requires_grad=True)
        y = compiled(x)
        assert torch.equal(y != 0, layer.last_mask.expand_as(y))
        (g,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(g, y)
    assert layer.statistics.num_calls == 0


@QUIET
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("ours", [tdi.Dropout, tdi.Dropout2d])
def test_exports_with_dynamic_shapes(ours, strict):
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(
        ours(0.5), (torch.ones(4, 7, 2, 3),), dynamic_shapes=({0: rows},), strict=strict
    )
    for run in (program, program.run_decompositions()):
        y = run.module()(torch.ones(9, 7, 2, 3))
        assert y.shape == (9, 7, 2, 3) and set(y.unique().tolist()) == {0.0, 2.0}


@QUIET
def test_checkpoints_inside_a_compiled_graph():
    torch._dynamo.reset()
    layer = tdi.Dropout(0.5)

    def f(x):
        return checkpoint(lambda x: layer(x) ** 2, x, use_reentrant=False)

    x = torch.ones(64, requires_grad=True)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert set(y.tolist()) == {0.0, 4.0}
    assert torch.equal(g, 2 * y)
    assert layer.last_mask is None and layer.statistics.num_calls == 0


@QUIET
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_layer_inside_a_checkpoint(reentrant):
    torch._dynamo.reset()
    layer = tdi.Dropout(0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(64, requires_grad=True)
    y = checkpoint(lambda x: compiled(x) ** 2, x, use_reentrant=reentrant)
    before = layer.fingerprint
    y.sum().backward()
    assert layer.fingerprint == before
    assert torch.equal(x.grad, 2 * y)


def test_double_backward_through_a_checkpoint():
    layer, x = tdi.Dropout(0.5), torch.randn(50).double().requires_grad_()
    y = checkpoint(lambda x: (layer(x) ** 3).sum(), x, use_reentrant=False)
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(h, 48 * x * layer.last_mask)
    assert layer.statistics.num_calls == 1


def test_a_forked_process_goes_on():
    layer = tdi.Dropout(0.5)
    layer(torch.ones(2**18))
    context = torch.multiprocessing.get_context("fork")
    child = context.Process(target=_in_a_fork, args=(layer,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _in_a_fork(layer):
    torch.set_num_threads(1)
    layer(torch.ones(2**18))
    assert layer.statistics.num_calls == 2
