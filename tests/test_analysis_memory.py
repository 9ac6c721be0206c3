"""What measures copy while they run: by the bytes that operators return."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import torch_dropout_ir as tdi
from tests.largest import Largest
from tests.live import Live
from torch_dropout_ir import condensation
from torch_dropout_ir.analysis.measures import (
    Condensation,
    Sharpness,
    default_measures,
    received_r2,
    sample_parts,
)
from torch_dropout_ir.analysis.measures.sample_parts import fitting
from torch_dropout_ir.analysis.records import Image
from torch_dropout_ir.analysis.snapshot import Snapshot, take
from torch_dropout_ir.condensation.rows import row_norms
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.sharpness.curvature import CurvatureOperator
from torch_dropout_ir.sharpness.landscape import used_up_slice
from torch_dropout_ir.sharpness.linearization import linearize
from torch_dropout_ir.sharpness.recurrence import recurrence
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.sites import active_sites


def test_the_received_gradient_is_not_copied():
    g = torch.randn(1000, 1000)
    with Largest() as seen:
        found = received_r2({"w": g}, {"w": 0.1})
    assert found == pytest.approx(0.025 * float(g.double().square().sum()), rel=1e-12)
    assert received_r2({"w": g.T}, {"w": 0.1}) == pytest.approx(found, rel=1e-12)
    assert received_r2({"w": g[:0]}, {"w": 0.1}) == 0
    assert 0 < seen.bytes <= 2**18


def test_the_received_gradient_is_not_written_on():
    g = torch.randn(50, 30, dtype=torch.float64)  # which `double` does not copy
    kept = g.clone()
    assert received_r2({"w": g}, {"w": 4.0}) == pytest.approx(float(g.norm() ** 2))
    assert torch.equal(g, kept)


def test_norms_and_movement_copy_blocks_of_rows():
    weights = torch.randn(3000, 1000)
    start = weights + torch.randn(3000, 1000)
    with Largest() as seen:
        moved, norms = condensation.movement(weights, start), row_norms(weights)
    assert seen.bytes <= 2**23 < weights.nbytes
    apart, old = (weights - start).double(), start.double()
    assert moved.relative == pytest.approx(float(apart.norm() / old.norm()), rel=1e-6)
    torch.testing.assert_close(norms, weights.double().norm(dim=1))
    expected = torch.cosine_similarity(weights.double(), old)
    torch.testing.assert_close(moved.cosines.double(), expected, rtol=0, atol=1e-6)


def test_the_heat_map_is_that_of_a_matrix_that_is_not_made():
    weights = torch.randn(200, 12)
    labels = condensation.effective_neurons(weights).labels
    with Largest() as seen:
        found = Condensation(max_image=64)._heat_map(weights, labels).values
    assert seen.bytes < 200 * 200 * 4
    cosines = condensation.cosine_similarity(
        weights[condensation.cluster_order(weights, labels)]
    )
    expected = nn.functional.adaptive_avg_pool2d(cosines[None, None], 64)[0, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_condensation_holds_half_of_the_weights_and_blocks_of_a_layer():
    net = nn.Sequential(*(nn.Linear(800, 800) for _ in range(2)))
    own, measure = sum(x.nbytes for x in net.parameters()), Condensation(max_image=64)
    for step in range(2):
        with Live(net.parameters()) as seen:
            if not step:
                records = measure(Snapshot(net, 0, ()))
            else:
                again = measure(Snapshot(net, 1, ()))
        assert seen.most <= 0.72 * own  # half of it is what is kept of the start
    assert records.keys() == again.keys() and len(again) == 2 * 8


class Alive(TorchDispatchMode):
    """The most tensors of one size in memory of their own that lived at a time."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.given, self.most = numel, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.numel() == self.numel:
                storage = x.untyped_storage()
                if storage.nbytes() >= self.numel:  # no view of one number
                    self.given[storage.data_ptr()] = StorageWeakRef(storage)
        living = sum(not x.expired() for x in self.given.values())
        self.most = max(self.most, living)
        return out


