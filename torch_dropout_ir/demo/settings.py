"""What the demonstration runs, with defaults that depend on the data."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any


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
