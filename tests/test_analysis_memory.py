"""What measures copy while they run: by the bytes that operators return."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import torch_dropout_ir as tdi
from tests.largest import Largest
from tests.live import Live
from torch_dropout_ir import condensation
from torch_dropout_ir.analysis.measures import Condensation, Sharpness, received_r2
from torch_dropout_ir.analysis.measures.sample_parts import fitting
from torch_dropout_ir.analysis.snapshot import Snapshot
from torch_dropout_ir.condensation.rows import row_norms
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.sharpness.landscape import used_up_slice
from torch_dropout_ir.sharpness.recurrence import recurrence
from torch_dropout_ir.sharpness.surface import Surface


def test_the_received_gradient_is_not_copied():
    g = torch.randn(1000, 1000)
    with Largest() as seen:
        found = received_r2({"w": g}, {"w": 0.1})
    assert found == pytest.approx(0.025 * float(g.double().square().sum()), rel=1e-12)
    assert received_r2({"w": g.T}, {"w": 0.1}) == pytest.approx(found, rel=1e-12)
    assert received_r2({"w": g[:0]}, {"w": 0.1}) == 0
    assert 0 < seen.bytes <= 2**20


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


def test_the_noise_of_masks_holds_one_gradient():
    net = nn.Sequential(*(nn.Linear(30, 30) for _ in range(12)), nn.Dropout())
    batch = torch.randn(4, 30), torch.randn(4, 30)
    with Alive(900) as seen:
        found = tdi.regularizers.gradient_norm(net, batch, "mse", lr=0.1)
    assert found.dropout_noise > 0
    assert 24 <= seen.most <= 28  # twelve of them are the weights
    assert all(x._backward_hooks is None and x.grad is None for x in net.parameters())


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


@pytest.mark.parametrize("loss", ["cross_entropy", summed])
def test_curvature_of_parts_is_that_of_the_batch(loss):
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    nn.init.zeros_(net[2].weight)  # outputs tell nothing until it is moved
    batch = torch.randn(10, 5, dtype=torch.float64), torch.randint(3, (10,))
    resolved = resolve_loss(loss)
    parts, said = fitting(net, resolved, batch, 0)
    if loss is summed:  # taken for a mean, which it is not
        assert len(parts) == 1 and "first 2 of 10 samples" in said
        return
    assert [len(y) for _, y in parts] == [2, 2, 2, 2, 2] and not said
    ops = (tdi.sharpness.hessian(net, resolved, b) for b in (batch, parts))
    torch.testing.assert_close(*(op.dense() for op in ops))
    assert fitting(net, resolved, batch, 2**20)[0] is batch


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


def test_where_samples_meet_a_part_stands_for_the_batch_and_says_so():
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    nn.init.zeros_(net[2].weight)
    batch = torch.randn(16, 5), torch.randint(3, (16,))
    snapshot = Snapshot(net, 0, (), loss=resolve_loss("cross_entropy"), batches=[batch])
    buffers = [x.clone() for x in net.buffers()]
    for measure, part in ((Sharpness(max_bytes=0), slice(2)), (Sharpness(), slice(16))):
        records = measure(snapshot)
        op = tdi.sharpness.hessian(
            net, "cross_entropy", (batch[0][part], batch[1][part])
        )
        top = torch.linalg.eigvalsh(op.dense().double())[-1]
        assert records["sharpness/top_eigenvalue"] == pytest.approx(
            float(top), rel=0.02
        )
        said = "first 2 of 16 samples" in snapshot.notes["sharpness/top_eigenvalue"]
        assert said == (part.stop == 2)
    assert all(torch.equal(x, y) for x, y in zip(buffers, net.buffers(), strict=True))


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
