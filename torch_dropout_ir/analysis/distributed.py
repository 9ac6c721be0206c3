"""Ranks that train one model together also measure it together.

Semantics:

* Inside ``torch.distributed.algorithms.Join`` a rank may end before the others, and no
  exchange is safe: there each rank measures its own batch.
* Batches differ from rank to rank; records are those of the joined batch. What a rank
  contributes is a sum, and sums merge by one ``all_reduce(SUM)``: every rank holds the
  same bits, hence takes the same decisions.
* Every exchange starts with a round in which each rank says whether it is well and what
  it came for. A rank that fails says so in the round in which the others are, and all
  leave the measure together: nobody waits for one that gave up.
* Time is the first rank's.
"""

from __future__ import annotations

import contextlib
import datetime
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_dropout_ir.analysis.meetings import Meeting, processes
from torch_dropout_ir.analysis.records import warn
from torch_dropout_ir.analysis.sharded import is_sharded
from torch_dropout_ir.collectives import released
from torch_dropout_ir.generators import preserved_rng

PEER: Final = (
    "another rank could not go on (it says why), so that no rank has waited for it"
)
_UNEVEN: Final = (
    "of the first rank's batch alone: inside `Join` a rank may end before the others"
)
# Odd, and within the 32 bits of a seed that the generator of the CPU takes.
_STRIDE: Final = 0x9E3779B9
WAIT: Final = datetime.timedelta(minutes=5)
LATE: Final = datetime.timedelta(seconds=30)  # a backward pass has brought all here


