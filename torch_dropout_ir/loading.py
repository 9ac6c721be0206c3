"""Floor 4: models, data and weights, by what a command line says of them."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

# Where training scripts keep the weights in a checkpoint.
_KEYS: Final = ("state_dict", "model_state_dict", "model", "module")
# What wrappers put before the names.
_WRAPPERS: Final = ("module.", "_orig_mod.")


def load_factory(spec: str, what: str) -> Any:
    """Return what ``module:factory`` makes; modules in the working directory count.

    Args:
        spec: A module's name, a colon, and the name of something in it. What can be
            called, and is no network itself, is called without arguments.
        what: The argument's name, for errors.

    Returns:
        The object.

    Raises:
        ValueError: If it fails; if ``spec`` has another form or names nothing.
    """
    found = _named(spec, what)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except (Exception, SystemExit) as err:
        raise ValueError(_of_theirs(err, spec, what)) from err


def load_loss(spec: str) -> Any:
    """Return a loss by its name, ``module:function`` or ``module:LossModule``.

    Args:
        spec: ``"mse"``, ``"cross_entropy"``, or where to find it.

    Returns:
        What :func:`resolve_loss` takes.

    Raises:
        ValueError: If there is no such thing.
    """  # noqa: DOC502 (raised where it is looked up)
    if ":" not in spec:
        return spec
    found = _named(spec, "--loss")
    return found() if isinstance(found, type) else found


def load_device(name: str) -> torch.device:
    """Return a device by its name.

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        found = torch.empty(0, device=name)
        found.cpu()  # of the meta device there is no data
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise ValueError(
            f"--device: expected a device of this machine, got {name!r} "
            f"({str(err).splitlines()[0]})"
        ) from err


def _named(spec: str, what: str) -> Any:
    """Return what ``module:name`` names.

    Raises:
        ValueError: If ``spec`` has another form, there is no such thing, or importing
            it fails.
    """
    name, colon, attribute = spec.partition(":")
    if not (name and colon and attribute):
        raise ValueError(f"{what}: expected module:factory, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as err:
        raise ValueError(f"{what}: cannot find {spec!r}: {err}") from err
    except (Exception, SystemExit) as err:  # a script that reads its own arguments
        raise ValueError(_of_theirs(err, spec, what)) from err
    return found


def _of_theirs(err: BaseException, spec: str, what: str) -> str:
    """Say what the user's own code has raised, and where."""
    said = f"{what}: {spec!r} raised {type(err).__name__}: {err}"
    last = traceback.extract_tb(err.__traceback__)[-1]
    if last.filename != __file__ and Path(last.filename).is_file():
        said += f" ({last.filename}, line {last.lineno})"
    return said


def load_weights(model: nn.Module, path: Path, key: str | None = None) -> None:
    """Load a checkpoint into ``model``, running no code out of the file.

    Args:
        model: The model, changed in place.
        path: File that ``torch.save`` wrote.
        key: Where in the file the weights are, with dots between keys; None: at its
            top, or where training scripts put them.

    Raises:
        ValueError: If the file holds more than tensors and plain values, no weights,
            or others than the model's.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as err:
        raise ValueError(f"there is no file {path}") from err
    except IsADirectoryError as err:
        raise ValueError(f"expected a file of weights, got the folder {path}") from err
    except Exception as err:  # a pickle can fail in many ways
        raise ValueError(
            f"{path} is no file of tensors and plain values that can be loaded without "
            "running code out of it, or it is damaged. Save `model.state_dict()` and "
            "load that."
        ) from err
    weights = _weights(held, path, key)
    if weights.keys() != model.state_dict().keys():
        weights = {_bare(name): x for name, x in weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as err:
        raise ValueError(f"{path} does not fit the model: {err}") from err


def _weights(held: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    keys = key.split(".") if key else ()
    for part in keys:
        if not isinstance(held, Mapping) or part not in held:
            raise ValueError(f"{path}: expected weights under {key!r}, found none")
        held = held[part]
    for part in () if key else _KEYS:
        inner = held.get(part) if isinstance(held, Mapping) else None
        if isinstance(inner, Mapping):
            held = inner
            break
    named = isinstance(held, Mapping) and any(map(torch.is_tensor, held.values()))
    if not named:
        raise ValueError(
            f"{path}: expected a state dict of tensors. Say with `--key` where in the "
            "file it is."
        )
    return {**held}


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
