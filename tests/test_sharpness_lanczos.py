"""Top eigenvalues: budgets, resumed runs, stopping, rehearsal on few samples."""

import itertools
import math

import pytest
import torch
from torch import nn

from torch_dropout_ir import sharpness
from torch_dropout_ir.sharpness import curvature
from torch_dropout_ir.sharpness.herding import herded, representatives
from torch_dropout_ir.sharpness.krylov import Space, random_vector
from torch_dropout_ir.sharpness.recurrence import Settled, recurrence
from torch_dropout_ir.sharpness.search import rehearsed


class Counted:
    def __init__(self, matrix):
        self.matrix, self.count = matrix, 0
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, v):
        self.count += 1
        return self.matrix @ v


def spectrum(size=300):
    values = torch.cat((torch.linspace(-1, 1, size - 3), torch.tensor([3.0, 5.0, 8.0])))
    basis = torch.linalg.qr(torch.randn(size, size).double()).Q
    return basis @ torch.diag(values.double()) @ basis.T


def test_products_are_counted_as_they_are():
    """One step of Lanczos for one value is one product, not two."""
    op = Counted(spectrum())
    assert sharpness.top_eigenvalues(op, max_matvecs=1).num_matvecs == op.count == 1
    op = Counted(spectrum())
    found = sharpness.top_eigenvalues(op)
    assert found.num_matvecs == op.count and found.converged


def test_resumed_runs_are_the_uninterrupted_one(tmp_path):
    matrix = spectrum()
    start = torch.randn(300).double()
    arguments = {"k": 2, "tol": 1e-10, "max_bytes": 12 * 300 * 8}
    for first in (1, 5, 14, 25):  # before, at and after restarts
        torch.manual_seed(1)
        whole = sharpness.top_eigenvalues(
            matrix, **arguments, start=start, max_matvecs=max(2, first) + 9
        )
        torch.manual_seed(1)
        half = sharpness.top_eigenvalues(
            matrix, **arguments, start=start, max_matvecs=max(2, first)
        )
        torch.save(half.state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt")
        assert state["rows"].shape[0] <= 12
        rest = sharpness.top_eigenvalues(
            matrix, **arguments, max_matvecs=9, state=state
        )
        assert rest.num_matvecs == whole.num_matvecs
        torch.testing.assert_close(rest.values, whole.values)
        torch.testing.assert_close(rest.residuals, whole.residuals)
    done = sharpness.top_eigenvalues(matrix, tol=1e-3)
    again = sharpness.top_eigenvalues(matrix, tol=1e-3, state=done.state)
    assert again.num_matvecs == done.num_matvecs and again.converged
    tighter = sharpness.top_eigenvalues(matrix, tol=1e-9, state=done.state)
    assert tighter.converged and tighter.num_matvecs > done.num_matvecs
    assert float(tighter.values[0]) == pytest.approx(8.0, rel=1e-9)


def test_stopping_on_values_spends_less_and_errors_are_estimates():
    matrix = spectrum(800)
    for tol in (1e-3, 1e-6):
        torch.manual_seed(0)
        by_value = sharpness.top_eigenvalues(matrix, tol=tol, stop="value")
        torch.manual_seed(0)
        by_residual = sharpness.top_eigenvalues(matrix, tol=tol)
        assert by_value.num_matvecs <= by_residual.num_matvecs
        assert abs(float(by_value.values[0]) - 8) <= tol * 8
        assert float(by_residual.residuals[0]) <= tol * 8
    short = sharpness.top_eigenvalues(matrix, k=2, max_matvecs=9)
    assert (short.errors <= short.residuals).all()


class Diagonal:
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, values):
        self.values, self.shape = values, (len(values), len(values))

    def __matmul__(self, v):
        return self.values * v


