"""The paper's figures: what their scripts write by hand, and one in a reduced form."""

import json
import math
import statistics
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import torch_dropout_ir as tdi


@pytest.mark.parametrize(("activation", "inputs"), [("tanh", 1), ("relu", 3)])
def test_the_gradient_written_by_hand_is_autograds(script, activation, inputs):
    two_layer = script("two_layer")
    start = torch.randn(inputs + 2, 5, 20)
    dropped, regularized = [(slice(1, 3), 0.3)], [(slice(3, 5), 0.1)]
    nets = two_layer.TwoLayer(start, activation, dropped, regularized)
    x, y = torch.randn(7, inputs), torch.randn(7)
    for rows in (slice(None), slice(2), slice(None)):  # a mini-batch in between
        torch.manual_seed(1)
        nets.gradient(x[rows], y[rows])
        torch.manual_seed(1)
        noise = tdi.dropout(torch.ones(len(x[rows]), 2, 20), 0.3)
        parameters = list(nets.parameters())
        loss = torch.zeros(())
        for run, net in enumerate(nets.networks):
            h = net[1](net[0](x[rows]))
            if run in (1, 2):
                read = net[3](h * noise[:, run - 1])
            else:
                read = net[3](h)
            loss = loss + tdi.half_squared_error(read, y[rows, None])
            if run >= 3:
                loss = loss + tdi.regularizers.last_layer(
                    h, net[3].weight, 0.1, loss=tdi.half_squared_error
                )
        expected = torch.autograd.grad(loss, parameters)
        found = [p.grad for p in parameters]
        torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-5)


def test_networks_and_state_are_one(script):
    two_layer = script("two_layer")
    nets = two_layer.TwoLayer(torch.randn(4, 3, 6))
    x, y = torch.randn(5, 2), torch.randn(5)
    optimizer = torch.optim.Adam(nets.parameters())
    before = nets.state.clone()
    nets.gradient(x, y)
    optimizer.step()
    assert bool((nets.state != before).all())
    each = torch.cat([net.eval()(x) for net in nets.networks], 1)
    torch.testing.assert_close(nets(x), each)
    risks = [tdi.half_squared_error(each[:, [run]], y[:, None]) for run in range(3)]
    torch.testing.assert_close(nets.risk(x, y), torch.stack(risks))
    other = two_layer.TwoLayer(torch.randn(4, 3, 6))
    other.load_state_dict(nets.state_dict())
    torch.testing.assert_close(other.state, nets.state)


