"""What models of other packages do, imitated: outputs, inputs and ways to call them."""

import pytest
import torch
import torch.nn.functional as F
from torch import distributions, nn

import torch_dropout_ir as tdi


class Gaussian(nn.Module):
    """A network that returns a distribution, as policies do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3))
        self.mean, self.width = nn.Linear(16, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        h = self.body(x)
        around = distributions.Normal(self.mean(h), self.width.exp())
        return distributions.Independent(around, 1), h.sum()


def test_a_distribution_among_the_outputs_is_followed_through_its_methods():
    torch.manual_seed(0)
    net, x, y = Gaussian(), torch.randn(8, 4), torch.randn(8, 3)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        (-net(x)[0].log_prob(y).mean()).backward()
        sgd.step()
    found = analysis.latest
    with torch.no_grad():
        h, weight = net.body.eval()(x), net.mean.weight
        clean = 0.5 * (net.mean(h) - y).square().sum(1).mean()
        clean += 1.5 * torch.log(torch.tensor(2 * torch.pi))  # of width 1
        # Quadratic in what is dropped, so that the second order is all there is.
        r1 = 0.5 * 0.3 / 0.7 * (h.square() @ weight.square().T).sum(1).mean()
    torch.testing.assert_close(found["loss/R_S"], float(clean), rtol=1e-5, atol=0)
    error = found["regularizer/R1_standard_error"]
    assert abs(found["regularizer/R1"] - float(r1)) < 3 * error < 0.5 * float(r1)


def test_a_given_loss_reads_the_distribution():
    torch.manual_seed(0)
    net, x, y = Gaussian(), torch.randn(8, 4), torch.randn(8, 3)

    def nll(outputs, y):
        return -outputs[0].log_prob(y).mean()

    exact = tdi.regularizers.gauss_newton(net, (x, y), nll, num_samples=None)
    with torch.no_grad():
        h = net.body.eval()(x)
        r1 = 0.5 * 0.3 / 0.7 * (h.square() @ net.mean.weight.square().T).sum(1).mean()
    torch.testing.assert_close(exact.value, r1)


class Features(nn.Module):
    """A part that takes a dictionary, and adds to it what it finds."""

    def __init__(self):
        super().__init__()
        self.part, self.drop = nn.Linear(4, 8), nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, features):
        assert "hidden" not in features
        features["hidden"] = self.drop(self.part(features["x"]))
        features["logits"] = self.head(features["hidden"])
        return features


def test_a_dictionary_that_the_model_writes_on_is_given_as_it_was():
    torch.manual_seed(0)
    net, x, y = Features(), torch.randn(8, 4), torch.randint(3, (8,))
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        features = {"x": x}
        F.cross_entropy(net(features)["logits"], y).backward()
        mine = dict(features)
        sgd.step()
    assert features.keys() == mine.keys()
    assert all(features[name] is mine[name] for name in mine)
    assert not analysis.absent
    clean = F.cross_entropy(net.eval()({"x": x})["logits"], y)
    torch.testing.assert_close(analysis.latest["loss/R_S"], clean.item())


class Graph:
    """Data as an object, on whose attributes models write."""

    def __init__(self, x):
        self.x, self.more = x, {"edges": None}


class OfGraphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.drop = nn.Linear(4, 4), nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)

    def forward(self, graph):
        graph.x = self.drop(self.part(graph.x))
        graph.more["logits"] = self.head(graph.x)
        return graph.more["logits"]


def graph_step(net, graph, y, before_the_step):
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.mse_loss(net(graph), y).backward()
        before_the_step()
        mine = graph.x, graph.more["logits"]
        sgd.step()
    assert graph.x is mine[0] and graph.more["logits"] is mine[1]
    return analysis


def test_an_object_that_the_model_writes_on_is_given_as_it_was():
    """What it holds can have a graph of its own, which the script has gone through."""
    torch.manual_seed(0)
    net, before, y = OfGraphs(), nn.Linear(4, 4), torch.randn(8, 3)
    x = torch.randn(8, 4)
    analysis = graph_step(net, Graph(before(x)), y, lambda: None)
    assert not analysis.absent
    clean = F.mse_loss(net.eval()(Graph(before(x))), y)
    torch.testing.assert_close(analysis.latest["loss/R_S"], clean.item())


def test_what_an_object_holds_may_not_change_before_the_step():
    torch.manual_seed(0)
    net, x, y = OfGraphs(), torch.randn(8, 4), torch.randn(8, 3)
    analysis = graph_step(net, Graph(x), y, x.zero_)
    assert "changed in place" in analysis.absent["regularizer"]


class Shallow(nn.Module):
    """Two residual branches, each left out for one sample in ten."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.drops = nn.ModuleList(StochasticDepth(0.1) for _ in range(2))

    def forward(self, x):
        for part, drop in zip(self.parts, self.drops, strict=True):
            x = x + drop(torch.tanh(part(x)))
        return x


