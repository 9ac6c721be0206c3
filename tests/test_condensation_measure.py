"""Condensation while a model trains, against the functions called by hand."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation as cd
from torch_dropout_ir.analysis import Image
from torch_dropout_ir.analysis.measures import Condensation
from torch_dropout_ir.analysis.measures.start import Start
from torch_dropout_ir.analysis.snapshot import Snapshot


def test_numbers_against_the_state_and_the_start():
    net = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 2))
    measure = Condensation()
    first = measure(Snapshot(net, 0, ()))
    start = cd.input_weights(net[0]).detach().clone()
    assert first["condensation/movement/0"] == 0.0
    assert first["condensation/cosine_to_start/0"] == pytest.approx(1.0)
    with torch.no_grad():
        net[0].weight.add_(torch.randn(30, 3))
        net[0].weight[4] = net[0].bias[4] = 0.0
    records = measure(Snapshot(net, 1, ()))
    weights = cd.input_weights(net[0]).detach()
    found, moved = cd.effective_neurons(weights), cd.movement(weights, start)
    assert records["condensation/effective_neurons/0"] == found.count
    assert records["condensation/effective_ratio/0"] == found.ratio
    assert records["condensation/dead_neurons/0"] == 1
    assert records["condensation/movement/0"] == moved.relative > 0.1
    mean = float(moved.cosines.mean())
    assert records["condensation/cosine_to_start/0"] == pytest.approx(mean)
    counts = records["condensation/cosines/0"].counts
    assert torch.equal(counts, cd.cosine_statistics(weights).counts)


def test_neurons_that_are_not_finite_are_no_dead_ones_without_a_word():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with tdi.attach_analysis(net, log_dir=False) as analysis:
        analysis.measure()
        with torch.no_grad():
            net[0].weight[:, 0] = torch.nan
        analysis.measure()
        assert analysis.notes["condensation/dead_neurons/0"].startswith("4 of them")
        for tag in ("effective_ratio", "movement", "cosine_to_start"):
            assert "nan at step 0" in analysis.absent[f"condensation/{tag}/0"]
        with torch.no_grad():
            net[0].weight[:, 0] = 1.0
        analysis.measure()
        assert not analysis.notes["condensation/dead_neurons/0"]
        assert "condensation/movement/0" not in analysis.absent


def test_orientations_and_amplitudes_are_drawn_where_they_are():
    """Two weights: the angle is the column, the amplitude the height."""
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
        net[2].weight.copy_(torch.tensor([[2.0, -1.0, 0.2]]))
    measure = Condensation()
    snapshot = Snapshot(net, 0, ())
    image = measure(snapshot)["condensation/orientation_amplitude/0"]
    assert isinstance(image, Image)
    rows, columns = image.values.shape
    half = rows // 2
    assert (image.values[:half] >= 0).all() and (image.values[half:] <= 0).all()
    expected = set()
    sizes = cd.amplitudes(cd.input_weights(net[0]), net[2].weight).tolist()
    for angle, size in zip((0.0, np.pi / 2, -3 * np.pi / 4), sizes, strict=True):
        height = min(half - 1, int(size / max(sizes) * half))
        expected.add((half - 1 - height, int((angle / np.pi + 1) / 2 * columns)))
    drawn = image.values[:half].nonzero().tolist()
    assert {tuple(place) for place in drawn} == expected
    torch.testing.assert_close(image.values[:half], -image.values[half:].flip(0))
    note = snapshot.notes["condensation/orientation_amplitude/0"]
    assert "outgoing weights, of `2`" in note
    with torch.no_grad():
        net[2].weight.mul_(torch.tensor([[0.0, 1.0, 1.0]]))
    later = measure(snapshot)["condensation/orientation_amplitude/0"].values
    assert later[: half - 1, columns // 2].sum() == 0, "outgoing weights are stale"
    torch.testing.assert_close(later[half:], image.values[half:])


def test_every_kind_of_layer_has_its_records():
    net = nn.ModuleDict({
        "embed": nn.Embedding(6, 4),
        "attention": nn.MultiheadAttention(4, 2),
        "mix": nn.LSTM(4, 3),
    })
    snapshot = Snapshot(net, 0, ())
    records = Condensation()(snapshot)
    note = snapshot.notes["condensation/orientation_amplitude/embed"]
    assert "input weights alone" in note
    for name in ("embed", "attention:query", "attention.out_proj", "mix:forget"):
        assert f"condensation/effective_ratio/{name}" in records
        assert f"condensation/orientation_amplitude/{name}" in records


def test_one_measurement_is_bounded_and_the_next_goes_on():
    net = nn.Sequential(*(nn.Linear(20, 20) for _ in range(5)), nn.Linear(20, 2000))
    operations = 6.0 * 20**2 * (21 + 16)
    measure = Condensation(max_operations=2.5 * operations)
    seen = []
    for step in range(3):
        snapshot = Snapshot(net, step, ())
        records = measure(snapshot)
        stem = "condensation/effective_ratio/"
        seen.append([t.removeprefix(stem) for t in records if t.startswith(stem)])
        assert "beyond" in snapshot.absent["condensation/effective_neurons/5"]
    assert seen == [["0", "1"], ["2", "3"], ["4", "0"]]


def test_wide_layers_are_measured_in_a_run():
    net = nn.Sequential(nn.Linear(4, 6000), nn.ReLU(), nn.Dropout(), nn.Linear(6000, 2))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with tdi.attach_analysis(
        net, log_dir=False, every=1, measures=[Condensation()]
    ) as analysis:
        net(torch.randn(3, 4)).sum().backward()
        sgd.step()
    assert 2 < analysis.latest["condensation/effective_neurons/0"] < 6000
    assert not analysis.absent


def test_a_layer_that_starts_at_zero_is_measured_without_its_start():
    """As the second factor of a low-rank adapter does."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    nn.init.zeros_(net[1].weight)
    measure = Condensation()
    first = measure(Snapshot(net, 0, ()))
    assert first["condensation/dead_neurons/1"] == 5
    assert "condensation/movement/0" in first
    nn.init.eye_(net[1].weight)
    then = measure(Snapshot(net, 1, ()))
    assert then["condensation/effective_neurons/1"] == 4
    relative = {"condensation/movement/1", "condensation/cosine_to_start/1"}
    assert not relative & (first.keys() | then.keys())


