"""Condensation against brute force, NumPy and its invariances."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_dropout_ir import condensation as cd


@st.composite
def weight_matrices(draw, max_neurons=8):
    neurons, dims = draw(st.integers(0, max_neurons)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    weights = torch.randn(neurons, dims).double()
    for row in weights:
        if draw(st.integers(0, 4)) == 0:
            row.zero_()
    return weights


def smallest_cover_by_neurons(weights, threshold):
    """The exact minimum over subsets of neurons, by trying all."""
    alive = weights[weights.norm(dim=1) > 0].numpy()
    unit = alive / np.linalg.norm(alive, axis=1, keepdims=True)
    near = (unit @ unit.T > threshold) | np.eye(len(unit), dtype=bool)
    for size in range(len(unit) + 1):
        for chosen in itertools.combinations(range(len(unit)), size):
            if near[list(chosen)].any(0).all() if chosen else not len(unit):
                return size
    raise AssertionError


@given(weight_matrices(), st.sampled_from([0.0, 0.5, 0.95]))
def test_greedy_cover_is_a_cover_and_never_below_the_minimum(weights, threshold):
    found = cd.effective_neurons(weights, threshold)
    minimum = smallest_cover_by_neurons(weights, threshold)
    alive = int((weights.norm(dim=1) > 0).sum())
    assert minimum <= found.count <= minimum * (1 + np.log(max(1, alive)))
    assert found.num_dead == len(weights) - alive
    assert (found.labels >= 0).sum() == alive
    cosines = cd.cosine_similarity(weights)
    for cluster in range(found.count):
        members = (found.labels == cluster).nonzero().squeeze(1)
        assert len(members) > 0
        near = (cosines > threshold) | torch.eye(len(weights)).bool()
        assert bool(near[:, members].all(1).any()), "no neuron is near all members"
    sizes = torch.bincount(found.labels[found.labels >= 0])
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)


@given(weight_matrices(), st.integers(0, 100))
def test_scale_rotation_and_permutation_change_nothing(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(len(weights), 1, generator=generator).double() + 0.1
    dims = weights.shape[1]
    random = torch.randn(dims, dims, generator=generator).double()
    rotation = torch.linalg.qr(random).Q
    order = torch.randperm(len(weights), generator=generator)
    base = cd.effective_neurons(weights)
    moved = cd.effective_neurons((scale * weights @ rotation)[order])
    # Ties between equally good choices may fall another way.
    assert abs(moved.count - base.count) <= (0 if dims == 1 else 1)
    assert moved.num_dead == base.num_dead


def test_planted_directions_are_found():
    directions = cd.orientations(torch.randn(7, 50))
    copies = directions.repeat_interleave(torch.tensor([40, 30, 20, 10, 5, 2, 1]), 0)
    noisy = copies + 0.01 * torch.randn_like(copies)
    lengths = torch.rand(len(copies), 1) + 0.1
    found = cd.effective_neurons(lengths * noisy)
    assert found.count == 7
    assert torch.bincount(found.labels).tolist() == [40, 30, 20, 10, 5, 2, 1]
    assert found.ratio == pytest.approx(7 / 108)
    order = cd.cluster_order(noisy)
    assert sorted(order.tolist()) == list(range(108))
    ordered = found.labels[order]
    changes = int((ordered[1:] != ordered[:-1]).sum())
    assert changes == 6, "clusters are torn apart"


def test_random_high_dimensional_weights_do_not_condense():
    found = cd.effective_neurons(torch.randn(500, 100))
    assert found.count == 500 and found.ratio == 1.0


def test_opposite_directions_are_two():
    assert cd.effective_neurons(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).count == 2


def test_small_and_weak_neurons():
    tiny = torch.tensor([[1e-30, 0.0], [0.0, 1e-30], [1.0, 1.0]])
    assert cd.effective_neurons(tiny).count == 3
    weak = cd.effective_neurons(tiny, min_amplitude=0.1)
    assert (weak.count, weak.num_dead, weak.labels.tolist()) == (1, 2, [-1, -1, 0])
    dead = cd.effective_neurons(torch.zeros(4, 3))
    assert (dead.count, dead.num_dead) == (0, 4) and np.isnan(dead.ratio)
    assert cd.effective_neurons(torch.zeros(0, 3)).count == 0
    assert cd.cluster_order(torch.zeros(4, 3)).tolist() == [0, 1, 2, 3]
    assert cd.cluster_order(torch.zeros(0, 3)).tolist() == []
    half = torch.tensor([[300.0, 0.0], [0.0, 300.0]], dtype=torch.float16)
    assert cd.effective_neurons(half).count == 2


def test_blocks_change_nothing(monkeypatch):
    weights = torch.randn(100, 2)
    whole = cd.effective_neurons(weights)
    monkeypatch.setattr(cd.cover, "_BLOCK_BYTES", 1000)
    assert torch.equal(cd.effective_neurons(weights).labels, whole.labels)


def test_the_kernel_view_gives_the_papers_ratio_of_random_kernels():
    """8192 and 32768 random 3 x 3 kernels cover the sphere to .95 and .83."""
    ratio = cd.effective_neurons(torch.randn(8192, 9)).ratio
    assert ratio == pytest.approx(0.95, abs=0.02)


def test_amplitudes_and_cosines_by_hand():
    weights = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert cd.amplitudes(weights).tolist() == [5.0, 2.0]
    outgoing = torch.tensor([[3.0, 0.0], [4.0, -1.0]])
    assert cd.amplitudes(weights, outgoing).tolist() == [25.0, 2.0]
    torch.testing.assert_close(
        cd.cosine_similarity(weights, torch.tensor([[1.0, 0.0]])),
        torch.tensor([[0.6], [0.0]]),
    )


def test_bad_input():
    with pytest.raises(ValueError, match="neurons, d"):
        cd.effective_neurons(torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        cd.effective_neurons(torch.tensor([[float("nan"), 1.0]]))
    for bad in ({"threshold": 2.0}, {"min_amplitude": -1.0}):
        with pytest.raises(ValueError, match="threshold"):
            cd.effective_neurons(torch.ones(2, 2), **bad)
    with pytest.raises(ValueError, match="outgoing"):
        cd.amplitudes(torch.ones(2, 2), torch.ones(3))


def test_neurons_covered_already_can_be_centres():
    """Chvatal's greedy finds the two centres of a double star; the bound holds."""

    def cone(axis, count, degrees):
        basis = torch.linalg.qr(torch.cat((axis[:, None], torch.eye(5).double()), 1)).Q
        turn = torch.linspace(0, 2 * np.pi, count + 1)[:-1].double()
        ring = (
            torch.cos(turn)[:, None] * basis[:, 1]
            + torch.sin(turn)[:, None] * basis[:, 2]
        )
        angle = torch.tensor(np.deg2rad(degrees))
        return torch.cos(angle) * axis + torch.sin(angle) * ring

    first = torch.eye(5).double()[0]
    second = torch.tensor([np.cos(np.deg2rad(15)), np.sin(np.deg2rad(15)), 0, 0, 0])
    weights = torch.cat((
        first[None],
        second[None],
        cone(first, 30, 17),
        cone(second, 32, 17),
    ))
    found = cd.effective_neurons(weights)
    assert found.count <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_order_in_half_precision(dtype):
    assert sorted(cd.cluster_order(torch.randn(9, 4).to(dtype)).tolist()) == list(
        range(9)
    )
