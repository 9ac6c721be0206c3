"""Figures of the paper on convolutional networks: what their scripts write by hand."""

import itertools

import numpy as np
import pytest
import torch


def test_the_ratio_of_fig_3_and_the_statistics_that_its_test_takes(script):
    fig03 = script("fig03_learning_rate")
    net = fig03.vgg9(2, 8, 0.0)  # without masks each mean is one number
    kinds = [type(module).__name__ for module in net]
    assert [kinds.count(k) for k in ("Conv2d", "Linear", "Dropout")] == [6, 3, 2]
    x, y = 3 + torch.randn(40, 3, 8, 8), torch.arange(40) % 10
    loss = torch.nn.functional.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    squared = sum(g.square().sum() for g in grads)
    found = fig03.measured(net, (x, y), (x, y), 2)
    assert found["R_drop"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["squared_gradient"] == pytest.approx(squared.item(), rel=1e-4)
    assert found["ratio"] == pytest.approx((loss / squared).item(), rel=1e-4)
    maps = net[0](x).detach()
    torch.testing.assert_close(net[1].running_mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, maps.var((0, 2, 3)))


def test_networks_of_fig_3_are_trained_for_one_time(script, monkeypatch, tmp_path):
    """And R_regu at lambda = 0 is R_drop at the small rate, to the last step."""
    fig03, frame = script("fig03_learning_rate"), script("experiment")
    pair = torch.randn(20, 3, 8, 8), torch.arange(20) % 10
    monkeypatch.setattr(fig03, "cifar", lambda root, classes, train: (pair, pair))
    arguments = ["--quick", "--out", str(tmp_path)]
    exp = frame.Experiment("A title.\n", "fig03", arguments=arguments)
    arms = ("drop-0.5", "drop-1.0", "regu-0.0", "regu-1.0")
    cells = exp.cells(arms, lambda arm, seed: fig03.compute(exp, arm, seed, 0.5))
    small, large, none, penalized = (cells[arm][0] for arm in arms)
    assert (small["steps"], large["steps"], none["steps"]) == (12, 6, 12)
    assert none == small
    assert penalized["squared_gradient"] < small["squared_gradient"]


def test_claims_of_fig_3_compare_eps_with_the_lambda_of_its_size(script):
    fig03 = script("fig03_learning_rate")

    def cell(accuracy, ratio):
        return [{"accuracy": accuracy, "ratio": ratio}]

    found = {
        "drop-0.1": cell(30, 2.0), "drop-0.2": cell(40, 4.0), "drop-0.4": cell(20, 8.0),
        "regu-0.1": cell(39, 3.0), "regu-0.2": cell(35, 4.0), "regu-0.4": cell(10, 2.0),
        "drop-0.05": cell(25, 1.0),
    }  # fmt: skip
    place, ratio, near = fig03.claims_of(found, (0.1, 0.2, 0.4), 0.05, range(1))
    assert place.values == pytest.approx([2.0])
    assert place.verdict == "reproduced"
    assert ratio.values == pytest.approx([1.5])  # of 1.5, 1 and 4
    assert near.values == pytest.approx([200 / 3])  # the last is nearer to 1 than to 8


def test_the_network_of_fig_7c_is_resnet_18_with_dropout_behind_each_block(script):
    fig07c = script("fig07c_kernels_of_resnet")
    net = fig07c.resnet18(64, 0.5)
    # With a stem of 3 x 3 and ten classes: a number that many know.
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    kinds = [type(module).__name__ for module in net]
    pairs = [*itertools.pairwise(kinds)]
    assert pairs.count(("BasicBlock", "Dropout")) == kinds.count("BasicBlock") == 8
    counts = [len(fig07c.kernels(net, name)) for name in ("conv2-1", "conv3-1")]
    assert counts == [8192, 32768]
    small = fig07c.resnet18(4, 0.5)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_the_cover_taken_in_order_is_the_obvious_one(script):
    fig07c = script("fig07c_kernels_of_resnet")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(60, 3, generator=generator, dtype=torch.float64)
        kept = []
        for row in rows.numpy():
            cosines = [k @ row / np.linalg.norm(k) / np.linalg.norm(row) for k in kept]
            if not any(cosine > 0.8 for cosine in cosines):
                kept.append(row)
        assert 3 < len(kept) < 50
        assert fig07c.in_order(rows, 0.8) == pytest.approx(len(kept) / 60)


def test_an_epoch_of_fig_7c_sees_each_image_once_in_a_new_order(script):
    rows_of = script("fig07c_kernels_of_resnet").rows_of
    epochs = [
        torch.cat([rows_of(step, 10, 4, seed) for step in range(first, first + 3)])
        for first, seed in ((0, 0), (3, 0), (0, 1))
    ]
    assert all(one.sort().values.equal(torch.arange(10)) for one in epochs)
    assert len({tuple(one.tolist()) for one in epochs}) == 3


def test_claims_of_fig_7c_compare_ends_with_each_other_and_the_start(script):
    fig07c = script("fig07c_kernels_of_resnet")
    found = {
        "start": [{"in_order": {"conv3-1": 0.83}, "greedy": {"conv3-1": 0.80}}],
        "without": [{"conv3-1": [0.8, 0.9, 0.75]}],
        "dropout": [{"conv3-1": [0.8, 0.7, 0.72]}],
    }
    claims = fig07c.claims_of("conv3-1", found)
    values = [one.values[0] for one in claims]
    assert values == pytest.approx([0.83, 0.80, 0.72 / 0.75, 0.72 / 0.8])
    assert [one.verdict for one in claims] == [
        "reproduced", "reproduced", "reproduced in direction", "reproduced",
    ]  # fmt: skip
    found["dropout"][0]["conv3-1"][-1] = 0.999 * 0.75  # what another seed may do
    assert fig07c.claims_of("conv3-1", found)[2].verdict == "not reproduced"
