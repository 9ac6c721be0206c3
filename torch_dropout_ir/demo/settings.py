"""What the demonstration runs, with defaults that depend on the data."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path


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
        steps: int | None = None,
        lr: float | None = None,
        std: float | None = None,
        width: int | None = None,
        components: int | None = None,
        seed: int = 0,
    ) -> Settings:
        """Return settings with what is left open filled in by the data, and checked.

        Raises:
            ValueError: If a number is out of range; it names the flag.
        """
        reduced = data_root is None or bool(components)
        standard = REDUCED if reduced else PIXELS
        found = cls(
            data_root=data_root,
            log_dir=log_dir,
            p=p,
            steps=standard.steps if steps is None else steps,
            lr=standard.lr if lr is None else lr,
            std=standard.std if std is None else std,
            width=standard.width if width is None else width,
            components=standard.components if components is None else components,
            seed=seed,
        )
        if not 0 < p < 1:
            raise ValueError(f"--p: expected a probability in (0, 1), got {p}")
        for name in ("steps", "lr", "std", "width"):
            value = getattr(found, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name}: expected a number above 0, got {value}")
        return found


@dataclasses.dataclass(frozen=True)
class _Standard:
    steps: int
    lr: float
    std: float
    width: int
    components: int


REDUCED = _Standard(steps=20000, lr=0.08, std=0.15, width=200, components=20)
PIXELS = _Standard(steps=1000, lr=0.015, std=0.05, width=1000, components=0)
