"""Which parameters derivatives are taken in."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

Subset = Collection[str] | Callable[[str], bool] | None


def chosen_parameters(
    caller: str, params: dict[str, Tensor], subset: Subset
) -> dict[str, Tensor]:
    """Return those of ``params`` that the user's choice is of, at least one."""
    kept = params
    if callable(subset):
        kept = {name: x for name, x in params.items() if subset(name)}
    elif subset is not None:
        subset = [subset] if isinstance(subset, str) else list(subset)
        given = [x if isinstance(x, str) else type(x).__name__ for x in subset]
        if foreign := sorted(set(given) - set(params)):
            raise ValueError(
                f"{caller}: expected `params` to name parameters that require a "
                f"gradient, got {foreign}. There are {list(params)}."
            )
        kept = {name: x for name, x in params.items() if name in given}
    if not kept:
        raise ValueError(f"{caller}: `params` chooses none of {list(params)}")
    if found := [name for name, x in kept.items() if x.is_complex()]:
        raise NotImplementedError(
            f"{caller}: expected real parameters, got complex ones: {found}. Hold them "
            "as real ones that the model views with `torch.view_as_complex`, or leave "
            "them out with `params=`."
        )
    return kept
