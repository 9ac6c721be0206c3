"""What collectives leave behind, and what ranks decide together."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from torch_dropout_ir import collectives
from torch_dropout_ir.analysis import distributed
from torch_dropout_ir.collectives import released
from torch_dropout_ir.sharpness.ranks import RankSums


class Late:
    """A collective of which a thread lets go some time after it is done."""

    def __init__(self):
        self.holds = []

    def __call__(self, *given, group):
        gathered = isinstance(given[0], list)
        hold = [x.view(-1) for x in (given[0] if gathered else given[:1])]
        for x in hold if gathered else ():  # all ranks say the same
            x.copy_(given[1])
        self.holds.append(hold)
        threading.Timer(0.2 if gathered else 0.05, hold.clear).start()


@pytest.fixture
def late(monkeypatch):
    found = Late()
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(dist, name, found)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: rank)
    return found


def test_sums_of_a_measure_leave_nothing_to_a_thread(late, monkeypatch):
    ranks = distributed.Ranks("group", "cpu")
    monkeypatch.setattr(ranks, "_meet", lambda *_: True)
    ranks.sum_of(torch.ones(3))
    assert late.holds and not any(late.holds)


def test_the_round_in_which_ranks_meet_leaves_nothing_to_a_thread(late, monkeypatch):
    held = torch.tensor([0.0, 1, 1, 1, 1])
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: held)
    with pytest.raises(RuntimeError, match="another rank"):
        distributed.Ranks("group", "cpu")._meet("end")
    assert late.holds and not any(late.holds)


@pytest.mark.parametrize("what", ["sum", "broadcast"])
def test_products_leave_nothing_to_a_thread(late, what):
    ranks = RankSums("group")
    if what == "broadcast":
        ranks.broadcast(torch.ones(3))
    else:
        ranks.sum(torch.ones(3), 1.0, None, torch.ones(1))
    assert late.holds and not any(late.holds)


def test_what_others_hold_is_not_waited_for():
    x = torch.ones(3)
    view = x.view(-1)
    began = time.monotonic()
    with released(x):
        pass
    assert time.monotonic() - began < 0.5 and view._base is x


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_two_ranks_decide_together(own, other):
    def ask(number, of):
        """The other rank asks the same."""
        theirs = {"any": other, "all": not other, "number": 3}[of]
        return max(number, theirs)

    with collectives.together(ask):
        assert not collectives.alone()
        assert collectives.some(own, "any") == (own or other)
        assert collectives.every(own, "all") == (own and other)
        assert collectives.most(2, "number") == 3
    assert collectives.alone()
    collectives.go_on("forward")  # where nobody is asked
    assert collectives.some(own, "any") == collectives.every(own, "all") == own
    assert collectives.most(2, "number") == 2