def test_the_noise_of_masks_holds_the_gradient_of_no_linear_layer():
    net = nn.Sequential(*(nn.Linear(30, 30) for _ in range(12)), nn.Dropout())
    batch = torch.randn(4, 30), torch.randn(4, 30)
    with Alive(900) as seen:
        found = tdi.regularizers.gradient_norm(net, batch, "mse", lr=0.1)
    assert found.dropout_noise > 0
    assert 12 <= seen.most <= 17  # twelve of them are the weights
    assert all(x._backward_hooks is None and x.grad is None for x in net.parameters())


def test_the_noise_of_masks_is_of_gradients_that_hooks_have_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3))
    batch = torch.randn(5, 6), torch.randint(3, (5,))
    found = []
    for hooked in (False, True):
        for x in model.parameters() if hooked else ():
            x.register_hook(lambda g: 0.5 * g)
        torch.manual_seed(1)
        whole = tdi.regularizers.gradient_norm(model, batch, "cross_entropy", lr=0.1)
        found.append(float(whole.dropout_noise))
    assert found[1] == pytest.approx(found[0] / 4, rel=1e-5) and found[0] > 0


def test_the_noise_of_masks_takes_sparse_gradients():
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Dropout(), nn.Flatten())
    batch = torch.randint(9, (8, 2)), torch.randn(8, 8)
    found = []
    for net[0].sparse in (True, False):
        torch.manual_seed(0)
        found.append(tdi.regularizers.gradient_norm(net, batch, "mse", lr=0.1))
    torch.testing.assert_close(found[0].dropout_noise, found[1].dropout_noise)
    torch.testing.assert_close(found[0].value, found[1].value)


def summed(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")


weighted = functools.partial(
    nn.functional.cross_entropy, weight=torch.tensor([3.0, 1, 1], dtype=torch.float64)
)
padded = functools.partial(nn.functional.cross_entropy, ignore_index=2)


@pytest.mark.parametrize("loss", ["cross_entropy", summed, weighted, padded])
def test_curvature_of_parts_is_that_of_the_batch(loss):
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    nn.init.zeros_(net[2].weight)  # outputs tell nothing until it is moved
    batch = torch.randn(10, 5, dtype=torch.float64), torch.randint(3, (10,))
    resolved = resolve_loss(loss)
    found = fitting(net, resolved, batch, 900)
    if loss is summed:  # taken for a mean, which it is not
        assert "see each other" in found.lacking
        return
    assert [len(y) for _, y in found.batches] == [2, 2, 2, 2, 2] and not found.said
    assert [len(y) for _, y in found.finer] == [1] * 10  # for the trace
    whole = tdi.sharpness.hessian(net, resolved, batch).dense()
    for fine in (False, True):
        surface = found.surface(net, resolved, fine=fine)
        cut = CurvatureOperator("hessian", surface, 2**20)
        torch.testing.assert_close(cut.dense(), whole)
    assert fitting(net, resolved, batch, 2**20).batches is batch


def test_flattened_targets_are_cut_with_their_texts():
    """A batch that could not be cut would be in memory as a whole."""
    net = nn.Sequential(
        nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7), nn.Flatten(0, 1)
    )
    loss = resolve_loss("cross_entropy")
    batch = torch.randint(7, (6, 9)), torch.randint(7, (54,))
    found = fitting(net.double(), loss, batch, 0)
    assert [len(y) for _, y in found.batches] == [9] * 6
    cut = CurvatureOperator("hessian", found.surface(net, loss), 2**20)
    whole = tdi.sharpness.hessian(net, loss, batch)
    torch.testing.assert_close(cut.dense(), whole.dense())
    transposed = batch[0], batch[1].view(6, 9).T.flatten()  # of no text by itself
    crossed = nn.Sequential(*net[:-1], Turned())
    assert "see each other" in fitting(crossed, loss, transposed, 0).lacking


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1).flatten(0, 1)