class StochasticDepth(nn.Module):
    mode = "row"

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = x.new_empty(len(x), 1).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


def test_rare_drops_take_more_masks_until_their_spread_is_known():
    torch.manual_seed(0)
    net, x, y = Shallow(), torch.randn(3, 4), torch.randn(3, 4)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.mse_loss(net(x), y).backward()
        sgd.step()
    # 20 drops are expected in 20 / (0.1 * 2 * 3) masks.
    assert "average over 34 masks" in analysis.notes["regularizer/R1"]
    error = analysis.latest["regularizer/R1_standard_error"]
    truth = tdi.testing.expected_dropout_loss(net, (x, y), "mse")
    r1 = float(truth) - analysis.latest["loss/R_S"]
    assert abs(analysis.latest["regularizer/R1"] - r1) < 4 * error


def test_too_few_drops_for_an_error_are_told():
    torch.manual_seed(0)
    net, x, y = Shallow(), torch.randn(3, 4), torch.randn(3, 4)
    net.drops[0].p = net.drops[1].p = 1e-4
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.mse_loss(net(x), y).backward()
        sgd.step()
    assert "take more masks" in analysis.absent["regularizer/R1_standard_error"]
    assert "no standard error" in analysis.notes["regularizer/R1"]
    # What 64 masks would not give is not paid for.
    assert "average over 8 masks" in analysis.notes["regularizer/R1"]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def encode(self, x):
        return self.second(F.dropout(self.first(x).relu(), 0.3, self.training))


def test_without_a_pass_nothing_is_claimed_of_sites():
    net = Encoder()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        net.encode(torch.randn(8, 4)).square().mean().backward()
        sgd.step()
    names = ("regularizer", "dropout_noise", "masks", "sharpness")
    assert all("a method of another name" in analysis.absent[x] for x in names)


class KeptElsewhere(nn.Module):
    """Reads its weight from where no module of torch's keeps it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.held, self.drop = [self.weight], nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(x) @ self.held[0].T


def test_parameters_that_are_read_from_elsewhere_are_told():
    net = KeptElsewhere()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.cross_entropy(net(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        sgd.step()
    assert "keep them elsewhere" in analysis.absent["sharpness"]


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.drop = nn.Dropout(0.1)
        self.last = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        for part in self.parts:
            x = self.drop(part(x))
        return self.last(x + 0.1 * torch.randn_like(x))


def test_the_summary_says_once_what_is_said_of_many():
    net = Noisy()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.mse_loss(net(torch.randn(8, 4)), torch.randn(8, 4)).backward()
        sgd.step()
    text = analysis.summary()
    assert "p=nan" not in text and analysis.notes["run/p"] == "0.1"
    assert "this is at one draw of them" in analysis.notes["loss/R_S"]
    assert "(the model itself):randn_like  call  not observed: random" in text
    assert text.count("no graph of what follows it could be traced") == 1
    first = "condensation/orientation_amplitude/parts.0"
    assert f"  {first} and 5 more of condensation: amplitudes are" in text
    assert "no graph of what follows `last` could be traced" in text


class Messages(nn.Module):
    """Graph convolution with the edges in a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.drop = (
            nn.Linear(4, 5),
            nn.Linear(5, 3),
            nn.Dropout(0.4),
        )

    def forward(self, x, edges):
        h = (edges @ self.one(x)).tanh()
        return edges @ self.two(self.drop(h))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.strided])
