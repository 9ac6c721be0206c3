"""Mask statistics and the layers that gather them."""

import copy
import io
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import torch_dropout_ir as tdi
from torch_dropout_ir import MaskStatistics
from torch_dropout_ir.masks import MaskTally

LAYERS = (
    (tdi.Dropout, nn.Dropout, (6, 5), (6, 5)),
    (tdi.Dropout1d, nn.Dropout1d, (6, 5, 3), (6, 5, 1)),
    (tdi.Dropout1d, nn.Dropout1d, (5, 3), (5, 1)),
    (tdi.Dropout2d, nn.Dropout2d, (6, 5, 3, 2), (6, 5, 1, 1)),
    (tdi.Dropout3d, nn.Dropout3d, (6, 5, 3, 2, 2), (6, 5, 1, 1, 1)),
    (tdi.Dropout3d, nn.Dropout3d, (5, 3, 2, 2), (5, 1, 1, 1)),
)


def same(a, b):
    for name in ("num_calls", "num_elements", "expected_kept", "variance"):
        assert getattr(a, name) == pytest.approx(getattr(b, name)), name
    assert int(a.num_kept) == int(b.num_kept)
    assert torch.equal(a.unit_kept, b.unit_kept)


@st.composite
def statistics(draw):
    if draw(st.booleans()) and draw(st.booleans()):
        return MaskStatistics()
    rows, units = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    mask = torch.rand(rows, units) < 0.5
    return MaskStatistics.of_mask(mask, draw(st.sampled_from([0.25, 0.5])))


@given(statistics(), statistics(), statistics())
def test_statistics_are_a_commutative_monoid(a, b, c):
    same(a + b, b + a)
    same((a + b) + c, a + (b + c))
    same(a + MaskStatistics(), a)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_of_joined_masks_is_the_sum(rows_a, rows_b, units):
    a, b = torch.rand(rows_a, units) < 0.5, torch.rand(rows_b, units) < 0.5
    joined = MaskStatistics.of_mask(torch.cat((a, b)), 0.3)
    added = MaskStatistics.of_mask(a, 0.3) + MaskStatistics.of_mask(b, 0.3)
    assert torch.equal(joined.unit_kept, added.unit_kept)
    assert joined.z_score == pytest.approx(added.z_score)
    assert joined.keep_rate == pytest.approx(added.keep_rate)


def test_numbers_by_hand():
    mask = torch.tensor([[True, False], [True, True], [True, False], [False, False]])
    found = MaskStatistics.of_mask(mask, 0.25)
    assert found.keep_rate == 0.5
    assert found.z_score == pytest.approx((4 - 6) / (8 * 0.25 * 0.75) ** 0.5)
    assert found.unit_kept.tolist() == [3, 1]
    spread = (4 * 0.25 * 0.75) ** 0.5
    torch.testing.assert_close(
        found.unit_z_scores, torch.tensor([0.0, -2.0]).double() / spread
    )


def test_tally_equals_the_sum_of_its_calls():
    tally, total = MaskTally(), MaskStatistics()
    shapes = [(7, 5), (3, 5), (64, 5), (64, 5), (128, 5), (1, 5), (4, 2), (2, 5)]
    for i, (rows, units) in enumerate(shapes):
        key, p = torch.tensor([i, 2]), 0.25 + 0.05 * i
        packed = tdi.ops._mask_draw(key, torch.tensor(p).double(), rows * units)
        mask = tdi.ops.mask_unpack(packed, (rows, units))
        tally.add(packed, rows * units, units, p)
        total += MaskStatistics.of_mask(mask, p)
        if i in (1, 3, 4, 7):
            same(tally.statistics(), total)
    assert total.unit_kept.numel() == 0
    same(MaskTally().statistics(), MaskStatistics())


def test_small_masks_that_wait_are_all_counted():
    layer, kept = tdi.Dropout(0.5), torch.zeros(16, dtype=torch.int64)
    for call in range(700):
        layer(torch.ones(4, 16))
        kept += layer.last_mask.sum(0)
        if call in (0, 70, 699):
            found = layer.statistics
            assert torch.equal(found.unit_kept, kept)
            assert (found.num_calls, found.num_elements) == (call + 1, 64 * (call + 1))
            assert found.variance == found.num_elements / 4


def test_very_many_units_are_counted_as_a_whole():
    layer = tdi.Dropout(0.5)
    kept = 0
    for _ in range(3):
        layer(torch.ones(2**16 + 1))
        kept += int(layer.last_mask.sum())
    found = layer.statistics
    assert int(found.num_kept) == kept and found.unit_kept.numel() == 0
    assert (found.num_calls, found.num_elements) == (3, 3 * (2**16 + 1))