@pytest.mark.parametrize("stop", ["value", "residual"])
def test_claims_hold_where_two_values_look_like_one(stop):
    """Before they part, the one Ritz value of both has a small residual.

    The gap behind it is not known then: the next Ritz value is on its way up.
    """
    wrong = 0
    for gap in (0.01, 0.003):
        values = torch.linspace(-0.5, 0.5, 200).double()
        values[:2] = torch.tensor([1.0, 1.0 - gap]).double()
        for seed in range(20):
            torch.manual_seed(seed)
            found = sharpness.top_eigenvalues(Diagonal(values), stop=stop)
            assert found.converged
            wrong += float(found.values[0]) < 1 - 1e-3
    assert not wrong


def test_a_small_change_is_no_reason_to_stop():
    """At an edge without a gap the value creeps: half a tolerance a product."""
    op = Diagonal(torch.linspace(0, 1, 3000).double())
    values = []
    for most in range(10, 40):
        torch.manual_seed(0)
        found = sharpness.top_eigenvalues(op, max_matvecs=most)
        values.append(float(found.values[0]))
        assert not found.converged or values[-1] >= 1 - 1e-3
    creeps = [
        after - before < 5e-4 and after < 1 - 1e-3
        for before, after in itertools.pairwise(values)
    ]
    assert sum(creeps) >= 3  # a rule of small change would have stopped there


def test_memory_of_the_basis_is_bounded():
    matrix = spectrum(600)
    found = sharpness.top_eigenvalues(
        matrix, 2, tol=1e-6, max_matvecs=900, max_bytes=11 * 600 * 8
    )
    assert found.converged and found.state["rows"].shape[0] <= 11
    torch.testing.assert_close(found.values, torch.tensor([8.0, 5.0]).double())


@pytest.fixture
def worth(monkeypatch):
    """Rehearse for small networks too, as for large ones."""
    monkeypatch.setattr(curvature, "_WORTH", 0)
    monkeypatch.setattr(curvature, "_BRIEF", 0)


def large(samples=400):
    net = nn.Sequential(nn.Linear(30, 100), nn.ReLU(), nn.Linear(100, 10))
    batch = torch.randn(samples, 30), torch.randint(10, (samples,))
    return net, batch


def test_rehearsal_pays_and_is_counted(worth):
    net, batch = large()
    op = sharpness.hessian(net, "cross_entropy", batch)
    truth = sharpness.top_eigenvalues(op, tol=1e-6, max_matvecs=500).values[0]
    few, share = op.thinned()
    assert share == 1 / 4 and few.shape == op.shape
    places = representatives(op.surface, batch, 400, 4)
    thinned = sharpness.hessian(net, "cross_entropy", [part[places] for part in batch])
    v = torch.randn(op.shape[0])
    torch.testing.assert_close(few @ v, thinned @ v)
    before = op.num_matvecs
    found = sharpness.top_eigenvalues(op, max_matvecs=16)
    rehearsed = found.num_matvecs - (op.num_matvecs - before)
    assert 2 <= rehearsed <= 5  # 28 products of an eighth, 3 of a quarter, a pass
    assert rehearsed == math.ceil(found.rehearsal)
    more = sharpness.top_eigenvalues(op, max_matvecs=1, state=found.state)
    assert more.rehearsal == found.rehearsal
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        found = sharpness.top_eigenvalues(op, tol=1e-9, max_matvecs=16)
        torch.manual_seed(seed)
        start = torch.randn(op.shape[0])
        cold = sharpness.top_eigenvalues(op, tol=1e-9, max_matvecs=16, start=start)
        errors.append([float(truth - f.values[0]) for f in (found, cold)])
    ours, plain = torch.tensor(errors).mean(0)
    assert ours < plain


@pytest.mark.parametrize(("brief", "least"), [(0, 8), (2**40, 16)])
def test_few_products_are_not_spent_on_a_rehearsal(worth, monkeypatch, brief, least):
    monkeypatch.setattr(curvature, "_BRIEF", brief)
    net, batch = large()
    op = sharpness.hessian(net, "cross_entropy", batch)
    for most in (least - 1, least):
        found = sharpness.top_eigenvalues(op, max_matvecs=most)
        assert (found.rehearsal > 0) == (most == least)
        assert found.num_matvecs <= most