class Model(nn.Module):
    """Computes its loss over labels, some of them padding."""

    def __init__(self, shift):
        super().__init__()
        self.symbols, self.head, self.shift = nn.Embedding(7, 4), nn.Linear(4, 7), shift

    def forward(self, ids, labels):
        h = self.head(self.symbols(ids))
        h, y = (h[:, :-1], labels[:, 1:]) if self.shift else (h, labels)
        return nn.functional.cross_entropy(h.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("shift", [False, True])
def test_parts_of_texts_count_by_their_labels(shift):
    net = Model(shift).double()
    labels = torch.randint(7, (6, 9))
    labels[2, 4:], labels[3:, 7:] = -100, -100
    batch = (Inputs((torch.randint(7, (6, 9)),), {"labels": labels}),) * 2
    loss = resolve_loss(lambda outputs, _: outputs)
    found = fitting(net, loss, batch, 0)
    assert len(found.batches) == 6 and not found.lacking
    cut = CurvatureOperator("hessian", found.surface(net, loss), 2**20)
    whole = tdi.sharpness.hessian(net, loss, batch)
    torch.testing.assert_close(cut.dense(), whole.dense())


def test_the_look_at_what_a_pass_keeps_lets_go_of_it():
    given = []

    class Kept(nn.Module):
        def forward(self, x):
            x = x.exp()  # whose derivative is its output
            given.append(StorageWeakRef(x.untyped_storage()))
            return x

    net = nn.Sequential(nn.Linear(5, 8), Kept(), nn.Linear(8, 3))
    batch = torch.randn(10, 5), torch.randint(3, (10,))
    fitting(net, resolve_loss("cross_entropy"), batch, 2**20)
    assert given and all(x.expired() for x in given)


@pytest.mark.parametrize(
    ("max_bytes", "coupling", "fixed"),
    [(0, "auto", True), (2**30, "auto", False), (0, "batch", False),
     (2**30, "fixed", True), (None, "auto", False)],
)  # fmt: skip
def test_batch_normalization_is_of_the_whole_batch_and_notes_say_how(
    max_bytes, coupling, fixed, monkeypatch
):
    monkeypatch.setattr(sample_parts, "_TINY", 0)
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)
    ).double()
    batch = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    loss = resolve_loss("cross_entropy")
    snapshot = Snapshot(net, 0, (), loss=loss, batches=[batch])
    state = {k: x.clone() for k, x in net.state_dict().items()}
    measure = Sharpness(max_bytes=max_bytes, coupling=coupling, tol=1e-6)
    records = measure(snapshot)
    assert all(torch.equal(x, state[k]) for k, x in net.state_dict().items())
    assert net[1].training
    value = tdi.sharpness.loss_slice(net, loss, batch, [0.0])
    middle = records["sharpness/loss_slice"].counts[5]
    assert float(middle) == pytest.approx(float(value))
    if fixed:
        h = net[0](batch[0]).detach()
        net[1].running_mean, net[1].running_var = h.mean(0), h.var(0, correction=0)
        net[1].eval()
        held = tdi.sharpness.loss_slice(net, loss, batch, [0.0])
        assert float(held) == pytest.approx(float(value))  # at the parameters one loss
    truth = tdi.sharpness.hessian(net, loss, batch).dense()
    top = float(torch.linalg.eigvalsh(truth)[-1])
    assert records["sharpness/top_eigenvalue"] == pytest.approx(top, rel=1e-5)
    away = records["sharpness/trace"] - float(truth.trace())
    assert abs(away) <= 5 * records["sharpness/trace_standard_error"] + 1e-9
    for tag in ("sharpness/top_eigenvalue", "sharpness/trace"):
        assert ("held at the means" in snapshot.notes[tag]) == fixed


