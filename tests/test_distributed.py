"""Several processes that train one model, over gloo: measured as one."""

import contextlib
import copy
import datetime
import itertools
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis import distributed, measures

STEPS = 3
ROWS = 16
LIMIT = 60
# Measurements of one batch.
MANY = {"bent": 60, "weighed": 60, "linear": 60, "one row": 3}


def net(p=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 12), nn.Tanh(), nn.Dropout(p), nn.Linear(12, 3)
    ).double()


def batches(classes=False):
    draw = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        x = torch.randn(ROWS, 5, generator=draw, dtype=torch.float64)
        y = torch.randn(ROWS, 3, generator=draw, dtype=torch.float64)
        labels = torch.where(y[:, 1] > 1, -100, y.argmax(1))  # some are ignored
        yield x, labels if classes else y


def sharded(model):
    for layer in (model[0], model[3]):
        fully_shard(layer)
    return fully_shard(model)


WRAPS = {"ddp": DistributedDataParallel, "fsdp": sharded, "none": lambda model: model}
PRECISE = (
    measures.ReceivedGradient(),
    measures.Regularizer(),
    measures.Condensation(),
    measures.Sharpness(tol=1e-10, max_matvecs=400, trace_matvecs=111),
)


def part(rank, size, equal):
    """The rows of a rank."""
    ends = [ROWS * r // size for r in range(size + 1)]
    if not equal:
        ends[1:-1] = [end - 2 for end in ends[1:-1]]
    return slice(ends[rank], ends[rank + 1])


def train(model, rows=slice(None), lr=0.0, classes=False, steps=STEPS, **options):
    """A script. At a learning rate of 0 its masks do not steer it."""
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    criterion = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    options = {"log_dir": False, "every": 1, **options}
    with tdi.attach_analysis(model, **options) as analysis:
        for x, y in list(batches(classes))[:steps]:
            sgd.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            sgd.step()
    return analysis


def process(rank, size, folder, names):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # A deadlock ends in an error, not never.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=LIMIT),
    )
    found = {}
    for name in names:
        work, *arguments = SCENARIOS[name]
        started = time.perf_counter()
        found[name] = work(rank, size, *arguments, f"{folder}/{name}")
        found[f"{name} seconds"] = time.perf_counter() - started
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What each rank found in each scenario: processes are slow to start."""
    done: dict = {}
    mp.set_forkserver_preload([__name__])

    def run(size, name):
        if size not in done:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            names = [n for n in SCENARIOS if size == 2 or n in OF_FOUR]
            mp.start_processes(
                process,
                (size, str(folder), names),
                nprocs=size,
                start_method="forkserver",  # torch is imported once for all
            )
            ranks = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
            done[size] = folder, ranks
        folder, ranks = done[size]
        return [found[name] for found in ranks]

    return run


class Pictures:
    """A sink that keeps the slices of the loss and the densities of eigenvalues."""

    def __init__(self):
        self.kept = []

    def write(self, step, records, notes):
        for name in ("loss_slice", "spectral_density"):
            found = records[f"sharpness/{name}"]
            self.kept.append((found.counts, found.low, found.high))

    def close(self):
        pass


def measured(rank, size, wrap, p, lr, classes, equal, _=None):
    rows = part(rank, size, equal)
    model = WRAPS[wrap](net(p))
    pictures = Pictures()
    analysis = train(model, rows, lr, classes, measures=PRECISE, sinks=[pictures])
    return analysis.history, analysis.absent, pictures.kept


@pytest.mark.parametrize(
    ("size", "wrap", "loss"),
    [
        (2, "ddp", "mse"),
        (2, "ddp", "cross_entropy"),
        (2, "fsdp", "mse"),
        (2, "fsdp", "cross_entropy"),
        (4, "ddp", "mse"),
        (4, "fsdp", "cross_entropy"),
    ],
)
def test_records_are_those_of_the_joined_batch(ran, size, wrap, loss):
    found = ran(size, f"joined {loss} {wrap}")
    of_classes = loss == "cross_entropy"
    alone, _, pictures = measured(0, 1, "none", 0.5, 0.0, of_classes, True)
    equal = ["loss/R_S", "sharpness/top_eigenvalue", "sharpness/trace"]
    equal += ["condensation/effective_ratio/0", "regularizer/R1_standard_error"]
    if loss == "mse":
        equal += ["regularizer/R1", "regularizer/R1/2"]
        equal += ["regularizer/R1_standard_error/2", "loss/modified_standard_error"]
    assert len(pictures) == 2 * STEPS
    torch.testing.assert_close(found[0][2], pictures, rtol=1e-8, atol=1e-12)
    for history, absent, _ in found:
        assert not absent
        assert history == found[0][0], "the ranks hold different records"
        assert history.keys() == alone.keys()
        for tag in equal[: None if loss == "mse" else 4]:
            torch.testing.assert_close(history[tag], alone[tag], rtol=1e-8, atol=0)
    if loss == "cross_entropy":  # averaged over masks, which are others
        for step in range(STEPS):
            (a, e), (b, f) = (
                [h[f"regularizer/R1{of}"][step][1] for of in ("", "_standard_error")]
                for h in (found[0][0], alone)
            )
            assert abs(a - b) < 5 * (e**2 + f**2) ** 0.5


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_r2_is_of_the_gradient_that_all_ranks_step_with(ran, wrap):
    alone = measured(0, 1, "none", 0.0, 0.1, False, True)[0]
    for history, *_ in ran(2, f"trained {wrap}"):
        for tag in ("regularizer/R2", "loss/modified", "loss/R_S"):
            torch.testing.assert_close(history[tag], alone[tag], rtol=1e-8, atol=0)


def counted(rank, size, wrap, _):
    model = WRAPS[wrap](net())
    analysis = train(model, part(rank, size, False), measures=[measures.Masks()])
    seen = analysis._view.statistics()["2"]
    again = tdi.attach_analysis(model, log_dir=False)
    again.load_state_dict(analysis.state_dict())
    again.detach()
    loaded = again._view.counted["2"].num_elements if again._view.counted else 0
    return analysis.latest, float(seen.num_kept), seen.num_elements, loaded


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_masks_of_all_ranks_add(ran, wrap):
    found = ran(2, f"counted {wrap}")
    kept, drawn, loaded = (sum(x) for x in list(zip(*found, strict=True))[1:])
    assert drawn == STEPS * ROWS * 12
    assert loaded == found[0][2], "counts are not taken up by each rank"
    z = (kept - drawn / 2) / (drawn / 4) ** 0.5
    for latest, _, own, _ in found:
        assert own < drawn
        assert latest["mask/keep_rate/2"] == pytest.approx(kept / drawn)
        assert latest["mask/z_score/2"] == pytest.approx(z)


def noise_of_masks(rank, size, _):
    model = DistributedDataParallel(net())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model.state_dict())
    x, y = next(batches())
    rows = part(rank, size, False)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[measures.DropoutNoise()]
    ) as analysis:
        for _ in range(150):
            nn.MSELoss()(model(x[rows]), y[rows]).backward()
            sgd.step()
            model.load_state_dict(start)
    tag = "regularizer/R2_dropout_noise"
    return [
        [x for _, x in analysis.history[f"{tag}{of}"]] for of in ("", "_standard_error")
    ]


def test_noise_of_masks_is_unbiased_for_the_joined_batch(ran):
    found, claimed = torch.tensor(ran(2, "noise")[0])
    truth = tdi.regularizers.gradient_norm(
        net(), next(batches()), "mse", lr=0.1, num_masks=4000
    )
    error = (found.var() / len(found) + truth.dropout_noise_standard_error**2).sqrt()
    assert len(found) == 150
    assert (found.mean() - truth.dropout_noise).abs() < 4 * error
    assert 0.5 < claimed.square().mean() / found.var() < 1.7


class FailsOnOne:
    """Fails on one rank, before, between or after what ranks exchange."""

    name = "fails"
    needs = frozenset({"loss", "batches"})

    def __init__(self, bad, where):
        self.bad, self.where = bad, where

    def __call__(self, snapshot):
        for k in range(5):
            if snapshot.ranks.rank == self.bad and k == self.where:
                raise MemoryError("full")
            if k < 4:
                snapshot.ranks.sum_of(torch.ones(3))
        return {"fails/x": 1.0}


def failing(rank, size, wrap, bad, where, _):
    watch = [FailsOnOne(bad, where), measures.Sharpness(max_matvecs=4, trace_matvecs=2)]
    model = WRAPS[wrap](net())
    analysis = train(model, part(rank, size, True), 0.1, measures=watch)
    return analysis.history, analysis.absent


@pytest.mark.parametrize(
    ("size", "wrap", "where"),
    [
        *((2, "ddp", where) for where in (0, 2, 4)),
        (2, "fsdp", 2),
        (4, "ddp", 2),
        (4, "fsdp", 2),
    ],
)
def test_where_one_rank_fails_no_rank_waits(ran, size, wrap, where):
    name = f"fails {wrap} {where}"
    assert max(ran(size, f"{name} seconds")) < LIMIT / 2
    for rank, (history, absent) in enumerate(ran(size, name)):
        bad = 1 if wrap == "ddp" else 0
        said = "MemoryError: full" if rank == bad else "another rank"
        assert said in absent["fails"]
        assert "fails/x" not in history
        steps = [step for step, _ in history["sharpness/trace"]]
        assert steps == list(range(STEPS)), "the other measures go on"


def drawn(rank, size, _):
    model = DistributedDataParallel(net())
    ranks = distributed.ranks_of(model)
    before = torch.get_rng_state()
    with ranks.own_draws(model):
        own = torch.rand(4)
    return own, torch.equal(before, torch.get_rng_state())


def test_draws_of_ones_own_leave_the_common_stream(ran):
    (first, kept), (second, also) = ran(2, "drawn")
    assert kept and also
    assert not torch.equal(first, second)


def lacking(rank, size, _):
    """One rank hands the targets to nothing that is looked at."""
    model = DistributedDataParallel(net())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, nn.MSELoss(), log_dir=False, every=1) as analysis:
        for x, y in batches():
            out = model(x)
            unseen = out.clone().sub_(y).square().mean()
            (unseen if rank else nn.MSELoss()(out, y)).backward()
            sgd.step()
    return analysis.history, analysis.absent


def test_what_one_rank_lacks_all_leave_out(ran):
    (first, absent), (second, other) = ran(2, "lacking")
    assert first == second
    assert absent.keys() == other.keys() >= {"sharpness"}
    assert first["regularizer/R1"] and "loss/R_S" not in first


class OneHead(nn.Module):
    """Each rank trains a head of its own."""

    def __init__(self, which):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]).double()
        self.which = which

    def forward(self, x):
        return self.heads[self.which](x)


def apart(rank, size, _):
    model = DistributedDataParallel(OneHead(rank), find_unused_parameters=True)
    given = {"loss": nn.MSELoss(), "data": next(batches())}
    analysis = train(model, measures=[measures.Sharpness()], steps=1, **given)
    return analysis.history, analysis.absent


def test_ranks_that_train_other_parameters_get_no_curvature(ran):
    for history, absent in ran(2, "apart"):
        assert "the same parameters on every rank" in absent["sharpness"]
        assert not any(tag.startswith("sharpness") for tag in history)


def scheduled(rank, size, _):
    class Counts:
        name = "counts"
        needs = frozenset({"gradients"})
        passes = 10.0
        taken = ()

        def __call__(self, snapshot):
            self.taken += (snapshot.step,)
            time.sleep(0.002 * (1 + snapshot.ranks.rank))
            return {"counts/x": 1.0}

    counts = Counts()
    model = DistributedDataParallel(net())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = next(batches())
    with tdi.attach_analysis(
        model, log_dir=False, measures=[counts, measures.Condensation()], budget=0.2
    ) as analysis:
        expect = analysis._cadence.expect  # all but the first rank could never pay
        analysis._cadence.expect = lambda _: expect(1e6 if rank else 1e-4)
        for _ in range(4800 // size**2):
            nn.MSELoss()(model(x), y).backward()
            sgd.step()
    return counts.taken, analysis.history, analysis.cost_share


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_on_the_schedule(ran, size):
    found = ran(size, "scheduled")
    taken, history, share = found[0]
    assert len(found) == size and len(taken) > 1 and share < 0.4
    assert all(x == taken and y == history for x, y, _ in found)


def written(rank, size, folder):
    analysis = train(DistributedDataParallel(net()), log_dir=folder)
    return folder, sorted(analysis.latest)


def test_only_the_first_rank_writes(ran):
    (folder, tags), (_, same) = ran(2, "written")
    assert tags == same
    assert len(list(Path(folder).iterdir())) == 1


def unchanged(rank, size, wrap, _):
    states = []
    rows = part(rank, size, True)
    for attached in (False, True):
        model = WRAPS[wrap](net())
        torch.manual_seed(rank)
        adam = torch.optim.Adam(model.parameters(), lr=0.1)
        with contextlib.ExitStack() as stack:
            if attached:
                watch = tdi.attach_analysis(model, log_dir=False, every=1)
                stack.enter_context(watch)
            for x, y in batches():
                nn.MSELoss()(model(x[rows]), y[rows]).backward()
                adam.step()
        tensors = [*model.parameters(), *(x.grad for x in model.parameters())]
        whole = [getattr(x, "full_tensor", lambda x=x: x)().detach() for x in tensors]
        states.append(copy.deepcopy([*whole, torch.get_rng_state()]))
    assert watch.latest["regularizer/R1"] > 0
    return states


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_training_is_bit_identical(ran, wrap):
    for bare, watched in ran(2, f"unchanged {wrap}"):
        assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))


class Spare(nn.Module):
    """A net beside a layer that no pass uses."""

    def __init__(self):
        super().__init__()
        self.net, self.spare = net(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.net(x)


def spare(rank, size, options, _=None):
    model = Spare()
    if options:
        model = DistributedDataParallel(model, **options)
    watch = [measures.Regularizer(), measures.Sharpness()]
    analysis = train(model, part(rank, size, True), measures=watch)
    return analysis.history, analysis.absent


class OwnLoss(nn.Module):
    """A model that returns its own loss, with one site or two."""

    def __init__(self, two):
        super().__init__()
        first = [nn.Linear(5, 5).double(), nn.Tanh(), nn.Dropout(0.2)] if two else []
        self.net = nn.Sequential(*first, *net())

    def forward(self, x, y):
        logits = self.net(x)
        return {"logits": logits, "loss": nn.functional.mse_loss(logits, y)}


def own_loss(rank, size, two, _):
    """One rank has a single sample."""
    rows = slice(15) if rank == 0 else slice(15, None)
    model = DistributedDataParallel(OwnLoss(two))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = [measures.Regularizer(128)]
    with tdi.attach_analysis(model, log_dir=False, every=1, measures=watch) as own:
        for x, y in batches():
            sgd.zero_grad()
            model(x[rows], y[rows])["loss"].backward()
            sgd.step()
    return own.history, own.absent, own.notes["regularizer/R1"]


@pytest.mark.parametrize("sites", [("net.2",), ("net.2", "net.5")])
def test_parts_of_all_ranks_add_up_to_r1(ran, sites):
    name = "own loss" if len(sites) == 1 else "own loss of two sites"
    (found, absent, said), (other, _, too) = ran(2, name)
    assert not absent and said == too
    shared = [tag for tag in found if tag.startswith(("loss/", "regularizer/R1"))]
    assert "loss/R_S" in shared and all(found[tag] == other[tag] for tag in shared)
    r1, error = "regularizer/R1", "regularizer/R1_standard_error"
    for step in range(STEPS):
        parts = [found[f"{r1}/{site}"][step][1] for site in sites]
        errors = [found[f"{error}/{site}"][step][1] for site in sites]
        if len(sites) == 1:
            assert parts[0] == pytest.approx(found[r1][step][1], rel=1e-12)
            assert errors[0] == pytest.approx(found[error][step][1], rel=1e-12)
        off = abs(sum(parts) - found[r1][step][1])
        assert off < 4 * sum(errors) < 2 * found[r1][step][1]


@pytest.mark.parametrize("how", ["find_unused_parameters", "static_graph"])
def test_the_loss_is_found_where_ddp_hands_out_copies(ran, how):
    alone, _ = spare(0, 1, {})
    for history, absent in ran(2, f"spare {how}"):
        assert not absent
        for tag in ("loss/R_S", "regularizer/R1"):
            assert len(history[tag]) == STEPS
            torch.testing.assert_close(history[tag], alone[tag], rtol=1e-8, atol=0)


def uneven(rank, size, first, _):
    """The first rank has three batches more than the others."""
    rows, ends = part(rank, size, True), []
    for attached in (False, True):
        inner = net(0.0)
        model = inner if first else DistributedDataParallel(inner)
        with contextlib.ExitStack() as stack:
            if attached:
                analysis = tdi.attach_analysis(model, log_dir=False, every=1)
                stack.enter_context(analysis)
            model = DistributedDataParallel(inner) if first else model
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            x, y = next(batches())
            with Join([model]):
                for _ in range(2 if rank else 5):
                    sgd.zero_grad()
                    nn.MSELoss()(model(x[rows]), y[rows]).backward()
                    sgd.step()
        ends.append([x.detach() for x in model.parameters()])
    x, y = x[rows], y[rows]
    risk = float(nn.MSELoss()(net(0.0)(x), y).detach())
    return ends, analysis.history["loss/R_S"], analysis.notes["ranks"], risk


@pytest.mark.parametrize("attached", ["first", "after"])
def test_inside_join_ranks_measure_for_themselves(ran, attached):
    for rank, (ends, risks, note, first) in enumerate(ran(2, f"uneven {attached}")):
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        assert [step for step, _ in risks] == list(range(2 if rank else 5))
        assert risks[0][1] == pytest.approx(first)
        assert "Join" in note


def attached_first(rank, size, wrap, folder):
    """What is wrapped after attaching is found at the first step."""
    model = net()
    rows = part(rank, size, False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tdi.attach_analysis(
            model, log_dir=folder, every=1, measures=PRECISE
        ) as analysis:
            called = WRAPS[wrap](model)
            sgd = torch.optim.SGD(called.parameters(), lr=0.0)
            for x, y in batches():
                sgd.zero_grad()
                nn.MSELoss()(called(x[rows]), y[rows]).backward()
                sgd.step()
    own = [str(w.message) for w in caught if "torch_dropout_ir" in str(w.message)]
    return analysis.history, own, folder


def attached_after_a_trial(rank, size, wrap, folder):
    """One rank has tried the model by itself before: it has attached once more."""
    if not rank:
        train(net(), steps=1)
    return attached_first(rank, size, wrap, folder)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("when", ["first", "after a trial"])
def test_a_model_that_is_wrapped_later_is_measured_as_one(ran, wrap, when):
    found = ran(2, f"attached {when} {wrap}")
    alone = measured(0, 1, "none", 0.5, 0.0, False, True)[0]
    for history, warned, _ in found:
        assert not warned and history == found[0][0]
        for tag in ("loss/R_S", "regularizer/R1", "sharpness/trace"):
            torch.testing.assert_close(history[tag], alone[tag], rtol=1e-8, atol=0)
    assert len(list(Path(found[0][2]).iterdir())) == 1


def attached_by_one(rank, size, wrap, _):
    """Only the first rank attaches, before the model is wrapped."""
    distributed.LATE = datetime.timedelta(seconds=2)
    model, agreed, waits = net(), distributed.Meeting.agreed, []

    def counted(meeting, limit):
        waits.append(limit)
        return agreed(meeting, limit)

    with contextlib.ExitStack() as stack:
        if not rank:
            patch = mock.patch.object(distributed.Meeting, "agreed", counted)
            stack.enter_context(patch)
            analysis = tdi.attach_analysis(model, log_dir=False, every=1)
            stack.enter_context(analysis)
        called = WRAPS[wrap](model)
        sgd = torch.optim.SGD(called.parameters(), lr=0.1)
        for x, y in batches():
            nn.MSELoss()(called(x), y).backward()
            sgd.step()
    if rank:
        return None
    return len(waits), analysis.absent, analysis.notes, sorted(analysis.history)


def test_what_one_rank_cannot_gather_alone_it_leaves(ran):
    (waits, absent, *_), _ = ran(2, "~attached by one fsdp")
    assert "sharded over processes that do not measure together" in absent["capture"]
    assert waits == 1


def test_a_rank_that_attached_alone_waits_once_and_measures_its_batch(ran):
    (waits, absent, notes, tags), _ = ran(2, "~attached by one ddp")
    assert waits == 1 and not absent
    assert "each process measures and writes for itself" in notes["ranks"]
    assert {"regularizer/R1", "sharpness/trace"} < set(tags)


def older(rank, size, _):
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    try:
        tdi.attach_analysis(model, log_dir=False)
    except TypeError as err:
        return str(err)
    return ""


def test_what_shards_otherwise_is_refused(ran):
    for said in ran(2, "older"):
        assert "Shard it by `torch.distributed.fsdp.fully_shard`" in said


def unlike(rank, size, _):
    try:
        tdi.attach_analysis(
            DistributedDataParallel(net()), log_dir=False, every=rank + 1
        )
    except ValueError as err:
        return str(err)
    return ""


def test_ranks_that_would_part_are_refused(ran):
    for rank, said in enumerate(ran(2, "unlike")):
        assert "the same `every`" in said and f"every={rank + 1}" in said


def loaded_by_one(rank, size, _):
    distributed.WAIT = datetime.timedelta(seconds=2)
    with tdi.attach_analysis(
        DistributedDataParallel(net()), log_dir=False, every=1
    ) as analysis:
        said = ""
        if rank == 0:
            try:
                analysis.load_state_dict(analysis.state_dict())
            except RuntimeError as err:
                said = str(err)
        dist.barrier()
        try:
            analysis.load_state_dict(analysis.state_dict() | {"step": rank})
        except ValueError as err:
            return said, str(err)
    return said, ""


def test_a_state_is_loaded_on_every_rank_and_the_same_one(ran):
    (first, other), (_, same) = ran(2, "~loaded by one")
    assert "load_state_dict: expected a call on each of the 2 ranks" in first
    assert "at step 0" in other and "at step 1" in same


def forgotten(rank, size, _):
    distributed.WAIT = datetime.timedelta(seconds=2)
    model = DistributedDataParallel(net())
    said = ""
    if rank == 0:
        try:
            tdi.attach_analysis(model, log_dir=False)
        except RuntimeError as err:
            said = str(err)
    dist.barrier()
    return said


def test_attaching_on_one_rank_alone_is_said(ran):
    first, _ = ran(2, "~forgotten")
    assert "Call it on every rank" in first


def replica(rank, size, _):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net(), steps=1)
    return [str(w.message) for w in caught]


def test_a_replica_that_does_not_say_so_is_warned_of(ran):
    for said in ran(2, "replica"):
        assert any("Wrap it, and attach on every rank" in text for text in said)


class Meets(nn.Module):
    """Sees the mean over the batches of all ranks: a pass is a collective."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, h):
        mean = h.mean(0)
        if dist.is_initialized():
            mean = all_reduce(mean) / dist.get_world_size()
        return h + self.share * mean