def test_a_rehearsal_brings_its_other_leading_vectors_along(worth):
    """The first of few samples may be the second of all: a start must hold both."""
    torch.manual_seed(0)
    net, batch = large()
    op = sharpness.hessian(net, "cross_entropy", batch)
    few = op.thinned()[0].thinned(2)[0]
    leading = sharpness.top_eigenvalues(few, 4, tol=1e-3).vectors
    leading = [torch.cat([x.flatten() for x in v.values()]) for v in leading]
    start, spent = rehearsed(op, 200, 32)
    shares = [abs(float(start @ v)) / float(start.norm()) for v in leading]
    assert spent > 0 and shares[0] > 0.9
    # Of three a tenth, one by one: what the first has of them is less.
    assert sum(x**2 for x in shares[1:]) ** 0.5 == pytest.approx(0.1, abs=0.05)


def test_a_start_that_has_not_proved_near_counts_as_random(worth):
    """Told to be near the second of two eigenvectors, or near neither."""
    values = torch.cat((torch.linspace(-1, 1, 298), torch.tensor([4.0, 4.1]))).double()
    for first, near in ((299, True), (298, False), (0, False)):
        start = 0.01 * torch.randn(300).double()
        start[first] = 1.0
        space = Space(Diagonal(values), start, 32, 1)
        space.extend()
        space.informed = 6.0
        while float(space.leading[0]) < 4.1 * (1 - 1e-6):
            space.advance()
            space.extend()
        assert space.near == near
        space.lock()
        assert not space.near  # its first row is no start any more


def test_few_samples_have_the_means_and_products_of_all():
    torch.manual_seed(0)
    x = torch.cat((torch.randn(300, 4), 3 + 2 * torch.randn(40, 4))).double()
    places = torch.arange(len(x))
    moments = torch.cat((x, (x[:, :, None] * x[:, None]).flatten(1)), 1)
    chosen = herded(x, places, 40)
    assert len(chosen.unique()) == 40

    def apart(some):
        return (moments[some].mean(0) - moments.mean(0)).norm()

    assert apart(chosen) < min(apart(torch.randperm(340)[:40]) for _ in range(50)) / 4
    few = herded(x, places[::3], 20)
    assert (few % 3 == 0).all()  # of some, for all
    assert apart(few) < min(apart(torch.randperm(340)[:20]) for _ in range(50))


def test_a_rehearsal_has_the_curvature_of_the_whole(worth):
    """On every eighth sample the value is off by tens of percent."""
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        net, batch = large(512)
        op = sharpness.hessian(net, "cross_entropy", batch)
        spaced = sharpness.hessian(net, "cross_entropy", [x[::8] for x in batch])
        quarter, share = op.thinned()
        eighth, half = quarter.thinned(2)
        assert (share, half) == (1 / 4, 1 / 2)
        true, few, every = (
            float(sharpness.top_eigenvalues(a, tol=1e-2).values[0])
            for a in (op, eighth, spaced)
        )
        errors.append((abs(few / true - 1), abs(every / true - 1)))
    ours, plain = torch.tensor(errors).mean(0)
    assert ours < plain / 2


def test_no_rehearsal_where_samples_cannot_be_told_apart(worth):
    net, (x, y) = large()
    for inputs, targets in (
        ((x[:60], y[:60])),  # few
        ({"input": x}, y),
    ):
        op = sharpness.hessian(net, "cross_entropy", (inputs, targets))
        assert (op.thinned() is None) == (len(targets) < 64)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            self.register_buffer("weight", torch.rand(400, 1))

        def forward(self, x):
            return self.net(x) * self.weight

    op = sharpness.hessian(Whole(), "cross_entropy", (x, y))
    assert op.thinned() is None
    assert sharpness.top_eigenvalues(op, max_matvecs=16).num_matvecs == 16
    streamed = sharpness.hessian(net, "cross_entropy", [(x, y), (x, y)])
    assert streamed.thinned() is None


