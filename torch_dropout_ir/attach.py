"""Floor 4: one call that watches a model while somebody else's script trains it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from torch_dropout_ir.analysis import Analysis, Measure, Sink
from torch_dropout_ir.analysis.cadence import Cadence
from torch_dropout_ir.analysis.capture import RootHook
from torch_dropout_ir.analysis.measures import default_measures
from torch_dropout_ir.functional import fixed_batches, preserved_rng
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.tensorboard import TensorBoardSink


def unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model to measure and the one whose calls are to be watched.

    A compiled model is called through its wrapper and measured uncompiled; a
    data-parallel one is both called and measured inside.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    inner = getattr(model, "_orig_mod", model)
    return (inner if isinstance(inner, nn.Module) else model), model


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

    Args:
        model: The model that the script trains.
        loss: The loss that it minimizes: ``"mse"`` and ``"cross_entropy"`` (torch's,
            with their default reduction), a loss module, or a callable
            ``(outputs, targets) -> scalar``. None: the module that the script calls on
            the model's output, once it is seen.
        optimizer: The optimizer whose steps count; by default the first that steps
            parameters of the model.
        log_dir: A TensorBoard run directory; None: ``runs/<time>_<host>``; False: none.
        every: Optimizer steps between measurements, or ``"auto"``: as often as
            ``budget`` pays for.
        budget: Share of the time that ``"auto"`` may take. The first measurement is
            taken on credit.
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
        TypeError: If ``model`` is no module, or ``loss`` is neither known nor callable.
        ValueError: If ``loss``, ``every`` or ``budget`` is out of range.
        RuntimeError: If the model has an analysis already.
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
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"attach_analysis: expected `model` to be an nn.Module, got "
            f"{type(model).__name__}"
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            "attach_analysis: expected `optimizer` to be a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}"
        )
    inner, watched = unwrap(model)
    for hook in watched._forward_pre_hooks.values():
        if isinstance(hook, RootHook) and hook.call is not None:
            raise RuntimeError(
                "attach_analysis: this model has an analysis already. Use that one, or "
                "`detach()` it first."
            )
    resolved = None if loss is None else resolve_loss(loss)
    with preserved_rng(inner):
        batches = None if data is None else fixed_batches(data)
    chosen = list(default_measures() if measures is None else measures)
    cadence = Cadence(every, budget, [m.name for m in chosen])
    places = list(sinks or ())
    if log_dir is not False:
        places.append(TensorBoardSink(log_dir))
    analysis = Analysis(
        inner, watched, resolved, optimizer, cadence, chosen, places, batches, convert
    )
    analysis.attach()
    return analysis