def first_layers():
    torch.manual_seed(0)
    return nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)


def met_below():
    into, _, out = first_layers()
    return nn.Sequential(into, Meets(1e-3), nn.Dropout(0.5), out).double()


def met_above():
    into, bend, out = first_layers()
    out.weight.data /= 16  # few signs of curvature on a rank
    return nn.Sequential(into, bend, nn.Dropout(0.5), Meets(16.0), out).double()


def weighed_by_outputs(f, y):
    return (f.detach().square().clamp(min=25) * (f - y) ** 2).mean()


def bent_both_ways(f, y):
    return (1 - (f - y).cos()).mean()


def linear_in_some(f, y):
    return torch.where(y > 0, f, f * f).mean()


def smooth(f, y):
    return (f - y).cosh().log().mean()


def unlike_batches(name):
    """A batch of which two ranks would say other things, and where to cut it."""
    x, y = next(batches())
    first = (torch.arange(ROWS) < ROWS // 2)[:, None]
    if name == "weighed":
        return x * torch.where(first, 100.0, 0.01), y, ROWS // 2
    if name == "bent":
        return x, torch.where(first, 0 * y, 2 + y / 9), ROWS // 2
    if name == "linear":
        return x, torch.where(first, y.abs() + 1, y), ROWS // 2
    return x, y, 1


UNLIKE = {
    "weighed": (met_below, weighed_by_outputs),
    "bent": (met_above, bent_both_ways),
    "linear": (met_above, linear_in_some),
    "one row": (met_above, smooth),
}


CURVATURE = measures.Sharpness(tol=1e-10, max_matvecs=400)


def parted(rank, size, name, watch, steps, _):
    """Whose answers on their own batches would part the ranks' ways."""
    make, loss = UNLIKE[name]
    model = DistributedDataParallel(make())
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    *batch, cut = unlike_batches(name)
    x, y = (t[cut:] if rank else t[:cut] for t in batch)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[watch]
    ) as analysis:
        for _ in range(steps):
            loss(model(x), y).backward()
            sgd.step()
    return analysis.history, analysis.absent, analysis.notes