def test_no_rehearsal_where_calls_are_most_of_a_product():
    """Many samples in a small network, and few in a large one of many calls."""
    net, batch = large()
    assert sharpness.hessian(net, "cross_entropy", batch).thinned() is None
    deep = [nn.Sequential(nn.Linear(30, 30), nn.Tanh()) for _ in range(30)]
    net = nn.Sequential(*deep, nn.Linear(30, 10))
    op = sharpness.hessian(net, "cross_entropy", batch)
    assert op.thinned() is None  # 12,000 numbers to a call
    wide = nn.Sequential(nn.Linear(30, 512), nn.Tanh(), nn.Linear(512, 10))
    batch = torch.randn(512, 30), torch.randint(10, (512,))
    for kind in (sharpness.hessian, sharpness.ggn):
        few, share = kind(wide, "cross_entropy", batch).thinned()
        assert share == 1 / 4 and few.thinned(2)[1] == 1 / 2  # of what is worth it


def test_warm_from_the_last_eigenvector_in_five_products():
    net, batch = large()
    op = sharpness.hessian(net, "cross_entropy", batch)
    for stop in ("residual", "value"):
        for seed in range(3):
            torch.manual_seed(seed)
            first = sharpness.top_eigenvalues(op, stop=stop)
            start = first.vectors[0]
            again = sharpness.top_eigenvalues(op, stop=stop, start=start)
            assert again.converged and again.num_matvecs <= 5
            assert float(again.values[0]) >= (1 - 1e-3) * float(first.values[0])


def test_a_start_that_is_another_eigenvector_is_not_believed():
    """Nothing in its Krylov space says so: the look does."""
    values = torch.cat((torch.linspace(-1, 1, 298), torch.tensor([5.0, 8.0]))).double()
    start = torch.eye(300).double()[298]
    for stop in ("residual", "value"):
        found = sharpness.top_eigenvalues(Diagonal(values), start=start, stop=stop)
        assert found.converged and float(found.values[0]) == pytest.approx(8, rel=1e-3)


def test_the_recurrence_alone_does_for_a_first_impression():
    """Orthogonal to the last two, vectors stay so until a pair has converged."""
    op = Diagonal(torch.linspace(-1, 1, 500).double() ** 3)
    start = torch.randn(500).double()
    found = []
    for span in (None, 2):
        space = Space(op, start, 20, 1, span)
        space.extend()
        for _ in range(19):
            space.advance()
            space.extend()
        found.append((space.values, space.residuals(), space.vectors()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="`stop`"):
        sharpness.top_eigenvalues(torch.eye(3), stop="change")
    with pytest.raises(ValueError, match="finite products"):
        sharpness.top_eigenvalues(torch.eye(9) * float("nan"))
    with pytest.raises(ValueError, match="<= 3"):
        sharpness.top_eigenvalues(torch.eye(3), k=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2])
