"""Hypothesis strategies: small networks with dropout, batches, probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_choice, check_count

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_ACTIVATIONS: Final = (nn.ReLU, nn.Tanh, nn.GELU, nn.Identity)


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as err:
        raise ImportError(
            "the strategies of torch_dropout_ir.testing need hypothesis: "
            "pip install hypothesis"
        ) from err
    return strategies


def drop_probabilities(
    min_value: float = 0.0, max_value: float = 0.95
) -> SearchStrategy[float]:
    """Probabilities of dropping, 0 among them.

    Args:
        min_value: The smallest.
        max_value: The largest, below 1.

    Returns:
        A strategy of floats.

    Raises:
        ValueError: If they are out of order, or not in ``[0, 1)``.
    """
    if not 0 <= min_value <= max_value < 1:
        raise ValueError(
            "drop_probabilities: expected 0 <= `min_value` <= `max_value` < 1, got "
            f"{min_value} and {max_value}"
        )
    found: SearchStrategy[float] = _strategies().floats(min_value, max_value)
    return found


def networks(
    *,
    max_width: int = 6,
    max_depth: int = 3,
    max_outputs: int = 3,
    sites: Literal["last", "everywhere"] = "last",
    probabilities: SearchStrategy[float] | None = None,
) -> SearchStrategy[nn.Sequential]:
    """Small fully connected float64 networks with dropout.

    Args:
        max_width: Most units of a layer.
        max_depth: Most hidden layers.
        max_outputs: Most outputs.
        sites: ``"last"``: one :class:`torch.nn.Dropout` straight before the last linear
            layer (Lemma 1); ``"everywhere"``: one after every hidden layer.
        probabilities: Strategy of ``p``; :func:`drop_probabilities` if None.

    Returns:
        A strategy of :class:`torch.nn.Sequential` that begins and ends with a linear
        layer.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If one is below 1, or ``sites`` is not known.

    Example:
        >>> from hypothesis import given
        >>> @given(networks(sites="everywhere", probabilities=drop_probabilities(0.1)))
        ... def test_sites(network):
        ...     assert all(p >= 0.1 for p in (m.p for m in network if hasattr(m, "p")))
        >>> test_sites()
    """  # noqa: DOC502 (the checks raise)
    check_choice("networks", "sites", sites, ("last", "everywhere"))
    given = {"max_width": max_width, "max_depth": max_depth, "max_outputs": max_outputs}
    for name, count in given.items():
        check_count("networks", name, count, 1)
    st = _strategies()
    chances = drop_probabilities() if probabilities is None else probabilities

    def build(draw: Any) -> nn.Sequential:
        inputs, width = draw(st.integers(1, 4)), draw(st.integers(1, max_width))
        depth = draw(st.integers(1, max_depth))
        activation = draw(st.sampled_from(_ACTIVATIONS))
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(draw(st.integers(0, 2**16)))
            for i in range(depth):
                layers += [nn.Linear(width if i else inputs, width), activation()]
                if sites == "everywhere" or i == depth - 1:
                    layers.append(nn.Dropout(draw(chances)))
            layers.append(nn.Linear(width, draw(st.integers(1, max_outputs))))
        return nn.Sequential(*layers).double()

    found: SearchStrategy[nn.Sequential] = st.composite(build)()
    return found


def batches(
    network: nn.Sequential,
    *,
    loss: Literal["mse", "cross_entropy"] = "mse",
    max_samples: int = 5,
) -> SearchStrategy[tuple[Tensor, Tensor]]:
    """Float64 batches for a network that begins and ends with a linear layer.

    Args:
        network: The network.
        loss: Normal targets for ``"mse"``, labels for ``"cross_entropy"``.
        max_samples: Most samples.

    Returns:
        A strategy of ``(inputs, targets)``.

    Raises:
        TypeError: If ``max_samples`` is no integer.
        ValueError: If it is below 1, or ``loss`` is not known.

    Example:
        >>> from hypothesis import given
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 3)).double()
        >>> @given(batches(net, loss="cross_entropy"))
        ... def test_sizes(batch):
        ...     assert net(batch[0]).shape == (len(batch[1]), 3)
        >>> test_sizes()
    """  # noqa: DOC502 (the checks raise)
    check_choice("batches", "loss", loss, ("mse", "cross_entropy"))
    check_count("batches", "max_samples", max_samples, 1)
    st = _strategies()
    first, last = network[0], network[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    inputs, outputs = first.in_features, last.out_features

    def build(samples: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn(samples, inputs, generator=generator, device="cpu").double()
        if loss == "mse":
            return x, torch.randn(
                samples, outputs, generator=generator, device="cpu"
            ).double()
        return x, torch.randint(outputs, (samples,), generator=generator, device="cpu")

    found: SearchStrategy[tuple[Tensor, Tensor]] = st.builds(
        build, st.integers(1, max_samples), st.integers(0, 2**16)
    )
    return found


def problems(
    *, loss: Literal["mse", "cross_entropy"] = "mse", **options: Any
) -> SearchStrategy[tuple[nn.Sequential, tuple[Tensor, Tensor]]]:
    """Networks with a batch each.

    Args:
        loss: As for :func:`batches`.
        **options: As for :func:`networks`.

    Returns:
        A strategy of ``(network, (inputs, targets))``.

    Example:
        >>> from hypothesis import given
        >>> @given(problems())
        ... def test_lemma_1(problem):
        ...     network, batch = problem
        ...     report = tdi.testing.check_regularizer(network, batch, "mse")
        ...     report.assert_holds()
    """
    check_choice("problems", "loss", loss, ("mse", "cross_entropy"))
    st = _strategies()
    found: SearchStrategy[tuple[nn.Sequential, tuple[Tensor, Tensor]]]
    found = networks(**options).flatmap(
        lambda network: st.tuples(st.just(network), batches(network, loss=loss))
    )
    return found