RAISES = {
    "regularizer": (measures.Regularizer(), (1, 2, 3, 9)),
    "dropout_noise": (measures.DropoutNoise(), (1, 2, 4)),
    "sharpness": (measures.Sharpness(max_matvecs=6, trace_matvecs=4), (1, 2, 3, 4)),
}


def raising(rank, size, name, at, _):
    """The loss of one rank raises in the middle of a measurement."""
    calls = itertools.count(1)

    def loss(f, y):
        if rank and next(calls) == at:
            raise ValueError("no label")
        return smooth(f, y)

    model, watch = DistributedDataParallel(met_above()), RAISES[name][0]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = next(batches())
    options = {"log_dir": False, "every": 1, "data": (x, y), "measures": [watch]}
    absent = []
    with tdi.attach_analysis(model, loss, **options) as analysis:
        for _ in range(4):
            sgd.zero_grad()
            smooth(model(x), y).backward()
            sgd.step()
            absent.append(dict(analysis.absent))
    steps = [step for step, _ in analysis.history.get("cost/seconds/" + name, ())]
    return absent[0], steps, [x.detach() for x in model.parameters()]


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name in RAISES for at in RAISES[name][1]]
)
def test_a_rank_whose_loss_raises_takes_no_other_with_it(ran, name, at):
    """Where passes meet the others would else wait in one, or abort."""
    assert max(ran(2, f"raises {name} {at} seconds")) < LIMIT / 4
    (others, steps, ends), (own, also, same) = ran(2, f"raises {name} {at}")
    assert "ValueError" in own[name] and "no label" in own[name]
    assert "another rank could not go on" in others[name]
    assert steps == also and steps[-1] == 3, "it is tried again"
    assert all(torch.equal(x, y) for x, y in zip(ends, same, strict=True))