def test_half_precision_is_of_the_products_alone(dtype, k):
    """The basis is wider: what comes out is as true as the products are."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(300, 300)).Q
    values = torch.cat((torch.tensor([1.0, 0.92]), torch.linspace(-0.5, 0.6, 298)))
    matrix = (turn * values @ turn.T).to(dtype)
    matrix = (matrix + matrix.T) / 2
    true = torch.linalg.eigvalsh(matrix.double()).flip(0)[:k]
    found = sharpness.top_eigenvalues(matrix, k, tol=1e-3)
    assert found.converged and found.vectors[0].dtype == dtype
    assert (found.residuals <= torch.finfo(dtype).eps).all()
    torch.testing.assert_close(found.values, true, rtol=2e-3, atol=0)
    probe = sharpness.spectral_density(matrix, 30).nodes
    assert probe.unique().numel() == 30  # none twice, as without orthogonality
    assert float(probe.max()) == pytest.approx(float(true[0]), rel=2e-3)
    exact = sharpness.top_eigenvalues(matrix, k, tol=0.0)
    assert exact.converged and exact.num_matvecs < 60
    tops = [recurrence(matrix, 60, Settled(1e-3, 10)).top for _ in range(10)]
    errors = torch.tensor(tops) / true[0] - 1
    assert errors.square().mean().sqrt() < 5e-4


def test_matrices_that_have_no_such_spectrum_are_refused():
    for bad in (torch.randn(5, 4), torch.arange(9).view(3, 3), torch.ones(3)):
        with pytest.raises(ValueError, match="square matrix of floating-point"):
            sharpness.top_eigenvalues(bad)
    skew = torch.triu(torch.ones(6, 6))
    for measure in (sharpness.top_eigenvalues, sharpness.spectral_density):
        with pytest.raises(ValueError, match="expected a symmetric matrix"):
            measure(skew)
    for tol in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match="`tol` >= 0"):
            sharpness.top_eigenvalues(torch.eye(3), tol=tol)


def test_the_growth_of_a_value_is_foreseen_where_coefficients_have_settled():
    """Near the first vector of a chain of equal links, what is left is known."""
    half = torch.full((199,), 0.5).double()
    matrix = torch.diag(half, 1) + torch.diag(half, -1)
    matrix[0, 0] = first = 0.7
    true = first + 1 / (4 * first)  # of the endless chain
    space = Space(matrix, torch.eye(200).double()[0], 32, 1)
    space.extend()
    for _ in range(6):
        space.advance()
        space.extend()
    left = true - float(space.leading[0])
    assert float(space.errors()[0]) > 3 * left  # nothing is known of the gap
    space.informed = math.inf
    assert float(space.errors()[0]) == pytest.approx(left, rel=0.02)


def test_what_is_foreseen_is_not_much_less_than_what_is_certain():
    """Two close values: the growth of the lower one says nothing of the other."""
    values = torch.linspace(-0.5, 0.5, 400).double()
    values[:2] = torch.tensor([1.0, 0.99]).double()
    start = torch.zeros(400).double()
    start[:2] = torch.tensor([0.1, 1.0]).double()
    start[2:] = 0.1 * torch.randn(398).double() / 20
    space = Space(Diagonal(values), start, 32, 1)
    space.extend()
    for _ in range(8):
        space.advance()
        space.extend()
        certain = float(space.errors()[0])
        space.informed = 6.0
        assert certain / 6 * (1 - 1e-9) <= float(space.errors()[0]) <= certain
        space.informed = 0.0


def test_what_converged_by_a_hair_is_still_believed():
    """What is kept for a look in another direction can become no better than it is."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(300, 300).double()).Q
    values = torch.cat((torch.tensor([1.0, 0.92]), torch.linspace(-0.5, 0.6, 298)))
    matrix = turn * values.double() @ turn.T
    start = torch.randn(300).double()
    for count in range(8, 16):
        torch.manual_seed(count)
        first = sharpness.top_eigenvalues(matrix, 2, 1e-12, count, start)
        tol = 1.00001 * float((first.residuals / first.values).max())
        torch.manual_seed(count)
        found = sharpness.top_eigenvalues(matrix, 2, tol, 100, start)
        assert found.converged and found.num_matvecs < count + 12
        assert bool((found.residuals <= tol * found.values).all())


def test_what_was_left_out_of_one_vector_does_not_count_for_the_others():
    """After a look each value needs what its own tolerance asks for, and no more."""
    values = torch.cat((torch.tensor([1e-7]), -1 - torch.arange(59) / 59)).double()
    found = sharpness.top_eigenvalues(Diagonal(values), 3, max_matvecs=200)
    assert found.converged and found.values[0] > 0


def test_what_was_left_out_of_copies_stays_small_in_their_sums():
    for seed in range(16, 20):
        torch.manual_seed(seed)
        values = torch.cat((torch.ones(10), torch.rand(50) / 2)).double()
        assert sharpness.top_eigenvalues(Diagonal(values), 10).converged