def test_samples_that_meet_otherwise_and_do_not_fit_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr(sample_parts, "_TINY", 0)

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x) - self.head(x).mean(0)

    net, batch = Pairs(), (torch.randn(16, 5), torch.randint(3, (16,)))
    loss = resolve_loss("cross_entropy")
    for most, there in ((0, False), (2**30, True), (None, True)):
        snapshot = Snapshot(net, 0, (), loss=loss, batches=[batch])
        records = Sharpness(max_bytes=most)(snapshot)
        assert ("sharpness/top_eigenvalue" in records) == there
        assert "sharpness/loss_slice" in records
        assert ("sharpness/top_eigenvalue" in snapshot.absent) != there
    twice = nn.BatchNorm1d(5)
    net = nn.Sequential(twice, nn.Linear(5, 5), twice, nn.Linear(5, 3))
    assert "see each other" in fitting(net, loss, batch, 0).lacking
    with pytest.raises(ValueError, match="coupling"):
        Sharpness(coupling="eighth")


def test_statistics_of_half_precision_are_held_in_it():
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).bfloat16()
    batch = torch.randn(16, 5).bfloat16(), torch.randint(3, (16,))
    found = fitting(net, resolve_loss("cross_entropy"), batch, 0)
    assert len(found.batches) > 1
    assert {x.dtype for x in found.statistics["1"]} == {torch.bfloat16}
    snapshot = Snapshot(net, 0, (), loss=resolve_loss("cross_entropy"), batches=[batch])
    assert Sharpness(max_bytes=0)(snapshot)["sharpness/top_eigenvalue"] > 0


def test_what_parts_make_a_loss_warn_of_is_no_matter():
    """A loss that pairs all outputs with one target takes parts of other shapes."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x)[-1:] + self.head(x).mean(0)

    batch = torch.randn(16, 5), torch.randn(1, 3).expand(16, 3)

    def pairs(outputs, targets):
        if len(targets) < 16:
            warnings.warn("targets are few", stacklevel=1)
        return (outputs - targets).square().mean()

    assert "see each other" in fitting(Last(), resolve_loss(pairs), batch, 0).lacking


def test_the_batch_is_cut_so_that_the_peak_is_what_was_said(monkeypatch):
    def pieces(tanhs, samples):
        net = nn.Sequential(nn.Linear(300, 300), *(nn.Tanh() for _ in range(tanhs)))
        batch = torch.randn(samples, 300), torch.randn(samples, 300)
        found = fitting(net, resolve_loss("mse"), batch).batches
        return 1 if found is batch else len(found)

    assert pieces(9, 64) == 1  # a graph of 4 MB, which is not worth the time
    monkeypatch.setattr(sample_parts, "_TINY", 2**20)
    own = 300 * 301 * 4
    for tanhs, samples in ((1, 4), (9, 64), (30, 256)):
        kept = (tanhs + 1) * samples * 300 * 4  # outputs; what the loss keeps of them
        training = 2 * own + kept
        room = max(2**20, training / 8, training - 4.25 * own)
        expected = 1 if 5 * kept <= room else 2.75 * kept / room
        assert pieces(tanhs, samples) == pytest.approx(expected, abs=1)
    assert pieces(1, 4) == 1 < pieces(9, 64)


@pytest.fixture(scope="module")
def training():
    """A model under dropout with its gradient, what it is watched with, and a peak."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(900, 900), nn.ReLU(), nn.Dropout(), nn.Linear(900, 900), nn.ReLU(),
        nn.Dropout(), nn.Linear(900, 10),
    )  # fmt: skip
    batch = torch.randn(64, 900), torch.randint(10, (64,))
    loss = resolve_loss("cross_entropy")
    own = sum(x.nbytes for x in net.parameters())
    with Live((*net.parameters(), *batch)) as seen:
        loss(net(batch[0]), batch[1]).backward()
    snapshot = Snapshot(
        net, 0, active_sites(net), loss=loss, inputs=batch[0], targets=batch[1],
        batches=[batch], lr={n: 0.1 for n, _ in net.named_parameters()},
        gradients={n: x.grad for n, x in net.named_parameters()},
        statistics={"2": tdi.MaskStatistics()},
    )  # fmt: skip
    return snapshot, own, own + seen.most