def of_all_masks(net, h, loss, y):
    """R_1 of a layer whose samples do not meet, by every mask of a sample."""
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2.0]).double()] * h.shape[1])
    dropped = torch.stack([loss(net(h * m), y) for m in masks])
    return float(dropped.mean() - loss(net(h), y))


@pytest.mark.parametrize("name", UNLIKE)
def test_ranks_whose_passes_meet_decide_together(ran, name):
    """Else one waits in a pass for another that makes none."""
    assert max(ran(2, f"parted {name} seconds")) < LIMIT / 2
    (history, absent, notes), (other, also, _) = ran(2, f"parted {name}")
    assert history == other and "average over 8 masks" in notes["regularizer/R1"]
    assert absent.keys() == also.keys()
    value, error, part = (
        torch.tensor([x for _, x in history.get(f"regularizer/R1{of}", ())]).double()
        for of in ("", "_standard_error", "/2")
    )
    many = MANY[name]
    assert len(value) == len(part) == many
    if name == "one row":  # too few masks of one row tell an error
        return
    net, (*batch, _) = UNLIKE[name][0](), unlike_batches(name)
    loss = UNLIKE[name][1]
    if name == "weighed":
        with torch.no_grad():
            truth = of_all_masks(net[3], net[:2](batch[0]), loss, batch[1])
    else:
        truth = tdi.regularizers.monte_carlo(net, batch, loss, num_masks=20000).value
    assert (value.mean() - truth).abs() < 4 * value.std() / many**0.5
    # A fit to eight draws has the factor 10 / 7 on purpose.
    assert 0.5 < error.square().mean() / value.var() < 2.2
    if name == "bent":  # of both signs, each on a rank
        whole = tdi.regularizers.gauss_newton(net, batch, loss, num_samples=None)
        assert (part.mean() - whole.value).abs() < 3 * part.std() / many**0.5