def test_residuals_bound_those_of_vectors_that_mix_after_a_look():
    """What was left out of several at once adds up in a sum of them."""
    for seed in range(12):
        torch.manual_seed(seed)
        near = 1 + 1e-3 * torch.rand(10).double()
        values = torch.cat((near, torch.rand(50).double() / 2))
        found = sharpness.top_eigenvalues(Diagonal(values), 10)
        vectors = torch.stack(found.vectors)
        rest = vectors * values - found.values[:, None] * vectors
        assert found.converged
        assert bool((rest.norm(dim=1) <= 1.001 * found.residuals + 1e-12).all())


@pytest.mark.parametrize("unit", [1e-30, 1e-24, 1.0, 1e30])
def test_the_unit_of_the_loss_does_not_matter(unit):
    """Also where squares of its curvatures are none of single precision."""
    matrix = unit * torch.diag(torch.arange(1.0, 41.0))
    for start in (None, unit * torch.ones(40)):
        found = sharpness.top_eigenvalues(matrix, start=start)
        assert found.converged and 0 < float(found.residuals[0]) < 0.2 * unit
        assert float(found.values[0]) == pytest.approx(40 * unit, rel=1e-3)
    for max_bytes in (0, 2**20):
        density = sharpness.spectral_density(matrix, 20, 3, max_bytes=max_bytes)
        assert float(density.nodes.max()) == pytest.approx(40 * unit, rel=1e-3)


def test_no_gap_is_counted_on_that_the_next_value_may_still_fill():
    """Kato-Temple of a Krylov space that is orthogonalized by other code."""
    matrix = torch.diag(torch.cat((torch.rand(40), torch.tensor([3.0, 3.6]))).double())
    told = 0
    for seed in range(8):
        torch.manual_seed(seed)
        columns = [random_vector(matrix)]
        for _ in range(5):
            columns.append(matrix @ columns[-1])
        basis = torch.linalg.qr(torch.stack(columns, 1)).Q
        values, inner = torch.linalg.eigh(basis.T @ matrix @ basis)
        vectors = basis @ inner
        *_, second, first = (matrix @ vectors - vectors * values).norm(dim=0).tolist()
        gap = float(values[-1] - values[-2]) - second
        expected = min(first, first**2 / gap) if gap > 0 else first
        told += expected < first
        torch.manual_seed(seed)
        found = sharpness.top_eigenvalues(matrix, max_matvecs=6, tol=0.0)
        torch.manual_seed(seed)
        short = recurrence(matrix, 6)
        assert float(found.errors[0]) == pytest.approx(expected, rel=1e-4)
        assert short.error == pytest.approx(expected, rel=1e-4)
    assert told > 2


def test_values_that_all_come_twice_are_found_twice():
    """A short look from a random direction does not reach the second copy of them."""
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        values = torch.randn(200, generator=draw, dtype=torch.float64)
        turn = torch.randn(400, 400, generator=draw, dtype=torch.float64)
        turn = torch.linalg.qr(turn)[0]
        matrix = (turn * values.repeat(2)) @ turn.T
        torch.manual_seed(seed)
        found = sharpness.top_eigenvalues((matrix + matrix.T) / 2, k=2)
        expected = values.max().expand(2)
        assert found.converged
        torch.testing.assert_close(found.values, expected, rtol=2e-3, atol=0)


def test_copies_of_zero_are_not_missed_where_all_vectors_have_room():
    """A look of 20 products does not tell zero from -2e-4 where others are -25."""
    negative = -torch.logspace(-3.6, 1.4, 19, dtype=torch.float64)
    matrix = torch.diag(torch.cat((torch.tensor([4.4, 0, 0, 0, 0]), negative)))
    for seed in range(5):
        torch.manual_seed(seed)
        found = sharpness.top_eigenvalues(matrix, k=3, tol=1e-6)
        expected = torch.tensor([4.4, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-9)
        assert found.converged and found.num_matvecs == 24
