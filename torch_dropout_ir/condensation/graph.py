"""What reads a layer's neurons: paths from layer to layer through the traced graph."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_dropout_ir.arguments import check_flag
from torch_dropout_ir.condensation.acting import acting, affine
from torch_dropout_ir.condensation.layers import CONVOLUTIONS, TRANSPOSED, by_group
from torch_dropout_ir.condensation.passing import Passing, passing
from torch_dropout_ir.condensation.rewire import is_foldable, scale_of
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.substitution import unmoved_buffers

_SOURCES = (nn.Linear, *CONVOLUTIONS)
_CONSUMERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """What reads the neurons of a layer.

    Attributes:
        consumers: Names of the layers that read them, and nothing else does; empty
            where that is not known.
        homogeneous: Whether all between is positively homogeneous, as ReLU is.
        reason: Why the outgoing weights are not known; empty where they are.
        weight: Outgoing weights ``[outputs, m]``, with what a batch normalization
            between multiplies by; None where they are not known.
        norm: Name of the batch normalization that follows; empty where none does.
    """

    consumers: tuple[str, ...]
    homogeneous: bool
    reason: str
    weight: Tensor | None = None
    norm: str = ""


def outgoing_weights(
    model: nn.Module, *, run_own_code: bool = True
) -> dict[str, Outgoing]:
    """Find the outgoing weights of each linear and convolutional layer.

    The model is traced by ``torch.fx`` on a copy that shares its tensors, or where that
    fails the largest parts of it that can be traced; nothing is run. From a layer the
    graph is followed through what treats each neuron by itself (a batch normalization
    right behind it, as it is in evaluation mode; activations, dropout, pooling,
    flattening) to the linear layers and convolutions that read it.

    Args:
        model: The model.
        run_own_code: Whether forward passes that are not torch's own may be traced:
            that runs them on stand-ins for tensors, with whatever else they do.

    Returns:
        By name of the layer: outgoing weights, or why they are not known.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = outgoing_weights(net)
        >>> list(found["0"].weight.shape), found["0"].consumers
        ([2, 8], ('2',))
        >>> found["2"].reason
        'it is an output of the model'
    """
    modules = dict(model.named_modules())
    check_flag("outgoing_weights", "run_own_code", run_own_code)
    found = readers(model, run_own_code=run_own_code)
    for name, out in found.items():
        if out.consumers:
            weight = weights_read(modules, name, out.consumers, out.norm)
            found[name] = dataclasses.replace(out, weight=weight)
    return found


def readers(model: nn.Module, *, run_own_code: bool = True) -> dict[str, Outgoing]:
    """Return by name of a layer what reads it, or why that is not known.

    As :func:`outgoing_weights`, without the weights: none is copied.
    """
    modules = dict(model.named_modules())
    names = [n for n, m in modules.items() if isinstance(m, _SOURCES)]
    unseen = "no graph of what follows it could be traced"
    if not run_own_code:
        unseen += " without running a `forward` that is not torch's"
    found = {name: Outgoing((), False, unseen) for name in names}
    nodes: dict[str, list[tuple[str, fx.Node]]] = {}
    with preserved_rng(model), unmoved_buffers(model):
        for prefix, graph in _graphs(_skeleton(model), "", run_own_code):
            for node in graph.nodes:
                if node.op == "call_module":
                    nodes.setdefault(prefix + node.target, []).append((prefix, node))
    for name in names:
        if len(nodes.get(name, ())) > 1:
            found[name] = Outgoing((), False, "it is used more than once")
        elif name in nodes and _reads_parameters(*nodes[name][0], name):
            found[name] = Outgoing((), False, "its weight is also read as a tensor")
        elif name in nodes:
            ((prefix, node),) = nodes[name]
            found[name] = _follow(name, prefix, node, modules)
    return found


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy that shares the tensors and has no hooks, for tracing to write upon."""
    tensors = (*model.parameters(), *model.buffers())
    try:
        twin = copy.deepcopy(model, {id(x): x for x in tensors})
    except Exception:
        return nn.Identity()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