def test_neurons_that_start_at_zero_have_not_turned():
    """As the padding of an embedding, which stays zero."""
    net, measure = nn.Embedding(5, 3, padding_idx=2), Condensation()
    tag = "condensation/cosine_to_start/"
    assert measure(Snapshot(net, 0, ()))[tag] == pytest.approx(1.0)
    with torch.no_grad():
        net.weight[0] *= -2
        net.weight[2] = 1.0
    assert measure(Snapshot(net, 1, ()))[tag] == pytest.approx(0.5)


def test_its_thresholds_are_those_that_are_given():
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [0, -0.01]]))
    for options, count, dead in (
        ({}, 4, 0),
        ({"threshold": 0.7}, 3, 0),  # the first two are parallel
        ({"min_amplitude": 0.1}, 3, 1),
    ):
        found = Condensation(**options)(Snapshot(net, 0, ()))
        assert found["condensation/effective_neurons/0"] == count
        assert found["condensation/dead_neurons/0"] == dead
    for bad in ({"threshold": 1.5}, {"min_amplitude": 2.0}):
        with pytest.raises(ValueError, match=r"Condensation: expected .* 1\], got"):
            Condensation(**bad)


def test_a_step_under_autocast_is_measured_in_full_precision():
    net = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 2))
    expected = Condensation()(Snapshot(net, 0, ()))
    with torch.autocast("cpu", torch.bfloat16):
        found = Condensation()(Snapshot(net, 0, ()))
    for tag, record in expected.items():
        if isinstance(record, float):
            assert found[tag] == record, tag
        elif isinstance(record, Image):
            assert torch.equal(found[tag].values, record.values), tag


def test_a_layer_that_is_replaced_by_a_wider_one_starts_anew():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    measure = Condensation()
    measure(Snapshot(net, 0, ()))
    net[0], net[2] = nn.Linear(3, 6), nn.Linear(6, 2)
    found = measure(Snapshot(net, 1, ()))
    assert found["condensation/movement/0"] == 0.0


