"""Floor 4: one call that watches a model while somebody else's script trains it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from torch_dropout_ir.analysis import Analysis, Measure, Sink
from torch_dropout_ir.analysis.cadence import Cadence
from torch_dropout_ir.analysis.distributed import ranks_of
from torch_dropout_ir.analysis.measures import Sharpness, default_measures
from torch_dropout_ir.analysis.records import Postponed, warn
from torch_dropout_ir.analysis.root_hook import CompiledCall, RootHook
from torch_dropout_ir.analysis.steps import steps_model
from torch_dropout_ir.arguments import check_flag, check_module
from torch_dropout_ir.batches import fixed_batches
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.tensorboard import TensorBoardSink

# Times a pass: second derivatives of recurrent kernels go through single cells.
_CELLS: Final = {nn.LSTM: 5.0, nn.RNNBase: 2.5}


def unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model to measure and the one whose calls are to be watched.

    A compiled model is called through its wrapper and measured uncompiled; a
    data-parallel one is both called and measured inside.
    """
    inner = watched = model
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            watched = inner.module if watched is inner else watched
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            watched, inner = inner, inner._orig_mod  # type: ignore[assignment]
        else:
            return inner, watched


def check_data(model: nn.Module, who: str) -> None:
    """Raise a ValueError if a model has no data, as one made on the meta device."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, x in tensors if x.is_meta]
    if empty:
        raise ValueError(
            f"{who}: expected parameters and buffers with data, got {len(empty)} on "
            f"the meta device ({empty[0]!r} first). Materialize and initialize the "
            "model first."
        )


def _check(model: nn.Module, watched: nn.Module, optimizer: Optimizer | None) -> None:
    hooks = watched._forward_pre_hooks.values()
    own = any(isinstance(hook, RootHook) and hook.owner is not None for hook in hooks)
    if own or isinstance(getattr(watched, "_compiled_call_impl", None), CompiledCall):
        raise RuntimeError(
            "attach_analysis: this model has an analysis already. Use that one, or "
            "`detach()` it first."
        )
    if isinstance(watched, torch.jit.ScriptModule):
        raise TypeError(
            "attach_analysis: expected a model that runs in Python, got a scripted one "
            "(nothing sees its calls). Attach to a model of which parts are "
            "scripted, or script it for deployment alone."
        )
    if any("FullyShardedDataParallel" == type(m).__name__ for m in model.modules()):
        raise TypeError(
            "attach_analysis: expected a model sharded by `fully_shard`, got one in "
            "FullyShardedDataParallel (FSDP1), whose parameters are flat pieces. "
            "Shard it by `torch.distributed.fsdp.fully_shard`, then attach."
        )
    check_data(model, "attach_analysis")
    if optimizer is not None and not steps_model(optimizer, model):
        raise ValueError(
            "attach_analysis: expected an `optimizer` that steps parameters of "
            f"`model`, got a {type(optimizer).__name__} over others. Make it from "
            "`model.parameters()`, or leave `optimizer` out and it is found."
        )


def _frozen(model: nn.Module) -> str:
    """Why a model does not train, or not as a whole; empty where it does."""
    packed = (torch.int8, torch.uint8)
    kinds = {str(x.dtype) for x in model.parameters() if x.dtype in packed}
    types = {type(m) for m in model.modules()}
    kinds |= {x.__name__ for x in types if ".quantized" in x.__module__}
    if any(x.requires_grad for x in model.parameters()):
        if not kinds:
            return ""
        return (
            f"{type(model).__name__} is quantized in part ({', '.join(kinds)}): "
            "where that has no derivative, measures that need it are absent"
        )
    said = f"{type(model).__name__} has no parameter that requires a gradient"
    if kinds:
        said += f"; it is quantized ({', '.join(sorted(kinds))})"
    return f"{said}: there is no training to watch, and no sharpness to measure"


def _first_batches(data: Any, model: nn.Module) -> list[Batch]:
    """Return batches that stay as they are; raise a ValueError if there are none."""
    with preserved_rng(model):
        batches = fixed_batches(data)
    if not batches:
        raise ValueError(
            "attach_analysis: expected `data` to hold at least one batch, got none. A "
            "generator gives its batches once: pass the loader, or a list"
        )
    return batches


def _instances(given: Any, what: str, needed: tuple[str, ...]) -> list[Any]:
    one = not isinstance(given, Iterable)
    found = [given] if one else list(given)
    for x in found:
        if one or isinstance(x, type) or not all(hasattr(x, name) for name in needed):
            raise TypeError(
                f"attach_analysis: expected `{what}` to be a list of instances with "
                f"{', '.join(f'`{name}`' for name in needed)}, got {x!r}"
            )
    return found


def _passes(
    measures: list[Measure], batches: list[Batch] | None, model: nn.Module
) -> dict[str, float]:
    """About how many passes of one batch the measures take, by name."""
    found = {m.name: getattr(m, "passes", 0.0) for m in measures}
    cells = (times for kind, times in _CELLS.items() for m in model.modules()
             if isinstance(m, kind))  # fmt: skip
    slower = max(cells, default=1.0)
    for m in measures:
        found[m.name] *= len(batches or [None]) if "batches" in m.needs else 1
        found[m.name] *= slower if isinstance(m, Sharpness) else 1.0
    return found


def _tensorboard(log_dir: str | os.PathLike[str] | None) -> Sink:
    """Return the sink of a run, which only the first of several processes opens now.

    Where the model is wrapped before its first step, it alone writes.
    """
    started = dist.is_available() and dist.is_initialized()
    rank = str(dist.get_rank()) if started else os.environ.get("RANK", "0")
    later = Postponed(lambda: TensorBoardSink(log_dir))
    return TensorBoardSink(log_dir) if rank == "0" else later


def attach_analysis(
    model: nn.Module,
    loss: Any = None,
    *,
    optimizer: Optimizer | None = None,
    log_dir: str | os.PathLike[str] | Literal[False] | None = None,
    every: int | str = "auto",
    budget: float = 0.05,
    data: Any = None,
    convert: bool = False,
    measures: Sequence[Measure] | None = None,
    sinks: Sequence[Sink] | None = None,
) -> Analysis:
    """Watch what dropout does to ``model`` while a script trains it.

    Call it once before the training loop. At some optimizer steps, just before the
    update, R_1, R_2, mask statistics, condensation and sharpness are measured on the
    batch of that step and written out. With ``convert=False`` training is bit for bit
    what it is without the analysis: parameters, gradients, buffers, modes and
    generators.

    A model wrapped in ``DistributedDataParallel``, or sharded by ``fully_shard``, is
    measured by all its ranks together, on their batches as one: call it on each of
    them, after wrapping. Only the first one writes.

    Args:
        model: The model that the script trains.
        loss: The loss that it minimizes: ``"mse"`` and ``"cross_entropy"`` (torch's,
            with their default reduction), a loss module, or a callable
            ``(outputs, targets) -> scalar``. None: what the script makes of the
            model's outputs until it calls ``backward()``, once it is seen: a loss
            module, a loss function, a formula, or a loss that the model returns.
        optimizer: The optimizer whose steps count; by default the first that steps
            parameters of the model.
        log_dir: A TensorBoard run directory; None: ``runs/<time>_<host>``; False: none.
        every: Optimizer steps between measurements, or ``"auto"``: as often as
            ``budget`` pays for.
        budget: Share of the time that ``"auto"`` may take. That of the first half
            minute is there from the start: what it pays for is measured at once, the
            rest (sharpness of a large model) as soon as the budget has saved for it.
        data: A batch ``(inputs, targets)`` or batches for the measures of the loss
            surface, also where targets are not seen; of a loader the first eight are
            taken, now. By default the batch last seen, where its targets are known.
        convert: If True, torch's dropout modules become ours in place until
            :meth:`Analysis.detach`: faster, with statistics of every step, and with
            other masks than torch would draw.
        measures: Measures in place of the default ones.
        sinks: Further places for the records.

    Returns:
        The analysis; also a context manager that detaches at its end.

    Raises:
        TypeError: If ``model`` is no module, wholly scripted or sharded by FSDP1,
            ``loss`` is neither known nor callable, or ``measures`` or ``sinks`` are
            none.
        ValueError: If ``loss``, ``every`` or ``budget`` is out of range, ``data`` is
            empty, parameters have no data yet (meta device), or ``optimizer`` steps
            none of the model's.
        RuntimeError: If the model has an analysis already, or one of the ranks that
            train it does not attach.
        OSError: If ``log_dir`` cannot be written.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        >>> criterion = nn.MSELoss()
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with attach_analysis(net, log_dir=False, every=1) as analysis:
        ...     criterion(net(torch.ones(5, 4)), torch.zeros(5, 2)).backward()
        ...     sgd.step()
        >>> analysis.latest["regularizer/R1"] > 0
        True
    """  # noqa: DOC502 (raised by the parts that check)
    check_module("attach_analysis", model)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            "attach_analysis: expected `optimizer` to be a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}"
        )
    check_flag("attach_analysis", "convert", convert)
    inner, watched = unwrap(model)
    # Inside a trainer's wrapper, whose steps torch's hooks see.
    while isinstance(own := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = own
    _check(inner, watched, optimizer)
    resolved = None if loss is None else resolve_loss(loss)
    batches = None if data is None else _first_batches(data, inner)
    chosen = default_measures()
    if measures is not None:
        chosen = _instances(measures, "measures", ("name", "needs", "__call__"))
    further = _instances(() if sinks is None else sinks, "sinks", ("write", "close"))
    names, passes = [m.name for m in chosen], _passes(chosen, batches, inner)
    cadence = Cadence(every, budget, names, passes)
    ranks = ranks_of(model)
    ranks.wait_for_all("attach_analysis")
    with ranks.together():
        ranks.check_alike("attach_analysis", f"{cadence.setting}, budget {budget}")
        places = [] if ranks.rank else further
        if log_dir is not False and not ranks.rank:
            places.append(_tensorboard(log_dir))
    analysis = Analysis(
        inner, watched, resolved, optimizer, cadence, chosen, places, batches, convert,
        ranks,
    )  # fmt: skip
    analysis.attach()
    frozen = _frozen(inner)
    if frozen:
        analysis.notes["training"] = frozen
        warn(frozen)
    return analysis