class Ranks:
    """The processes that train one model; one process alone has no ``group``.

    Numbers are exchanged on ``device``; ``wrapper`` is the model where it is in DDP.
    """

    def __init__(
        self,
        group: Any = None,
        device: torch.device | str | None = None,
        wrapper: nn.Module | None = None,
    ) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        self._all = 1 if group is None else dist.get_world_size(group)
        self.group = group
        self._device = device
        self._wrapper: Any = None if wrapper is None else weakref.ref(wrapper)
        self._left = False
        self._apart = ""

    def join_late(self, model: nn.Module, setting: str) -> bool:
        """Return whether these, alone so far, are from now on those of a wrapped model.

        Where it is neither wrapped nor agreed on by all, they are told to be alone.
        """
        if processes() == 1:
            return False
        found = ranks_of(model)
        alone = found.group is None
        if not alone and Meeting(found.group, "late", setting).agreed(LATE):
            vars(self).update(vars(found))
            return True
        self._apart = (
            f"{processes()} processes run, but this model is neither wrapped in "
            "DistributedDataParallel nor sharded by `fully_shard`, or not all of them "
            "have attached to it alike: each process measures and writes for itself"
        )
        warn(
            f"{self._apart}. Wrap it, and attach on every rank with the same arguments."
        )
        return False

    @property
    def size(self) -> int:
        """Number of processes that measure together."""
        return 1 if self.note else self._all

    @property
    def note(self) -> str:
        """Why records are not of all processes; empty where they are."""
        wrapper = self._wrapper and self._wrapper()
        uneven = wrapper is not None and wrapper._join_config.enable
        return _UNEVEN if uneven else self._apart

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do what is inside on all ranks or on none: where one raises, all do."""
        try:
            yield
            self._meet("end")
        except BaseException:
            if not self._left:
                with contextlib.suppress(RuntimeError):
                    self._meet("end", failed=True)
            raise
        finally:
            self._left = False

    def wait_for_all(self, call: str) -> None:
        """Wait until all ranks have made this ``call``; raise after five minutes."""
        if self.size == 1:
            return
        meeting = Meeting(self.group, "all")
        if not meeting.wait(WAIT):
            meeting.called_off()
            raise RuntimeError(
                f"{call}: expected a call on each of the {self.size} ranks that train "
                f"this model, some made none within {WAIT}. Call it on every rank; "
                "only the first one writes."
            )

    def check_alike(self, call: str, setting: str) -> None:
        """Raise a ValueError if ranks came with different values of a ``setting``."""
        least, most = self._meet("setting", _hash(setting))
        if least != most:
            raise ValueError(
                f"{call}: expected the same `every`, `budget`, `measures` and state on "
                f"each of the {self.size} ranks, got others on some; here: {setting}"
            )

    def check_shards(self, model: nn.Module) -> None:
        """Refuse a model whose shards others hold, who are not asked for them."""
        shards: list[Any] = [x for x in model.parameters() if is_sharded(x)]
        if self.size == 1 and any(x.device_mesh.size() > 1 for x in shards):
            raise RuntimeError(
                "the model is sharded over processes that do not measure together: "
                "attach on every rank, after `fully_shard` or before the first step"
            )

    def _meet(self, what: str, number: int = 0, failed: bool = False) -> list[int]:
        """Return the least and the largest of the ranks' numbers, if all are well."""
        if self.size == 1:
            return [number, number]
        if self._left:  # nobody is there any more
            raise RuntimeError(PEER)
        place, given = _hash(what), (number, -number)
        said = torch.tensor([failed, place, -place, *given], device=self._device)
        with released(said):
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self.group)
        failures, last, first, most, least = said.tolist()
        if failures or last != -first:
            self._left = True
            raise RuntimeError(PEER)
        return [-least, most]

    def sum_of(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor that has one shape on all of them."""
        if self.size == 1:
            return x
        self._meet(f"tensor {list(x.shape)}")
        total = x.detach().clone().to(self._device)
        with released(total):
            dist.all_reduce(total, group=self.group)
        return total.to(x.device)

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the sum over ranks of each number; a missing one counts as 0."""
        if self.size == 1:
            return dict(numbers)
        names = sorted(numbers)
        least, most = self._meet("numbers", _hash("\n".join(names)))
        if least != most:
            every: list[list[str]] = [[]] * self.size
            dist.all_gather_object(every, names, group=self.group)
            names = sorted(set().union(*every))
        values = [numbers.get(name, 0.0) for name in names]
        total = self.sum_of(torch.tensor(values, dtype=torch.float64, device="cpu"))
        return dict(zip(names, total.tolist(), strict=True))

    def first(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of the first rank."""
        if self.size == 1:
            return dict(numbers)
        own = 0.0 if self.rank else 1.0
        return self.sum({name: own * value for name, value in numbers.items()})

    def first_seed(self) -> int:
        """Return the seed of the first rank's generator, as far as a float holds it."""
        return int(self.first({"seed": float(torch.initial_seed() % 2**52)})["seed"])

    def most(self, count: int, of: str) -> int:
        """Return the largest of the ranks' numbers, which must be of the same."""
        return self._meet(f"most {of}", count)[1]

    def join(
        self,
        weight: float | None,
        means: Mapping[str, float],
        variances: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        r"""Return means over the joined batch, and variances of such means.

        .. math:: \sum_r w_r x_r, \qquad \sum_r w_r^2 v_r, \qquad
            w_r = n_r / \sum_s n_s

        ``weight`` is the number of terms :math:`n_r` that this rank's means are over;
        None where they are sums: then all :math:`w_r` are 1.
        """
        given = dict(variances or {})
        if self.size == 1:
            return dict(means), given
        n = 1.0 if weight is None else weight
        sums = {f"mean {name}": n * x for name, x in means.items()}
        sums |= {f"variance {name}": n * n * x for name, x in given.items()}
        total = self.sum({**sums, "weight": n})
        whole = 1.0 if weight is None else total["weight"]
        return (
            {name: total[f"mean {name}"] / whole for name in means},
            {name: total[f"variance {name}"] / whole**2 for name in given},
        )

    def share(self, weight: float | None) -> float:
        """Return what a mean of this rank counts for in that of all; 1 for sums."""
        if weight is None:
            return 1.0
        return weight / self.sum({"weight": weight})["weight"]

    def own_draws(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Give this rank random draws of its own; a measure's are common else."""
        if self.size == 1:
            return contextlib.nullcontext()
        seed = (torch.initial_seed() + self.rank * _STRIDE) % 2**62
        return preserved_rng(model, seed)


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def ranks_of(model: nn.Module) -> Ranks:
    """Return the ranks that train ``model``: of DDP's group, or of FSDP2's mesh."""
    if processes() == 1:
        return Ranks()
    group: Any = None
    wrapper = None
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group, wrapper = model.process_group, model
    else:
        sharded: list[Any] = [x for x in model.parameters() if is_sharded(x)]
        meshes = [x.device_mesh for x in sharded]
        if meshes:
            one = meshes[0].ndim == 1
            group = meshes[0].get_group() if one else dist.group.WORLD
    if group is None or dist.get_world_size(group) == 1:
        return Ranks()
    device = next(iter(model.parameters())).device
    where = "cpu" if dist.get_backend(group) == "gloo" else device
    return Ranks(group, where, wrapper)