class _Tracer(fx.Tracer):
    """Enters containers only: a module without children is one step.

    Torch hands it the calls and parameters of modules in all threads meanwhile; those
    of others go on as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return childless or super().is_leaf_module(m, module_qualified_name)


def _graphs(
    module: nn.Module, prefix: str, run_own_code: bool
) -> Iterator[tuple[str, Any]]:
    """Graphs of the model, or of its largest parts that can be traced."""
    if next(module.children(), None) is None:
        return
    try:
        if not run_own_code and not all(map(_is_known, module.modules())):
            raise TypeError("a forward pass of the user's")
        graph = _Tracer().trace(module)
    except Exception:  # whatever a user's forward raises on a stand-in for a tensor
        for name, child in module.named_children():
            yield from _graphs(child, f"{prefix}{name}.", run_own_code)
        return
    yield prefix, graph


def _is_known(module: nn.Module) -> bool:
    """Whether tracing enters nothing but code of torch's and torchvision's."""
    package = type(module).__module__.partition(".")[0]
    return package in ("torch", "torchvision") or next(module.children(), None) is None


def _follow(
    name: str, prefix: str, node: fx.Node, modules: dict[str, nn.Module]
) -> Outgoing:
    """Go from a layer's node to its consumers."""
    source = modules[name]
    if not num_neurons(source):
        return Outgoing((), False, "it has no neurons")
    channels = not isinstance(source, nn.Linear)
    homogeneous, consumers = True, []
    norm, node = _normalized(prefix, node, modules, num_neurons(source))
    pending = [(user, node, channels, False) for user in node.users]
    while pending:
        user, came_from, channels, flat = pending.pop(0)
        called = user.op == "call_module"
        module = modules.get(f"{prefix}{user.target}") if called else None
        if isinstance(module, _CONSUMERS) and user.all_input_nodes == [came_from]:
            reason = _misread(module, num_neurons(source), channels, flat)
            if reason or _times(user) > 1:
                reason = f"`{prefix}{user.target}` {reason or 'is used elsewhere too'}"
                return Outgoing((), False, reason)
            consumers.append(f"{prefix}{user.target}")
            continue
        step = passing(user, came_from, module, channels)
        if isinstance(step, str):
            if prefix and user.op == "output":
                step = f"no graph of what follows `{prefix[:-1]}` could be traced"
            return Outgoing((), False, step)
        if step is Passing.SHAPE:
            continue
        homogeneous &= step is not Passing.POINTWISE
        if step is Passing.FLATTEN:
            flat, channels = flat or channels, False
        pending += [(u, user, channels, flat) for u in user.users]
    if not consumers:
        return Outgoing((), False, "nothing reads it")
    return Outgoing(tuple(consumers), homogeneous, "", None, norm)


def _normalized(
    prefix: str, node: fx.Node, modules: dict[str, nn.Module], neurons: int
) -> tuple[str, fx.Node]:
    """A batch normalization of neurons that alone reads them, and where it ends."""
    (user, *others) = (*node.users, None)
    if user is None or others != [None] or user.op != "call_module":
        return "", node
    if _times(user) > 1:
        return "", node
    name = f"{prefix}{user.target}"
    norm = modules.get(name)
    own = is_foldable(norm) and norm.num_features == neurons  # type: ignore[union-attr]
    return (name, user) if own else ("", node)


def _reads_parameters(prefix: str, node: fx.Node, name: str) -> bool:
    """Whether a graph has tensors of a module that it also calls."""
    read = (f"{prefix}{n.target}" for n in node.graph.nodes if n.op == "get_attr")
    return any(tensor.rpartition(".")[0] == name for tensor in read)


def _times(node: fx.Node) -> int:
    """How often a graph calls the module of a step."""
    return sum(n.op == node.op and n.target == node.target for n in node.graph.nodes)


def weights_read(
    modules: Mapping[str, nn.Module],
    name: str,
    consumers: Iterable[str],
    norm: str = "",
) -> Tensor:
    """Return the weights ``[outputs, m]`` with which consumers read a layer now.

    ``norm`` is the batch normalization between, whose scale counts as theirs.
    """
    neurons = num_neurons(modules[name])
    parts = [_read(modules[c], neurons) for c in consumers]
    weight = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
    return weight * scale_of(modules[norm]).to(weight) if norm else weight


def norms_read(
    modules: Mapping[str, nn.Module],
    name: str,
    consumers: Iterable[str],
    norm: str = "",
) -> Tensor:
    """Return the norms ``[m]`` of the columns of :func:`weights_read`, without them."""
    neurons = num_neurons(modules[name])
    norms = torch.stack([
        torch.linalg.vector_norm(_read(modules[c], neurons), dim=(0, 2))
        for c in consumers
    ])
    found = torch.linalg.vector_norm(norms, dim=0)
    return found * scale_of(modules[norm]).abs().to(found) if norm else found


def num_neurons(source: nn.Module) -> int:
    """Number of neurons of a layer."""
    linear = isinstance(source, nn.Linear)
    return int(source.out_features if linear else source.out_channels)  # type: ignore


def _misread(module: nn.Module, neurons: int, channels: bool, flat: bool) -> str:
    """Why a layer's weights are not what reads these neurons; empty if they are."""
    if not isinstance(module, nn.Linear):
        fits = channels and bool(module.in_channels == neurons)
    else:
        whole = module.in_features % neurons == 0 if flat else False
        fits = not channels and (whole or module.in_features == neurons)
        try:
            with acting(module):
                affine(module)
        except NotImplementedError:
            return "reads it by no affine map"
    return "" if fits else "reads it along another dimension"


def _read(module: nn.Module, neurons: int) -> Tensor:
    """Weights ``[outputs, neurons, positions]`` with which a layer reads neurons."""
    with acting(module):
        if isinstance(module, nn.Linear):
            return affine(module)[0].unflatten(1, (neurons, -1))
        grouped = by_group(module).transpose(1, 2)
    return grouped.flatten(0, 1).transpose(0, 1)
