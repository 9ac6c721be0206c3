"""Curvature of batches spread over ranks: one answer on 1, 2 and 4 processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from torch_dropout_ir import sharpness


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4), nn.Tanh(),
        nn.Linear(4, 2),
    )  # fmt: skip
    return net.double()


def pieces():
    """Ragged batches, for 1, 2 or 4 ranks."""
    torch.manual_seed(1)
    x, y = torch.randn(20, 3).double(), torch.randint(2, (20,))
    return list(zip(x.split([3, 7, 2, 8]), y.split([3, 7, 2, 8]), strict=True))


def answers(net, batches, group, seed=0):
    """Everything that must not depend on the number of ranks, seeded apart."""
    out = {}
    for name, kind, masks in (
        ("hessian", sharpness.hessian, "off"),
        ("ggn", sharpness.ggn, "off"),
        ("masked", sharpness.hessian, 3),
    ):
        op = kind(net, "cross_entropy", batches, masks=masks, group=group)
        out[name] = op.dense()
    op = sharpness.hessian(net, "cross_entropy", batches, group=group)
    torch.manual_seed(seed)  # ranks draw apart
    out["top"] = sharpness.top_eigenvalues(op, 2, tol=1e-9).values
    return out


def run(rank, size, path):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path / 'ranks'}", rank=rank, world_size=size
    )
    own = pieces()[rank::size]
    found = answers(model(), own, dist.group.WORLD, 100 + rank)
    net = nn.parallel.DistributedDataParallel(model())
    op = sharpness.hessian(net, "cross_entropy", own)
    found["ddp"] = op.dense()
    v = torch.full((op.shape[0],), float(rank + 1), dtype=torch.float64)
    found["first"] = op @ v
    assert float(v[0]) == rank + 1
    # A rank that fails, and one without samples, leave nobody waiting.
    bad = [(x * float("nan"), y) for x, y in own] if rank == size - 1 else own
    try:
        sharpness.hessian(net, "cross_entropy", bad * 2) @ v
    except (ValueError, RuntimeError) as err:
        found["error"] = str(err)
    some = own if rank == 0 else []
    found["some"] = sharpness.hessian(net, "cross_entropy", some).dense()
    dist.barrier()
    torch.save(found, path / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_the_answer_is_that_of_one_rank(size, tmp_path):
    expected = answers(model(), pieces(), None)
    # Forked, for importing torch takes each process longer than all the rest.
    mp.start_processes(run, (size, tmp_path), nprocs=size, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for rank, got in enumerate(found):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=lambda m, n=name: n + m)
        torch.testing.assert_close(got["ddp"], expected["hessian"])
        torch.testing.assert_close(got["first"], expected["hessian"].sum(1))
        said = "finite" if rank == size - 1 else "another rank"
        assert said in got["error"]
    alone = sharpness.hessian(model(), F.cross_entropy, pieces()[0::size]).dense()
    torch.testing.assert_close(found[-1]["some"], alone)