def test_curvature_with_edges_in_a_sparse_matrix(layout):
    torch.manual_seed(0)
    net, x, y = Messages(), torch.randn(8, 4), torch.randint(3, (8,))
    edges = (torch.eye(8) + torch.eye(8).roll(1, 0)) / 2
    given = edges.to_sparse() if layout is torch.sparse_coo else edges
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.cross_entropy(net(x, given)[:5], y[:5]).backward()
        sgd.step()

    def risk(params):
        out = torch.func.functional_call(net.eval(), params, (x, edges))
        return F.cross_entropy(out[:5], y[:5])

    own = {n: p.detach() for n, p in net.named_parameters()}
    blocks = torch.func.hessian(risk)(own)
    rows = [[blocks[a][b].reshape(own[a].numel(), -1) for b in own] for a in own]
    top = torch.linalg.eigvalsh(torch.cat([torch.cat(row, 1) for row in rows]))[-1]
    found = analysis.latest["sharpness/top_eigenvalue"]
    assert found == pytest.approx(float(top), rel=2e-3)


class Counted(nn.Module):
    """Computes its loss, per item of all passes of a step where these are told."""

    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.Linear(4, 3), nn.Dropout(0.2)

    def forward(self, x, labels, num_items_in_batch=None):
        losses = F.cross_entropy(self.head(self.drop(x)), labels, reduction="none")
        return losses.sum() / (num_items_in_batch or len(labels))


def test_a_loss_per_item_of_all_passes_is_measured_per_share_of_them():
    torch.manual_seed(0)
    net, x, y = Counted(), torch.randn(8, 4), torch.randint(3, (8,))
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        for half in (slice(0, 6), slice(6, 8)):
            net(x[half], labels=y[half], num_items_in_batch=8).backward()
        sgd.step()
        analysis.measure()  # off cadence, of the same batch
    share = net.eval()(x[6:], y[6:], num_items_in_batch=8 / 2).item()
    for _, value in analysis.history["loss/R_S"]:
        torch.testing.assert_close(value, share)
    assert len(analysis.history["loss/R_S"]) == 2
    assert "over its share of the" in analysis.notes["loss/R_S"]


def test_nested_tensors_are_told_before_anything_fails():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 3))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    ragged = torch.nested.nested_tensor(
        [torch.randn(n, 4) for n in (3, 2)], layout=torch.jagged
    )
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.cross_entropy(net(ragged).values(), torch.randint(3, (5,))).backward()
        sgd.step()
    names = ("regularizer", "dropout_noise", "masks", "sharpness")
    assert all("nested tensors" in analysis.absent[x] for x in names)
    assert not analysis.notes["masks"]


def test_the_summary_has_errors_beside_their_values():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Dropout(0), nn.Tanh())
    net.append(nn.Linear(8, 3))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with tdi.attach_analysis(net, log_dir=False, every=1) as analysis:
        F.mse_loss(net(torch.randn(8, 4)), torch.randn(8, 3)).backward()
        sgd.step()
    lines = (line.strip().partition(" ") for line in analysis.summary().splitlines())
    rows = {name: said.strip() for name, _, said in lines}
    for tag, kind in (
        ("regularizer/R1", "standard_error"), ("sharpness/top_eigenvalue", "residual"),
    ):  # fmt: skip
        value, error = (analysis.latest[x] for x in (tag, f"{tag}_{kind}"))
        assert rows[tag].split() == [f"{value:.5g}", f"{error:.2g}", "0"]
        assert f"{tag}_{kind}" not in rows
    assert rows["2"] == "Dropout(p=0)  drops nothing"
