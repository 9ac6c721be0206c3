"""The CUDA kernels against the CPU's, bit for bit; skipped where there is no device."""

import pytest
import torch

import torch_dropout_ir as tdi
from torch_dropout_ir import ops, registration

KEY = torch.tensor([1234567890123456789, -987654321])
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("p", [0.0, 2.0**-20, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (1031, 17), (2**20 + 1,)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16]
)
def test_forward_and_backward_equal_the_cpus(dtype, shape, p):
    x = torch.randn(shape).to(dtype)
    outcomes = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = tdi.dropout(leaf, p, rng=KEY.to(device))
        (g,) = torch.autograd.grad(y.sum(), leaf)
        outcomes.append((y.detach().cpu(), g.cpu()))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_unaligned_views_equal_the_cpus():
    x = torch.randn(1001)
    on_cuda = tdi.dropout(x.cuda()[1:], rng=KEY.cuda())
    assert torch.equal(on_cuda.cpu(), tdi.dropout(x[1:], rng=KEY))


@pytest.mark.parametrize("rows", [1, 63, 4096])
@pytest.mark.parametrize("units", [1, 7, 64, 1000])
def test_counts_equal_the_cpus(rows, units):
    rate = torch.tensor(0.3, dtype=torch.float64)
    packed = ops._mask_draw(KEY, rate, rows * units)
    on_cuda = ops._mask_draw(KEY.cuda(), rate.cuda(), rows * units)
    assert torch.equal(on_cuda.cpu(), packed)
    counts = ops.unit_counts(on_cuda, rows, units)
    assert torch.equal(counts.cpu(), ops.unit_counts(packed, rows, units))


@pytest.mark.parametrize("rows", [1, 63, 4096, 2**17])
@pytest.mark.parametrize("units", [1, 7, 64, 1000, 2049])
def test_counting_while_drawing_equals_the_cpus(rows, units):
    x = torch.randn(rows, units)
    counts = torch.arange(units)
    on_cuda = registration.dropout_counted(
        x.cuda(), KEY.cuda(), 0.3, at := counts.cuda()
    )
    for a, b in zip(
        (*on_cuda, at),
        (*registration.dropout_counted(x, KEY, 0.3, counts), counts),
        strict=True,
    ):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [4, 512, 2**16])
def test_layer_statistics_and_fingerprint(rows):
    layer, x = tdi.Dropout(0.5), torch.ones(rows, 100, device="cuda")
    masks = []
    for _ in range(3):
        layer(x)
        masks.append(layer.last_mask)
    kept = torch.stack(masks).sum((0, 1))
    assert torch.equal(layer.statistics.unit_kept, kept)
    assert layer.fingerprint == ops.fingerprint(layer._last[0].cpu())


def test_side_streams_are_respected():
    x = torch.zeros(2**24, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.fill_(1.0)
        y = tdi.dropout(x, 0.5, rng=KEY.cuda())
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y != 0, tdi.dropout(torch.ones_like(x), rng=KEY.cuda()) != 0)


def test_graph_capture_and_replay():
    x, key = torch.ones(4096, device="cuda"), KEY.cuda()
    tdi.dropout(x, 0.5, rng=key)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tdi.dropout(x, 0.5, rng=key)
    for other in (KEY, KEY + 1):
        key.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y.cpu(), tdi.dropout(torch.ones(4096), 0.5, rng=other))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_device_guard():
    x = torch.ones(1000, device="cuda:1")
    with torch.cuda.device(0):
        y = tdi.dropout(x, rng=KEY.to("cuda:1"))
    assert torch.equal(y.cpu(), tdi.dropout(torch.ones(1000), rng=KEY))


def test_manual_seed_reproduces():
    x = torch.ones(1000, device="cuda")
    torch.manual_seed(1)
    first = tdi.dropout(x)
    torch.manual_seed(1)
    assert torch.equal(tdi.dropout(x), first)


def test_a_captured_layer_shows_its_mask_and_is_not_counted():
    layer, x = tdi.Dropout(0.5), torch.ones(64, 1024, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    kept = layer.statistics.unit_kept
    for _ in range(2):
        graph.replay()
        assert torch.equal(layer.last_mask, y != 0)
    assert layer.statistics.num_calls == 1
    assert torch.equal(layer.statistics.unit_kept, kept)


@pytest.mark.parametrize("shape", [(4, 64), (2048, 1024)])
def test_statistics_do_not_wait_for_the_device(shape):
    layer, x = tdi.Dropout(0.5), torch.ones(shape, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            torch.autograd.grad(layer(x).sum(), x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.statistics.num_calls == 3
