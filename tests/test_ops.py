"""The op against NumPy's Philox, against closed forms, and under every transform."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import torch_dropout_ir as tdi
from tests.reference import philox
from torch_dropout_ir import kernels, ops, registration

KEY = torch.tensor([1234567890123456789, -987654321])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
X, PACKED = torch.ones(9), torch.zeros(8, dtype=torch.uint8)
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
)


def signed(low, high):
    value = low + (high << 32)
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(counter, key, words):
    expected = [int(word, 16) for word in words.split()]
    assert philox.philox4x32_10(counter, key) == expected
    rng = torch.tensor([signed(*key), signed(*counter[2:])])
    blocks = torch.tensor([signed(*counter[:2])])
    assert kernels.philox4x32_10(rng, blocks)[0].tolist() == expected


@pytest.mark.parametrize("p", [0.0, 2.0**-20, 0.3, 0.5, 0.9, 1 - 2.0**-20, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 3, 4, 63, 64, 65, 257])
def test_mask_is_the_references_bit_for_bit(numel, p):
    expected = torch.from_numpy(philox.mask(KEY.tolist(), p, numel))
    rate = torch.tensor(p, dtype=torch.float64)
    for draw in (kernels.mask_draw, ops._mask_draw):
        packed = draw(KEY, rate, numel)
        assert packed.numel() == 8 * ((numel + 63) // 64)
        assert torch.equal(ops.mask_unpack(packed, (numel,)), expected)
        bits = np.unpackbits(packed.numpy(), bitorder="little")
        assert not bits[numel:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 9), (3, 0, 2), (5, 64), (1031,)])
def test_compiled_kernels_equal_python_ones(dtype, shape):
    if not ops.COMPILED:
        pytest.skip("the extension is not built")
    x = torch.randn(shape).to(dtype)
    compiled, packed = ops._dropout_forward(x, KEY, 0.3)
    python, bits = kernels.dropout_forward(x, KEY, 0.3)
    assert torch.equal(packed, bits)
    torch.testing.assert_close(compiled, python, rtol=0, atol=0)
    torch.testing.assert_close(
        ops._mask_apply(x, packed, 1.7),
        kernels.mask_apply(x, packed, 1.7),
        rtol=0,
        atol=0,
    )
    rows, units = (x.numel() // shape[-1], shape[-1]) if x.numel() and shape else (0, 1)
    counts = ops.unit_counts(packed, rows, units)
    assert torch.equal(counts, kernels.unit_counts(packed, rows, units))


def test_mask_follows_the_index_not_the_strides():
    x = torch.randn(6, 10)
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(tdi.dropout(x, rng=KEY), tdi.dropout(turned, rng=KEY))
    assert torch.equal(
        tdi.dropout(x[:, ::2], rng=KEY) != 0,
        tdi.dropout(torch.ones(6, 5), rng=KEY) != 0,
    )


@pytest.mark.parametrize("p", [2.0**-20, 0.1, 0.5, 0.9, 1 - 2.0**-20])
def test_keep_count_is_binomial(p):
    numel = 2**20
    mask = ops.mask_unpack(
        ops._mask_draw(KEY, torch.tensor(p).double(), numel), (numel,)
    )
    z = (int(mask.sum()) - numel * (1 - p)) / (numel * p * (1 - p)) ** 0.5
    assert abs(z) < 5


def test_neighbours_and_keys_are_independent():
    numel = 2**20
    first = tdi.dropout(torch.ones(numel), rng=KEY) - 1
    second = tdi.dropout(torch.ones(numel), rng=KEY + 1) - 1
    for other in (first.roll(1), first.roll(4), first.roll(64), second):
        assert abs(float(first @ other)) < 5 * numel**0.5


def test_scaling_identity_and_extremes():
    x = torch.randn(1000)
    y = tdi.dropout(x, 0.25, rng=KEY)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert torch.equal(tdi.dropout(x, 0.0), x)
    assert torch.equal(tdi.dropout(x, 1.0), torch.zeros(1000))
    assert tdi.dropout(x, 0.5, training=False) is x
    bad = torch.tensor([float("inf"), float("nan"), -float("inf")] * 100)
    dropped = tdi.dropout(bad, rng=KEY)
    mask = tdi.dropout(torch.ones(300), rng=KEY) != 0
    assert torch.equal(dropped[~mask], torch.zeros(int((~mask).sum())))
    assert not dropped[mask].isfinite().any()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [None, True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("seen", [True, False])
def test_the_key_is_torchs_randint_wherever_it_is_drawn(layer, grad, seen):
    x = torch.randn(7, 64, requires_grad=grad)
    drop = tdi.dropout
    if layer is not None:
        drop = tdi.Dropout(0.5)
        drop.track = layer
    torch.manual_seed(5)
    key = torch.randint(2**63 - 1, (2,))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    with Seen() if seen else contextlib.nullcontext() as mode:
        y = drop(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, tdi.dropout(x, rng=key))
    if seen:  # a dispatch mode sees every draw
        assert torch.ops.aten.randint.default in mode.ops
    op = ops._dropout_forward
    for draw in (op, kernels.dropout_forward):
        torch.manual_seed(5)
        z, packed = draw(x.detach(), None, 0.5)
        assert torch.equal(z, y) and torch.equal(packed, op(x, key, 0.5)[1])


def test_manual_seed_reproduces_and_eval_draws_nothing():
    torch.manual_seed(3)
    first = tdi.dropout(torch.ones(100))
    torch.manual_seed(3)
    assert torch.equal(tdi.dropout(torch.ones(100)), first)
    assert not torch.equal(tdi.dropout(torch.ones(100)), first)
    state = torch.get_rng_state()
    tdi.dropout(torch.ones(100), training=False)
    assert torch.equal(torch.get_rng_state(), state)


def scale_of(shape, p=0.5):
    return tdi.dropout(torch.ones(shape, dtype=torch.float64), p, rng=KEY)


def test_derivatives_of_every_order_and_mode():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def f(x):
        return tdi.dropout(x, rng=KEY)

    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: f(x) ** 3, (x,))
    assert torch.autograd.gradcheck(
        f, (x,), check_batched_grad=True, check_batched_forward_grad=False
    )


def test_torch_func_transforms_equal_closed_forms():
    x = torch.randn(6, dtype=torch.float64)
    scale = scale_of(6)

    def f(x):
        return (tdi.dropout(x, rng=KEY) ** 3).sum()

    closed = torch.diag(6 * x * scale**3)
    torch.testing.assert_close(torch.func.grad(f)(x), 3 * x**2 * scale**3)
    torch.testing.assert_close(torch.func.hessian(f)(x), closed)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.grad(f))(x), closed)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(f))(x), closed)
    v = torch.randn(6, dtype=torch.float64)
    # The trap: a wrong registration gives a zero tangent without an error.
    tangent = torch.func.jvp(lambda x: tdi.dropout(x, rng=KEY), (x,), (v,))[1]
    torch.testing.assert_close(tangent, v * scale)
    hvp = torch.func.jvp(torch.func.grad(f), (x,), (v,))[1]
    torch.testing.assert_close(hvp, closed @ v)


def test_forward_mode_outside_torch_func():
    x, v = torch.randn(6).double(), torch.randn(6).double()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        y = torch.autograd.forward_ad.unpack_dual(tdi.dropout(dual, rng=KEY))
    torch.testing.assert_close(y.tangent, v * scale_of(6))


def test_vmap_keeps_torchs_rules_of_randomness():
    x = torch.ones(8, 64)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(tdi.dropout)(x)
    same = torch.func.vmap(tdi.dropout, randomness="same")(x)
    assert (same == same[0]).all()
    different = torch.func.vmap(tdi.dropout, randomness="different")(x)
    assert len({tuple(row.tolist()) for row in different}) == 8


def test_vmapped_vjp_uses_the_masks_of_its_own_forward():
    x = torch.ones(8, 64)

    def pullback(row):
        y, vjp = torch.func.vjp(tdi.dropout, row)
        return y, vjp(torch.ones(64))[0]

    y, g = torch.func.vmap(pullback, randomness="different")(x)
    assert torch.equal(y, g)


def test_batched_gradients_in_eager_mode():
    x = torch.ones(5, requires_grad=True)
    y = tdi.dropout(x, rng=KEY)
    eye = torch.eye(5)
    (g,) = torch.autograd.grad(y, x, eye, is_grads_batched=True)
    assert torch.equal(g, torch.diag(scale_of(5).float()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)])
def test_compiles_without_graph_break(rate):
    torch._dynamo.reset()

    def f(x, key, p):
        return tdi.dropout(x, p, rng=key) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = torch.randn(100, requires_grad=True)
    y, expected = compiled(x, KEY, rate), f(x, KEY, rate)
    assert torch.equal(y, expected)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, 2 * scale_of(100).float())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant):
    x = torch.ones(100, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(tdi.dropout, x, use_reentrant=reentrant)
    (g,) = torch.autograd.grad(y.sum(), x) if not reentrant else (None,)
    if reentrant:
        y.sum().backward()
        g = x.grad
    assert torch.equal(g, y.detach())


def test_one_bit_an_element_is_saved():
    x = torch.randn(4096, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t, lambda t: t
    ):
        tdi.dropout(x)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 512)]


def test_opcheck():
    x = torch.randn(5, 7)
    packed = ops._dropout_forward(x, KEY, 0.5)[1]
    torch.library.opcheck(ops._dropout_forward, (x, KEY, 0.5))
    counts = torch.zeros(7, dtype=torch.int64)
    torch.library.opcheck(registration.dropout_counted, (x, KEY, 0.5, counts))
    torch.library.opcheck(ops._mask_apply, (x, packed, 2.0))
    torch.library.opcheck(ops._mask_draw, (KEY, torch.tensor(0.5).double(), 35))
    torch.library.opcheck(ops.unit_counts, (packed, 5, 7))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_probability_gets_torchs_sentence(p):
    for given_p in (p, torch.tensor(p)):
        for training in (True, False):
            with pytest.raises(ValueError, match="has to be between 0 and 1"):
                tdi.dropout(torch.ones(3), given_p, training)


def test_bad_inputs_are_named():
    for dtype in (torch.float8_e4m3fn, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=f"floating-point .* got {dtype}"):
            tdi.dropout(torch.ones(3).to(dtype))
    with pytest.raises(TypeError, match="floating-point"):
        tdi.dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point"):
        tdi.dropout([1.0])
    for rng in (torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.ones(3).long()):
        with pytest.raises(ValueError, match="int64 tensor of shape"):
            tdi.dropout(torch.ones(3), rng=rng)


@given(st.integers(0, 40), st.integers(0, 9), st.floats(0.0, 1.0))
def test_unit_counts_are_column_sums(rows, units, p):
    packed = ops._mask_draw(KEY, torch.tensor(p).double(), rows * units)
    mask = ops.mask_unpack(packed, (rows, units))
    assert torch.equal(ops.unit_counts(packed, rows, units), mask.sum(0))


@given(st.integers(0, 70), st.integers(1, 9), st.floats(0.0, 1.0))
def test_counting_while_drawing_adds_the_column_sums(rows, units, p):
    x = torch.randn(rows, units)
    y, packed = ops._dropout_forward(x, KEY, p)
    column_sums = ops.mask_unpack(packed, (rows, units)).sum(0)
    for draw in (registration.dropout_counted, kernels.dropout_counted):
        counts = torch.arange(units)
        counted_y, counted_packed = draw(x, KEY, p, counts)
        assert torch.equal(counted_y, y) and torch.equal(counted_packed, packed)
        assert torch.equal(counts, torch.arange(units) + column_sums)


@pytest.mark.parametrize("packed", [None, PACKED[:0], PACKED[:7], PACKED.float()])
def test_what_needs_a_mask_says_so(packed):
    def transformed(packed):
        return torch.func.grad(lambda x: ops.mask_apply(x, packed, 2.0).sum())(X)

    for needs in (lambda packed: ops.mask_unpack(packed, (9,)), transformed):
        with pytest.raises(ValueError, match=r"^mask_[a-z]+: expected `packed`"):
            needs(packed)
    if packed is None or packed.numel():
        with pytest.raises(ValueError, match=r"^fingerprint: expected `packed`"):
            ops.fingerprint(packed)


def test_the_threshold_is_the_nearest_word():
    """At a rate between two words, by half of the way and less."""
    key = torch.tensor([3, 4])
    words = kernels.philox4x32_10(key, torch.arange(16)).flatten().tolist()
    x = torch.ones(len(words))
    for i, word in enumerate(words):
        for part, kept in ((-0.5, True), (0.25, True), (0.5, False), (1.0, False)):
            p = (word + part) / 2**32
            for forward in (kernels.dropout_forward, registration.dropout_forward):
                assert bool(forward(x, key, p)[0][i] != 0) is kept
