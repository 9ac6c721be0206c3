"""What an analysis saves of itself, and what it does not."""

from __future__ import annotations

from typing import Any, Final

NOT_PICKLED: Final = (
    "an Analysis holds hooks and open files and cannot be pickled: save "
    "`analysis.state_dict()`, attach again, and `load_state_dict` it there"
)
_SAVED: Final = ("step", "history", "statistics", "cadence")


def check_state(state: Any) -> None:
    """Raise a ValueError unless it is what :meth:`Analysis.state_dict` returns."""
    if isinstance(state, dict) and all(name in state for name in _SAVED):
        return
    got = f"keys {sorted(map(str, state))[:4]}" if isinstance(state, dict) else state
    raise ValueError(
        "load_state_dict: expected what `analysis.state_dict()` returned, with "
        f"{', '.join(_SAVED)}, got {got}"
    )