@pytest.mark.parametrize(("ours", "torchs", "shape", "mask_shape"), LAYERS)
def test_layers_show_the_mask_that_they_applied(ours, torchs, shape, mask_shape):
    layer = ours(0.4)
    x = torch.randn(shape)
    assert layer.last_mask is None and layer.statistics.num_calls == 0
    y = layer(x)
    mask = layer.last_mask
    assert mask.shape == mask_shape and mask.dtype == torch.bool
    torch.testing.assert_close(y, torch.where(mask, x / 0.6, 0.0))
    same(
        layer.statistics,
        MaskStatistics.of_mask(mask, 0.4, unit_dim=1 if mask_shape[0] == 6 else 0),
    )
    layer(x)
    assert layer.statistics.num_calls == 2
    layer.reset_statistics()
    assert layer.statistics.num_calls == 0 and layer.last_mask is not None
    layer.track = False
    layer(x)
    assert layer.statistics.num_calls == 0
    assert layer.eval()(x) is x
    assert isinstance(layer, torchs) and repr(layer) == repr(torchs(0.4))


@pytest.mark.parametrize("ours", [case[0] for case in LAYERS])
def test_inplace_overwrites_the_input(ours):
    shape = {case[0]: case[2] for case in LAYERS}[ours]
    x = torch.ones(shape)
    y = ours(0.5, inplace=True)(x)
    assert y is x and bool((x == 0).any())


def test_statistics_converge_to_the_law():
    layer = tdi.Dropout(0.3)
    for _ in range(20):
        layer(torch.ones(512, 100))
    found = layer.statistics
    assert abs(found.z_score) < 5
    assert found.unit_z_scores.abs().max() < 5
    assert found.unit_z_scores.std() == pytest.approx(1.0, abs=0.35)


def test_copies_and_pickles_start_afresh():
    layer = tdi.Dropout(0.5)
    layer(torch.ones(10))
    assert layer.state_dict() == {}
    for twin in (copy.deepcopy(layer), reload(layer)):
        assert twin.last_mask is None and twin.statistics.num_calls == 0
        assert twin.p == 0.5


def reload(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_convert_and_restore_change_only_the_class():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), nn.Dropout2d(0.2))
    net[1].eval()
    calls = []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    keys, attributes = list(net.state_dict()), set(net[1].__dict__)
    held = net[1]
    assert tdi.convert_dropout_(net) is net
    assert type(held) is tdi.Dropout and held is net[1] and held.p == 0.3
    assert not held.training and list(net.state_dict()) == keys
    held.train()
    held(torch.ones(4))
    held.track = False
    assert calls == [1] and held.last_mask is not None
    assert tdi.restore_dropout_(net) is net
    assert [type(m) for m in net] == [nn.Linear, nn.Dropout, nn.Dropout2d]
    assert set(held.__dict__) == attributes
    assert type(tdi.convert_dropout_(nn.Dropout())) is tdi.Dropout


def test_a_users_subclass_is_left_alone():
    class Mine(nn.Dropout):
        pass

    assert type(tdi.convert_dropout_(Mine())) is Mine


class Functional(nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


class ByPythonAndNumpy(nn.Module):
    def forward(self, x):
        return x * random.random() + np.random.rand()


@pytest.mark.parametrize(
    "layer", [nn.Dropout(), tdi.Dropout(), Functional(), ByPythonAndNumpy()]
)
def test_frozen_masks_freeze_and_leave_the_stream(layer):
    x = torch.ones(200)
    state = torch.get_rng_state()
    with tdi.frozen_masks(layer, seed=3):
        first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    with tdi.frozen_masks(layer, seed=4):
        assert not torch.equal(layer(x), first)
    assert not torch.equal(layer(x), layer(x))
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_frozen_masks_survive_an_exception():
    class Fails(nn.Module):
        def forward(self, x):
            torch.rand(3)
            raise ZeroDivisionError

    layer = Fails()
    state = torch.get_rng_state()
    with tdi.frozen_masks(layer), pytest.raises(ZeroDivisionError):
        layer(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_frozen_masks_make_the_curvature_symmetric():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 1))
    net = net.double()
    x = torch.randn(5, 3).double()
    params = dict(net.named_parameters())

    def f(params):
        return torch.func.functional_call(net, params, (x,)).square().sum()

    with tdi.frozen_masks(net):
        blocks = torch.func.jacrev(torch.func.jacrev(f))(params)
    torch.testing.assert_close(
        blocks["0.weight"]["3.weight"].permute(2, 3, 0, 1),
        blocks["3.weight"]["0.weight"],
    )