def test_fig_4_reduced_and_resumed(script, tmp_path, capsys):
    """A quarter of the steps: R_1 has condensed, the run without it has not."""
    script("fig04_condensation").main(["--quick", "--out", str(tmp_path)])
    first = capsys.readouterr().out
    record = json.loads((tmp_path / "fig04-quick" / "fig04.json").read_text())
    (numbers,) = record["numbers"]["seeds"]
    assert numbers["without"]["share"] < 0.2
    assert numbers["R1"]["share"] > 0.9
    assert numbers["dropout"]["share"] > 2 * numbers["without"]["share"]
    assert numbers["R1"]["merged_neurons"] <= 12
    assert numbers["R1"]["merged_R_S_ratio"] <= 1.1
    picture = Image.open(tmp_path / "fig04-quick" / "fig04.png").convert("RGB")
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100
    assert list(tmp_path.glob("fig04-quick/tensorboard/dropout-seed0/*tfevents*"))
    script("fig04_condensation").main(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out == first  # nothing was trained again


def test_the_gradient_of_three_layers_is_autograds_and_its_start_one(script):
    nets = script("fig04b_three_layers").ThreeLayer(7, 0.3)
    first, second = (list(net.parameters()) for net in nets.networks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    x, y = torch.randn(5, 1), torch.randn(5)
    torch.manual_seed(1)
    nets.gradient(x, y)
    found = [p.grad.clone() for p in nets.parameters()]
    torch.manual_seed(1)
    noise = [tdi.dropout(torch.ones(5, 7), 0.3) for _ in range(2)]
    expected = []
    for net, masks in zip(nets.networks, ([1, 1], noise), strict=True):
        h = torch.tanh(net[0](x)) * masks[0]
        h = torch.tanh(net[3](h)) * masks[1]
        loss = tdi.half_squared_error(net[6](h), y[:, None])
        expected += torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(found, expected)
    torch.optim.SGD(nets.parameters(), lr=1.0).step()
    for both, one in zip(nets.tensors.values(), second, strict=True):
        assert both[1].equal(one.detach())  # a step is seen by the next gradient


def test_the_fullest_directions_hold_what_lies_near_them_on_the_circle(script):
    share = script("fig04b_three_layers").share_near_fullest
    pi = torch.pi
    close = torch.tensor([0.0, 0.05, -0.05, pi - 0.04, -pi + 0.04])
    assert share(close, count=2) == 1  # across the cut at pi
    assert share(close, count=1) == pytest.approx(3 / 5)
    assert share(torch.linspace(-pi, pi, 64)[:-1], count=4) == pytest.approx(12 / 63)


@pytest.mark.parametrize("loss", ["R_S", "R_drop", "L1"])
def test_the_gradient_of_fig_2_is_autograds(script, loss):
    fig02 = script("fig02_modified_loss")
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Dropout(0.3),
        torch.nn.Linear(9, 4),
    ).double()  # fmt: skip
    x = torch.randn(7, 6, dtype=torch.float64)
    x[:, 4:] = 0  # the inputs that are not given
    y = torch.randn(7, 4, dtype=torch.float64)
    scratch = [torch.empty(7, 9, dtype=torch.float64) for _ in range(3)]
    for _ in range(2):  # the second into the gradients of the first
        torch.manual_seed(1)
        with torch.no_grad():
            fig02.gradient(net, x[:, :4].contiguous(), y, loss, 0.3, scratch)
        found = [p.grad.clone() for p in net.parameters()]
    torch.manual_seed(1)
    noise = tdi.dropout(torch.ones(7, 9, dtype=torch.float64), 0.3)
    h = net[:2](x)
    value = tdi.half_squared_error(net[3](h * noise if loss == "R_drop" else h), y)
    if loss == "L1":
        value = value + tdi.regularizers.last_layer(
            h, net[3].weight, 0.3, loss=tdi.half_squared_error
        )
    expected = torch.autograd.grad(value, list(net.parameters()))
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("faces", [(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0)])
def test_the_perturbation_of_theorem_1(script, monkeypatch, tmp_path, faces):
    arguments = ["thm1_kinks.py", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    thm1 = script("thm1_kinks")
    net = thm1.Net(2).double().eval()
    with torch.no_grad():
        net.hidden.weight[:, 0] = 2 * torch.tensor(faces)
        net.hidden.bias.copy_(-net.hidden.weight[:, 0] * torch.tensor([0.2, 0.3]))
        net.last.weight.copy_(torch.tensor([[1.5, 0.5]]))
    x = torch.tensor([[-2.0], [-1.0], [0.0], [0.6], [1.0], [3.0]], dtype=torch.float64)
    assert thm1.pairs(net, x) == [(0, 1)]
    new = thm1.perturbed(net, x, (0, 1))
    torch.testing.assert_close(new(x), net(x))
    assert bool(thm1.r1(new, x) < thm1.r1(net, x))
    kinks, _ = new.kinks()
    assert bool(((kinks > 0) & (kinks < 0.6)).all())


def test_whitened_images_are_uncorrelated_and_tests_are_mapped_alike(
    script, monkeypatch
):
    four_losses = script("four_losses")
    torch.manual_seed(0)
    mixed = torch.randn(60, 12) @ torch.randn(12, 12) + 3
    labels = torch.arange(60) % 10
    pair = (mixed, labels), (mixed[:7], labels[:7])
    monkeypatch.setattr(four_losses, "mnist", lambda root, samples: pair)
    (x, y), (test_x, _) = four_losses.images("", 60, 5)
    torch.testing.assert_close(x.T @ x / 60, torch.eye(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(x[:7], test_x)
    # The leading ones: numpy's eigenvectors of the covariance, up to their signs.
    sizes, axes = np.linalg.eigh(np.cov(mixed.double().numpy().T, bias=True))
    centred = (mixed - mixed.mean(0)).double().numpy()
    expected = centred @ axes[:, ::-1][:, :5] / sizes[::-1][:5] ** 0.5
    np.testing.assert_allclose(x.abs(), abs(expected), atol=1e-3)
    assert y.argmax(1).equal(labels)
    assert y.sum(1).eq(1).all()
    (plain, _), _ = four_losses.images("", 60, None)
    assert plain.equal(mixed)


def test_claims_of_the_samples_needed_read_the_right_cells(script):
    fig08 = script("fig08_samples_needed")
    errors = torch.ones(1, len(fig08.SAMPLES), len(fig08.KEEP))
    errors[0, fig08.SAMPLES.index(7) :, fig08.MAIN] = 1e-4
    errors[0, -1, 0] = 0.02
    enough, fall, without = fig08.claims(list(fig08.SAMPLES), errors)
    assert enough.values == [7]
    assert fall.values == pytest.approx([1e4])
    assert without.values == pytest.approx([0.02])


def test_each_keep_prob_of_fig_8_has_its_column_and_each_trial_its_start(
    script, monkeypatch
):
    fig08 = script("fig08_samples_needed")
    trained = []
    keep = lambda exp, arm, seed, nets, data, steps, **how: trained.append(nets)  # noqa: E731
    monkeypatch.setattr(fig08, "train", keep)
    torch.manual_seed(0)
    found = fig08.compute(None, "7", 0, (30, 0, 0.0))
    (nets,) = trained
    rates = torch.tensor([net[2].p for net in nets.networks]).view(fig08.TRIALS, -1)
    expected = 1 - torch.tensor(fig08.KEEP)
    torch.testing.assert_close(rates, expected.expand(fig08.TRIALS, -1))
    with torch.no_grad():
        for trial in range(fig08.TRIALS):
            net = nets.networks[trial * len(fig08.KEEP) + 1].eval()
            error = (net(fig08.LINE)[:, 0] - fig08.target(fig08.LINE)).square().mean()
            torch.testing.assert_close(found["test"][1, trial], error)
    assert not torch.allclose(*found["test"][1])


def test_arrival_is_the_first_low_median_and_not_the_first_low_value(script):
    fig09 = script("fig09_small_start")
    torch.manual_seed(0)
    curve = 10 ** (torch.linspace(-3, -7, 200) + 2 * torch.randn(200))
    rows = torch.stack((50.0 * torch.arange(200), torch.ones(200), curve), 1)
    medians = [
        statistics.median_low(curve[k - fig09.WINDOW + 1 : k + 1].tolist())
        for k in range(fig09.WINDOW - 1, 200)
    ]
    torch.testing.assert_close(fig09.smooth(curve).tolist(), medians)
    low = next(k for k, value in enumerate(medians) if value < fig09.LEVEL)
    assert fig09.arrival(rows, 2) == 50 * (low + fig09.WINDOW - 1)
    assert curve[: low + fig09.WINDOW - 1].min() < fig09.LEVEL
    assert fig09.arrival(rows, 1) is None


def test_a_run_that_does_not_arrive_bounds_the_ratio(script):
    fig09 = script("fig09_small_start")
    assert fig09.ratio(900, 100, (1000, 2000)) == (9, "")
    assert fig09.ratio(None, 100, (1000, 2000)) == (10, "at least")
    assert fig09.ratio(900, None, (1000, 2000)) == (0.45, "at most")
    value, bound = fig09.ratio(None, None, (1000, 2000))
    assert math.isnan(value) and bound == "none"
    one = {
        arm: {"steps": steps, "share": 1.0}
        for arm, steps in zip(fig09.SMALL, (10, 20, 30, 600, None, None), strict=True)
    }
    one |= {arm: {"steps": 100, "share": 0.95} for arm in ("dropout", "R1")}
    other = {**one, "gamma1.4": {"steps": None, "share": 1.0}}
    assert fig09.smallest([one]) == "gamma1.4"
    assert fig09.smallest([one, other]) == "gamma1.3"
    runs = {"small": 1000, "normal": 2000}
    *condensed, noisy, _ = fig09.claims([one], runs)
    assert [claim.verdict for claim in condensed] == ["reproduced"] * 2
    assert noisy.values == [6] and noisy.verdict == "reproduced"
    one["dropout"]["steps"] = None
    *_, late, _ = fig09.claims([one], runs)
    assert late.values == [0.3] and late.verdict == "not reproduced"
    assert late.ours == "0.3 ± 0x, at most"
    never = {arm: {"steps": None, "share": 1.0} for arm in one}
    assert {c.verdict for c in fig09.claims([never], runs)} >= {"not reproduced"}


def test_a_small_network_is_a_line_off_which_biases_grow_with_the_cube_of_w(script):
    fig09 = script("fig09_small_start")
    x = torch.linspace(-12, 12, 15, dtype=torch.float64)  # odd to the last bit
    y = torch.tanh(x - 6) + torch.tanh(x + 6)
    torch.testing.assert_close(y.float(), fig09.Y)
    w, b = 5e-3, 1e-4
    weights = torch.full((2,), w, dtype=torch.float64)
    biases = torch.tensor([b, -b], dtype=torch.float64, requires_grad=True)
    h = torch.tanh(weights * x[:, None] + biases)
    read = h.detach().sum(1)
    a = (read @ y) / (read @ read)  # the best for both
    residual = a * h.sum(1) - y
    risk = residual.square().mean() / 2
    assert math.isclose(float(risk.detach()), fig09.straight_line(), rel_tol=1e-2)
    cubic = float((residual.detach() * x**3).mean())
    expected = 2 * a * w**3 * biases.detach() * cubic
    assert cubic < 0
    (found,) = torch.autograd.grad(risk, biases)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_the_width_of_a_slice_ends_at_the_level_on_both_sides(script):
    width = script("fig12_flatness").width
    # A V of slope 2 to the left and 1 to the right, 0.5 between points.
    line = [4.0, 3.0, 2.0, 1.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert width(line, 1.25, 0.5) == pytest.approx(1.25 / 2 + 1.25)
    assert width(line, 2.5, 0.5) == pytest.approx(1.25 + 2.0)  # the right one: its end
    assert width(line, 0.0, 0.5) == 0.0
    assert width(line, -1.0, 0.5) == 0.0
    far = [0.0, 9.0, 0.0, 9.0, 0.0]  # other valleys do not count
    assert width(far, 3.0, 1.0) == pytest.approx(2 / 3)


def test_claims_of_fig_12_compare_dropout_with_its_absence(script):
    fig12 = script("fig12_flatness")
    found = {
        "fnn-without": [{"accuracy": 94.0, "width": 1.0}],
        "fnn-dropout": [{"accuracy": 94.5, "width": 1.2}],
    }
    accuracy, width = fig12.claims_of("fnn", found)
    assert accuracy.values == pytest.approx([0.5])
    assert width.values == pytest.approx([1.2])
    assert (accuracy.verdict, width.verdict) == (
        "reproduced",
        "reproduced in direction",
    )


def test_the_width_of_a_network_is_the_mean_over_directions(script):
    fig12 = script("fig12_flatness")
    alphas = torch.linspace(-1, 1, 5)
    slices = [[4.0, 2.0, 0.0, 2.0, 4.0], [8.0, 4.0, 0.0, 4.0, 8.0], [9.0] * 5]
    assert fig12.mean_width(slices, 2.0, alphas) == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_spike_on_the_way_is_no_leaving_of_the_minimum(script):
    fig05 = script("fig05_leaving_the_minimum")
    rows = torch.full((3, 10), 1e-6)  # step, then R_S, R_1 and share of each arm
    rows[:, 3::3] = torch.tensor([0.1, 0.1, 1.0])
    rows[1, 1::3] = 0.1  # Adam oscillates on all three
    rows[-1, 1::3] = torch.tensor([1e-7, 1e-7, 3e-6])
    _, stays, spread, leaves, condenses, _ = fig05.claims_of([rows])
    assert stays.values == pytest.approx([1]) and leaves.values == pytest.approx([30])
    assert (stays.verdict, leaves.verdict) == ("not reproduced", "reproduced")
    assert (spread.values, condenses.values) == (pytest.approx([0.1]), [1.0])