@pytest.mark.parametrize("measure", default_measures(), ids=lambda m: m.name)
def test_what_each_measure_holds_beside_parameters_and_gradient(
    training, measure, monkeypatch
):
    monkeypatch.setattr(sample_parts, "_TINY", 2**20)  # else some MB more
    snapshot, own, peak = training
    net = snapshot.model
    kept = [x.grad.clone() for x in net.parameters()]
    held = [x for y in net.parameters() for x in (y, y.grad)]
    with Live((*held, snapshot.inputs, snapshot.targets)) as seen:
        taken = take(measure, snapshot, 0)
    assert taken or measure.name == "masks"
    # A product with the Hessian is of a vector and makes another: no peak is below.
    floor = max(1.2 * peak, 4.2 * own) if measure.name == "sharpness" else 1.2 * peak
    # Pictures are of one size whatever the layer.
    pictures = [x.values for x in taken.values() if isinstance(x, Image)]
    assert 2 * own + seen.most <= floor + sum(x.nbytes for x in pictures)
    assert all(
        torch.equal(x.grad, g) for x, g in zip(net.parameters(), kept, strict=True)
    )


def test_a_graph_that_serves_one_product_is_let_go_of_as_it_runs():
    net = nn.Sequential(*(x for _ in range(9) for x in (nn.Linear(9, 9), nn.Tanh())))
    batch = torch.randn(2000, 9), torch.randn(2000, 9)
    surface = Surface("product", net, "mse", batch, copied=False)
    v, most, found = torch.randn(9 * 90), [], []
    for once in (False, True):
        with Live((*net.parameters(), *batch)) as seen, surface.held(None):
            graph = linearize("hessian", surface, batch, 0, None, once)
            found.append(graph.products(v[None], 0))
            del graph
        most.append(seen.most)
    torch.testing.assert_close(*found)
    assert most[1] <= 0.7 * most[0]


@pytest.mark.parametrize("cut", [False, True])
def test_curvature_holds_two_vectors_and_no_gradient(cut):
    net = nn.Sequential(*(nn.Linear(60, 60, bias=False) for _ in range(6)))
    x = torch.randn(8, 60)
    batches = [(x[:4], x[:4]), (x[4:], x[4:])] if cut else (x, x)
    op = tdi.sharpness.hessian(net, "mse", batches)
    assert recurrence(op, 2).nodes[-1] > 0
    with Alive(6 * 60**2) as vectors, Alive(60**2) as pieces:
        found = recurrence(op, 6)
    assert len(found.nodes) == 6 and vectors.most == 2
    assert pieces.most <= 9  # the weights, the vectors, one of the twelve parts
    v, total = torch.randn(2, op.shape[0])
    expected = total + op @ v
    op.add_product(v, total)
    torch.testing.assert_close(total, expected)


def test_a_slice_takes_the_memory_of_its_direction():
    net = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30))
    batch, alphas = (torch.randn(9, 30), torch.randn(9, 30)), [-1.0, -0.3, 0.0, 0.7]
    direction = tdi.sharpness.filter_normalized_direction(net)
    expected = tdi.sharpness.loss_slice(net, "mse", batch, alphas, direction)
    surface = Surface("slice", net, "mse", batch, copied=False)
    kept = [x.clone() for x in net.parameters()]
    with Alive(900) as seen:
        found = used_up_slice(surface, alphas, direction)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert seen.most <= 6  # two weights, the direction, what looks at a piece of it
    assert all(torch.equal(x, y) for x, y in zip(kept, net.parameters(), strict=True))


def test_a_density_from_two_vectors_is_that_of_the_whole_basis():
    matrix = torch.randn(60, 60, dtype=torch.float64)
    matrix = matrix + matrix.T
    found = []
    for most in (2**20, 0):
        torch.manual_seed(0)
        found.append(
            tdi.sharpness.spectral_density(matrix, num_steps=12, max_bytes=most)
        )
    whole, short = found
    torch.testing.assert_close(short.nodes, whole.nodes, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(short.weights, whole.weights, rtol=1e-6, atol=1e-9)
    few = tdi.sharpness.spectral_density(torch.eye(40), num_steps=9, max_bytes=0)
    assert few.num_matvecs == 1 and float(few.nodes[0, 0]) == pytest.approx(1)