def test_fingerprints_tell_masks_apart():
    layer = tdi.Dropout(0.5)
    assert layer.fingerprint is None
    seen = set()
    for _ in range(100):
        layer(torch.ones(65))
        assert 0 <= layer.fingerprint < 2**64
        seen.add(layer.fingerprint)
    assert len(seen) == 100
    packed = layer._last[0]
    for bit in range(8):
        flipped = packed.clone()
        flipped[3] ^= 1 << bit
        assert tdi.ops.fingerprint(flipped) != layer.fingerprint
    swapped = packed.view(torch.int64).flip(0).contiguous().view(torch.uint8)
    assert tdi.ops.fingerprint(swapped) != layer.fingerprint


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_mask_and_counts_it_once(reentrant):
    layer = tdi.Dropout(0.5)
    x = torch.ones(100, requires_grad=True)
    checkpoint = torch.utils.checkpoint.checkpoint
    y = checkpoint(lambda x: layer(x) ** 2, x, use_reentrant=reentrant)
    before, last = layer.fingerprint, layer._last
    y.sum().backward()
    assert layer._last is not last, "nothing was recomputed"
    assert layer.fingerprint == before
    assert layer.statistics.num_calls == 1


def test_layers_inside_transforms_drop_but_remember_nothing():
    layer = tdi.Dropout(0.5)
    x = torch.ones(50)
    g = torch.func.grad(lambda x: layer(x).sum())(x)
    assert set(g.tolist()) == {0.0, 2.0}
    assert layer.last_mask is None and layer.statistics.num_calls == 0