@pytest.mark.parametrize("name", ["weighed", "bent", "linear"])
def test_the_curvature_where_passes_meet_is_that_of_all(ran, name):
    (history, absent, notes), (other, *_) = ran(2, f"curved {name}")
    assert history == other
    negative = {"sharpness/loss_slice"} if name == "linear" else set()
    assert set(absent) == negative
    assert "passes of ranks meet" in notes["sharpness/trace"]
    net, (*batch, _) = UNLIKE[name][0](), unlike_batches(name)
    dense = tdi.sharpness.hessian(net, UNLIKE[name][1], tuple(batch)).dense()
    values = torch.linalg.eigvalsh(dense)
    top, trace, error = (
        history[f"sharpness/{tag}"][0][1]
        for tag in ("top_eigenvalue", "trace", "trace_standard_error")
    )
    assert top == pytest.approx(float(values[-1]), rel=1e-8)
    assert 0 < abs(trace - float(values.sum())) < 4 * error


SCENARIOS = {
    "noise": (noise_of_masks,),
    "own loss": (own_loss, False),
    "own loss of two sites": (own_loss, True),
    "drawn": (drawn,),
    "lacking": (lacking,),
    "apart": (apart,),
    "scheduled": (scheduled,),
    "replica": (replica,),
    "written": (written,),
}
for _wrap in ("ddp", "fsdp"):
    for _loss in ("mse", "cross_entropy"):
        _of_classes = _loss == "cross_entropy"
        SCENARIOS[f"joined {_loss} {_wrap}"] = (
            measured, _wrap, 0.5, 0.0, _of_classes, False,
        )  # fmt: skip
    SCENARIOS[f"trained {_wrap}"] = (measured, _wrap, 0.0, 0.1, False, True)
    SCENARIOS[f"counted {_wrap}"] = (counted, _wrap)
    for _where in (0, 2, 4) if _wrap == "ddp" else (2,):
        _bad = 1 if _wrap == "ddp" else 0
        SCENARIOS[f"fails {_wrap} {_where}"] = (failing, _wrap, _bad, _where)
    SCENARIOS[f"unchanged {_wrap}"] = (unchanged, _wrap)
