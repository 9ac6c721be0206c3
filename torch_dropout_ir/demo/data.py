"""What the demonstration runs, and on what data."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_DIGITS_TRAIN = 300
_MNIST_TRAIN = 1000


@dataclasses.dataclass(frozen=True)
class Data:
    """A classification problem of ten classes.

    Attributes:
        name: What a person calls it.
        train: Training inputs ``[n, d]`` and one-hot targets ``[n, 10]``.
        test: Test inputs ``[N, d]`` and labels ``[N]``.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(root: Path | None, components: int) -> Data:
    """Return MNIST from ``root``, or scikit-learn's digits where there is none.

    ``components`` are whitened principal components of the training inputs to feed; 0
    for the pixels themselves.

    Raises:
        ImportError: If torchvision or scikit-learn is missing.
        OSError: If MNIST is not under ``root``.
        ValueError: If there are fewer components than asked for.
    """  # noqa: DOC502 (`_mnist` raises the second)
    try:
        name, x, y, test_x, test_y = _digits() if root is None else _mnist(root)
    except ImportError as err:
        raise ImportError(
            f"{err}. The demonstration needs the extra: pip install "
            "'torch-dropout-ir[demo]'"
        ) from err
    if components:
        if not 0 < components <= min(x.shape):
            raise ValueError(
                f"--components: expected 0 to {min(x.shape)}, got {components}"
            )
        x, test_x = _whiten(x, test_x, components)
        name += f", {components} whitened components"
    return Data(name, (x, one_hot(y, 10).float()), (test_x, test_y))


def _digits() -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits  # an extra

    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32, device="cpu") / 16
    y = torch.tensor(bunch.target, device="cpu")
    order = torch.randperm(
        len(x), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    )
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return f"digits, {len(train)} images", x[train], y[train], x[test], y[test]


def _mnist(root: Path) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    from torchvision.datasets import MNIST  # an extra

    try:
        train, test = (MNIST(str(root), train=t, download=False) for t in (True, False))
    except RuntimeError as err:
        raise FileNotFoundError(
            f"--data-root: expected MNIST under {root / 'MNIST' / 'raw'}, found none. "
            "Leave the option out for scikit-learn's digits."
        ) from err
    x, test_x = (d.data.flatten(1).float() / 255 for d in (train, test))
    first = slice(_MNIST_TRAIN)
    name = f"MNIST, the first {_MNIST_TRAIN} images"
    return name, x[first], train.targets[first], test_x, test.targets


def _whiten(x: Tensor, test_x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Leading principal components of the training inputs, each of variance 1."""
    mean = x.mean(0)
    _, lengths, directions = torch.linalg.svd(x - mean, full_matrices=False)
    scale = len(x) ** 0.5 / lengths[:components]
    project = directions[:components].T * scale
    return (x - mean) @ project, (test_x - mean) @ project


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demonstration runs.

    Attributes:
        data_root: Folder with MNIST; None for scikit-learn's digits.
        log_dir: Where event files and the picture go.
        p: Probability of dropping.
        steps: Optimizer steps a run.
        lr: Learning rate.
        std: Standard deviation of every parameter at the start.
        width: Hidden neurons.
        components: Whitened principal components of the inputs; 0 for pixels.
        seed: Seed of start and masks.
    """

    data_root: Path | None
    log_dir: Path
    p: float
    steps: int
    lr: float
    std: float
    width: int
    components: int
    seed: int

    @classmethod
    def of(
        cls,
        *,
        data_root: Path | None = None,
        log_dir: Path = Path("runs/demo"),
        p: float = 0.5,
        seed: int = 0,
        **given: Any,
    ) -> Settings:
        """Return settings, checked; what is None or not given is the data's own.

        Raises:
            ValueError: If a number is out of range; it names the flag.
        """
        reduced = data_root is None or bool(given.get("components"))
        chosen = {name: x for name, x in given.items() if x is not None}
        numbers = (REDUCED if reduced else PIXELS) | chosen
        found = cls(data_root=data_root, log_dir=log_dir, p=p, seed=seed, **numbers)
        if not 0 < p < 1:
            raise ValueError(f"--p: expected a probability in (0, 1), got {p}")
        for name in ("steps", "lr", "std", "width"):
            value = getattr(found, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name}: expected a number above 0, got {value}")
        return found


REDUCED: dict[str, Any] = {
    "steps": 20000, "lr": 0.08, "std": 0.15, "width": 200, "components": 20
}  # fmt: skip
PIXELS: dict[str, Any] = {
    "steps": 1000, "lr": 0.015, "std": 0.05, "width": 1000, "components": 0
}  # fmt: skip