@pytest.mark.filterwarnings("ignore:dropout:UserWarning")
@pytest.mark.parametrize("kind", ["Dropout1d", "Dropout2d", "Dropout3d"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_channels_are_torchs_at_every_rank(kind, rank):
    x = torch.ones((40, 30, 3, 2, 2, 2)[:rank])
    try:
        theirs = getattr(nn, kind)(0.5)(x)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="channels"):
            getattr(tdi, kind)(0.5)(x)
        return
    layer = getattr(tdi, kind)(0.5)
    ours = layer(x)
    own = [1 if len({tuple(i.flatten().tolist()) for i in y.movedim(d, 0)}) == 1 else n
           for y in (theirs,) for d, n in enumerate(x.shape)]  # fmt: skip
    assert tuple(layer.last_mask.shape) == tuple(own)
    torch.testing.assert_close(ours, (2.0 * layer.last_mask).expand_as(x))


@pytest.mark.parametrize("kind", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"])
def test_what_a_layer_does_not_take_is_named(kind):
    layer = getattr(tdi, kind)
    for p in (-0.1, float("nan"), torch.tensor(2.0)):
        with pytest.raises(ValueError, match="has to be between 0 and 1"):
            layer(p)
    for x in (None, [1.0], torch.ones(3, 4, dtype=torch.int64)):
        with pytest.raises(TypeError, match="floating-point"):
            layer()(x)


def test_inference_mode_and_training_share_their_statistics():
    layer = tdi.Dropout(0.5)
    for rows in (4, 600):
        with torch.inference_mode():
            layer(torch.ones(rows, 64))
            first = layer.last_mask.sum(0)
        layer(torch.ones(rows, 64))
        kept = first + layer.last_mask.sum(0)
        assert torch.equal(layer.statistics.unit_kept, kept)
        layer.reset_statistics()
    with torch.inference_mode():
        layer(torch.ones(3, 5))
        layer(torch.ones(3, 7))
    layer(torch.ones(3, 7))  # a mask that is counted by another kernel
    assert layer.statistics.num_calls == 3


@pytest.mark.parametrize("rows", [4, 600])
def test_passes_without_data_leave_nothing(rows):
    layer = tdi.Dropout(0.5)
    assert layer(torch.ones(rows, 64, device="meta")).is_meta
    with FakeTensorMode():
        layer(torch.ones(rows, 64))
    assert layer.last_mask is None and layer.fingerprint is None
    assert layer.statistics.num_calls == 0
    layer(torch.ones(rows, 64))
    assert int(layer.statistics.num_kept) == int(layer.last_mask.sum())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_what_is_traced_is_not_counted(mode):
    layer = tdi.Dropout(0.5)
    layer(torch.ones(6, 8))
    before = layer.statistics.unit_kept
    traced = make_fx(layer, tracing_mode=mode)(torch.ones(6, 8))
    traced(torch.ones(6, 8))
    assert layer.statistics.num_calls == 1
    assert torch.equal(layer.statistics.unit_kept, before)


def test_subclasses_of_tensors_stay_out_of_the_statistics():
    class Mine(torch.Tensor):
        pass

    layer = tdi.Dropout(0.5)
    assert type(layer(torch.ones(6, 8).as_subclass(Mine))) is Mine
    first = layer.last_mask
    assert type(first) is torch.Tensor
    assert type(layer(torch.ones(6, 8))) is torch.Tensor
    kept = first.sum(0) + layer.last_mask.sum(0)
    assert type(layer.statistics.unit_kept) is torch.Tensor
    assert torch.equal(layer.statistics.unit_kept, kept)


@pytest.mark.parametrize("rows", [1, 300])
def test_threads_share_a_layer(rows):
    layer, kept, lock = tdi.Dropout(0.5), [], threading.Lock()

    def work():
        for _ in range(50):
            count = int((layer(torch.ones(rows, 512)) != 0).sum())
            with lock:
                kept.append(count)

    layer(torch.ones(rows, 512))
    layer.reset_statistics()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = layer.statistics
    assert (found.num_calls, found.num_elements) == (200, 200 * rows * 512)
    assert int(found.num_kept) == sum(kept)


def test_statistics_are_those_of_their_moment():
    layer = tdi.Dropout(0.5)
    layer(torch.ones(6, 8))
    found = layer.statistics
    kept = found.unit_kept.clone()
    layer(torch.ones(6, 8))
    assert torch.equal(found.unit_kept, kept)


def test_masks_without_common_units_are_counted_as_a_whole():
    layer, kept = tdi.Dropout(0.5), 0
    for shape in ((6, 8), (5, 3), (64,), (7, 8), (2, 64), ()):
        layer(torch.ones(shape))
        kept += int(layer.last_mask.sum())
        assert int(layer.statistics.num_kept) == kept
    assert layer.statistics.unit_kept.numel() == 0


def test_threads_that_start_the_statistics_at_once_share_them(monkeypatch):
    both = threading.Barrier(2, timeout=10)

    def start():
        both.wait()  # neither finds those of the other
        return MaskTally()

    monkeypatch.setattr(tdi.nn, "MaskTally", start)
    layer = tdi.Dropout(0.5)
    threads = [threading.Thread(target=layer, args=(torch.ones(8),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer.statistics.num_calls == 2


def test_what_a_thread_adds_after_another_came_with_other_units_counts():
    tally = MaskTally()
    late = tally.counts_for(5, torch.device("cpu"))
    tally.counts_for(7, torch.device("cpu"))[0] += 3
    late += 1
    assert int(tally.statistics().num_kept) == 8


def test_nested_tensors_are_dropped_as_by_torch():
    x = torch.nested.nested_tensor(
        [torch.ones(2, 300), torch.ones(4, 300)],
        layout=torch.jagged,
        requires_grad=True,
    )
    layer = tdi.Dropout(0.5)
    layer(torch.ones(3))
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    assert torch.equal(y.values(), nn.Dropout(0.5)(x).values())
    y.values().sum().backward()
    assert torch.equal(x.grad.values(), y.values())
    assert layer.last_mask is None  # that of the call before is no more


def test_a_mask_without_elements_and_one_without_a_rate():
    found = MaskStatistics.of_mask(torch.ones(3, 0, dtype=torch.bool), 0.5)
    assert (found.num_calls, found.num_elements, len(found.unit_kept)) == (1, 0, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        MaskStatistics.of_mask(torch.ones(3, dtype=torch.bool), 5.0)
    with pytest.raises(TypeError, match="of booleans, got "):
        MaskStatistics.of_mask(2 * torch.ones(3), 0.5)  # twice what was kept
    with pytest.raises(TypeError, match="tensor of booleans, got list"):
        MaskStatistics.of_mask([True, False], 0.5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_dropped_channel_is_zero_whatever_was_in_it(value):
    layer = tdi.Dropout2d(0.5)
    found = layer(torch.full((4, 8, 2, 2), value))
    kept = layer.last_mask.expand_as(found)
    assert 0 < int(kept.sum()) < kept.numel()
    assert bool((found[~kept] == 0).all()) and not bool(found[kept].isfinite().any())


@pytest.mark.parametrize("name", ["convert_dropout_", "restore_dropout_"])
def test_what_is_no_model_is_told(name):
    with pytest.raises(TypeError, match=f"{name}: expected `model` .* got int"):
        getattr(tdi, name)(3)
    with (
        pytest.raises(TypeError, match=r"frozen_masks: .* nn.Module, got list"),
        tdi.frozen_masks([nn.Dropout()]),
    ):
        pass