for _name in UNLIKE:
    SCENARIOS[f"parted {_name}"] = (parted, _name, measures.Regularizer(), MANY[_name])
    SCENARIOS[f"curved {_name}"] = (parted, _name, CURVATURE, 1)
for _name, (_, _calls) in RAISES.items():
    for _at in _calls:
        SCENARIOS[f"raises {_name} {_at}"] = (raising, _name, _at)
for _option in ("find_unused_parameters", "static_graph"):
    SCENARIOS[f"spare {_option}"] = (spare, {_option: True})
SCENARIOS["uneven first"] = (uneven, True)
SCENARIOS["uneven after"] = (uneven, False)
SCENARIOS["older"] = (older,)
SCENARIOS["unlike"] = (unlike,)
for _wrap in ("ddp", "fsdp"):
    SCENARIOS[f"attached first {_wrap}"] = (attached_first, _wrap)
    SCENARIOS[f"attached after a trial {_wrap}"] = (attached_after_a_trial, _wrap)
# What one rank does alone takes the others' time.
for _wrap in ("ddp", "fsdp"):
    SCENARIOS[f"~attached by one {_wrap}"] = (attached_by_one, _wrap)
SCENARIOS["~loaded by one"] = (loaded_by_one,)
SCENARIOS["~forgotten"] = (forgotten,)
OF_FOUR = {
    "joined mse ddp", "joined cross_entropy fsdp", "fails ddp 2", "fails fsdp 2",
    "scheduled",
}  # fmt: skip
