r"""Where each weight meets its inputs: derivatives by sample without storing any.

Semantics:

* A use is one call of a layer that is affine in the parameter. Sample ``i`` and group
  ``g`` see it as rows ``h`` (``[T, d]``, the positions at which it meets an input) with
  outputs ``a = h w'`` (``[T, o]``); a bias has rows of ones.
* The derivative of a sample in the parameter is ``delta' h``, with ``delta`` that in
  ``a``. Its squared norm is ``|delta|^2 |h|^2`` where ``T = 1``, else the sum over
  ``t, t'`` of ``(delta_t . delta_t') (h_t . h_t')`` or of the entries, what is cheaper.
* What a layer is taken for is checked against autograd before it counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_dropout_ir.module_calls import on_again, unchecked
from torch_dropout_ir.sharpness.affine import Found, Part, linear_parts, parts

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK_BYTES: Final = 2**26
Draw = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one parameter in a forward pass, which acts as ``part`` says.

    ``delta`` is a zero added to the layer's output, for derivatives in it.
    """

    name: str
    delta: Tensor
    part: Part

    def _chunks(self, a: Tensor) -> Iterator[slice]:
        """Cut the samples so that what is made of them fits the memory."""
        n, groups, positions, width = a.shape
        size = self.part.size
        own = size * width if positions > 1 else 0
        each = groups * (positions * (size + width) + own) * a.element_size()
        step = max(1, _CHUNK_BYTES // max(1, each))
        yield from (slice(i, min(i + step, n)) for i in range(0, n, step))

    def _rows(self, c: slice) -> Tensor:
        """Rows in the dtype that the layer computes in, which autocast may choose."""
        return self.part.rows(c).to(self.delta.dtype)

    def squared_norms(self, gradient: Tensor) -> Tensor:
        """Return squared norms of the samples' derivatives, float64 ``[n]``."""
        a = self.part.split(gradient)
        found = [_squared(self._rows(c), a[c]) for c in self._chunks(a)]
        return torch.cat([x.double() for x in found])

    def summed(self, gradient: Tensor) -> Tensor:
        """Return the derivative of all samples together, flat."""
        a = self.part.split(gradient)
        total = a.new_zeros(a.shape[1], a.shape[3], self.part.size)
        for c in self._chunks(a):
            total += torch.einsum("ngto,ngtd->god", a[c], self._rows(c))
        return total.reshape(-1)

    @property
    def once(self) -> bool:
        """Whether each sample meets the parameter at one position."""
        return self.part.split(self.delta).shape[2] == 1

    def variance(self) -> Tensor:
        """Variance of each entry of the output under a random parameter."""
        a = self.part.split(self.delta)
        found = torch.empty_like(a)
        for c in self._chunks(a):
            found[c] = self.part.rows(c).square().sum(-1, keepdim=True)
        return self.part.join(found)

    def perturbed(self, draw: Draw, columns: slice) -> Tensor:
        """Change of the output under a parameter that is drawn for each sample."""
        a = self.part.split(self.delta)
        found = torch.zeros_like(a)
        width = a[..., columns].shape[3]
        for c in self._chunks(a):
            h = self._rows(c)
            drawn = draw(h.new_empty(*h.shape[:2], h.shape[3], width))
            found[c, ..., columns] = h @ drawn
        return self.part.join(found)


def perturbation(
    layer: list[Use], draw: Draw, columns: slice = slice(None), apart: bool = False
) -> Tensor:
    """Return a change of one layer's output under random parameters of that layer.

    Each sample has parameters of its own, and where positions are ``apart`` each of
    those; where it meets them once, only their variance counts, and one number an
    output is drawn. ``layer`` are the uses of its parameters, of one ``delta``;
    ``draw`` fills a tensor with independent entries of mean 0 and variance 1.
    ``columns`` are the output features that are changed.
    """
    if apart or all(use.once for use in layer):
        part = layer[0].part
        scale = part.split(torch.stack([use.variance() for use in layer]).sum(0).sqrt())
        found = torch.zeros_like(scale)
        found[..., columns] = draw(torch.empty_like(scale[..., columns]))
        return part.join(found.mul_(scale))
    return torch.stack([use.perturbed(draw, columns) for use in layer]).sum(0)


def _squared(h: Tensor, a: Tensor) -> Tensor:
    positions, width, size = h.shape[2], a.shape[3], h.shape[3]
    if positions == 1:
        return (h.square().sum(-1) * a.square().sum(-1)).sum((1, 2))
    if positions**2 < width * size:
        return ((h @ h.mT) * (a @ a.mT)).sum((1, 2, 3))
    return (a.mT @ h).square().sum((1, 2, 3))


class Uses(TorchFunctionMode):
    """Collects the uses of parameters in a forward pass inside the context.

    Linear maps are seen where they are called, also as functions and in attention;
    convolutions and normalization as modules. ``names`` are by identity of the tensors
    that stand for the parameters.

    Attributes:
        found: The uses; several of one call where its samples may be here or there.
    """

    def __init__(self, model: nn.Module, samples: int, names: dict[int, str]) -> None:
        super().__init__()
        self.found: list[Use] = []
        self._model, self._samples, self._names = model, samples, names
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for module in self._model.modules():
            scripted = isinstance(module, torch.jit.ScriptModule)  # it takes no hooks
            own = next(module.parameters(recurse=False), None)
            if own is not None and not scripted:
                handle = module.register_forward_hook(self._hook)
                self._hooks.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with on_again(self):
                return unchecked(F.multi_head_attention_forward, {})(*args, **kwargs)
        output = func(*args, **kwargs)
        return self._linear(output, *args, **kwargs) if func is F.linear else output

    def _linear(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if output.ndim < 2 or weight.ndim != 2:
            return output
        x = input.detach()
        return self._with_delta(
            output, linear_parts(x, weight, bias, output, self._samples)
        )

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return output
        x = args[0].detach()
        return self._with_delta(output, parts(module, x, output, self._samples))

    def _with_delta(self, output: Any, found: Found) -> Any:
        own = [(self._names.get(id(x)), part) for x, part in found]
        if all(name is None for name, _ in own):
            return output
        delta = torch.zeros((), dtype=output.dtype, device=output.device)
        delta = delta.expand(output.shape).requires_grad_()
        self.found += [Use(name, delta, part) for name, part in own if name is not None]
        return output + delta