def test_neurons_that_are_not_finite_are_nowhere_in_the_picture():
    net = nn.Sequential(nn.Linear(2, 40, bias=False), nn.ReLU(), nn.Linear(40, 1))
    with torch.no_grad():
        net[0].weight[:32] = torch.tensor([1.0, 0.0])
        net[0].weight[32:] = torch.tensor([[0.0, 1.0]])
        net[2].weight.fill_(1.0)
        net[2].weight[0, 39] = torch.inf
    image = Condensation()(Snapshot(net, 0, ()))["condensation/orientation_amplitude/0"]
    now = image.values[: image.values.shape[0] // 2]
    shades = sorted(now[now > 0].tolist())
    # Of 32 and 7 neurons, logarithmically from the shade of a single one.
    faint = 0.35 + 0.65 * np.log1p(7) / np.log1p(32)
    assert shades == pytest.approx([faint, 1.0])


def test_after_a_restart_the_start_is_the_first_one():
    def attached():
        return tdi.attach_analysis(net, log_dir=False, measures=[Condensation()])

    net = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2))
    with attached() as first:
        first.measure()
        state = io.BytesIO()
        torch.save(first.state_dict(), state)
        torch.nn.utils.vector_to_parameters(
            1.1 * nn.utils.parameters_to_vector(net.parameters()), net.parameters()
        )
        expected = first.measure()
    with attached() as second:
        state.seek(0)
        second.load_state_dict(torch.load(state, weights_only=True))
        found = second.measure()
    tags = [t for t in expected if t.startswith("condensation")]
    assert {t: found[t] for t in tags} == {t: expected[t] for t in tags}
    assert found["condensation/movement/0"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(("neurons", "share"), [(300, 2), (1000, 4)])
def test_large_layers_are_compared_with_a_start_in_less_memory(neurons, share):
    torch.manual_seed(0)
    weights = torch.randn(neurons, 400)
    weights *= torch.logspace(-9, 3, neurons)[:, None]
    weights[7] = 0
    start = Start(weights, size := weights.norm(dim=1))
    assert start.nbytes == weights.nbytes // share
    assert start.relative_distance(weights) == 0.0
    near = 1e-6 if share == 2 else 2e-5
    assert start.mean_cosine(weights) == pytest.approx(1.0, abs=near)
    for away in (1e-3, 1.0):
        now = weights * (1 + away * torch.randn_like(weights))
        exact = cd.movement(now, weights)
        rel = 1e-2 if share == 2 else 6e-2
        assert start.relative_distance(now) == pytest.approx(exact.relative, rel=rel)
        mean = float(exact.cosines.sum()) / (neurons - 1)  # one has no start
        assert start.mean_cosine(now) == pytest.approx(mean, abs=near)
    plane = cd.principal_plane(now)
    apart = start.angles(plane) - cd.orientation_angles(weights, plane)
    assert bool(apart[7].isnan())
    turned = torch.remainder(apart[apart.isfinite()] + torch.pi, 2 * torch.pi)
    assert float((turned - torch.pi).abs().median()) <= 0.1 and len(turned) > 200
    gone = weights.clone()
    gone[3, 3] = float("nan")
    assert not math.isfinite(start.relative_distance(gone))
    assert not math.isfinite(Start(gone, size).mean_cosine(weights))


def test_small_layers_are_kept_as_they_are():
    weights = torch.randn(9, 400)
    start = Start(weights, weights.norm(dim=1))
    now = weights + 1e-6
    exact = cd.movement(now, weights)
    assert start.nbytes == weights.nbytes
    assert start.relative_distance(now) == pytest.approx(exact.relative, rel=1e-5)


@pytest.mark.parametrize("neurons", [5, 300, 1000])
def test_a_start_is_on_the_cpu_whatever_the_default_device(neurons):
    weights = torch.randn(neurons, 300)
    with torch.device("meta"):
        start = Start(weights, weights.norm(dim=1))
        assert start.mean_cosine(weights) == pytest.approx(1.0)
    assert {x.device.type for x in vars(start).values() if torch.is_tensor(x)} == {
        "cpu"
    }
