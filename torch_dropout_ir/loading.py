"""Floor 4: models, data and weights, by what a command line says of them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

# Where training scripts keep the weights in a checkpoint.
_MOST_NAMED: Final = 8
_KEYS: Final = ("state_dict", "model_state_dict", "model", "module")
_COMPILED: Final = "_orig_mod."  # what `torch.compile` puts into the names
_FORMATS: Final = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


def seed(text: str) -> int:
    """Return a seed that torch takes; argparse says the name of this function."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected 0 to 2^64 - 1, got {text}")
    return value


@contextlib.contextmanager
def told_as(option: str) -> Iterator[None]:
    """Put the option before what is wrong with what it names."""
    try:
        yield
    except (ValueError, TypeError, OSError) as err:
        raise type(err)(f"{option}: {err}") from err


def load_factory(spec: str, what: str) -> Any:
    """Return what ``module:factory`` makes; modules in the working directory count.

    What can be called, and is no network itself, is called without arguments. ``what``
    is the argument's name, for errors.

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
    """Return a loss by its name, ``module:function`` or ``module:LossModule``."""
    if spec in ("mse", "cross_entropy"):
        return spec
    if ":" not in spec:
        raise ValueError(
            "--loss: expected 'mse', 'cross_entropy' or module:name, as "
            f"torch.nn:SmoothL1Loss, got {spec!r}"
        )
    found = _named(spec, "--loss")
    return found() if isinstance(found, type) else found


def load_device(name: str) -> torch.device:
    """Return a device by its name; raise a ValueError if there is no such one here."""
    try:
        found = torch.empty(0, device=name)
        found.cpu()  # of the meta device there is no data
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise ValueError(
            f"--device: expected a device of this machine, got {name!r} "
            f"({str(err).splitlines()[0].split('. ')[0]})"
        ) from err


def _named(spec: str, what: str) -> Any:
    """Return what ``module:name`` names; raise a ValueError if nothing is."""
    name, colon, attribute = spec.partition(":")
    named = all(map(str.isidentifier, f"{name}.{attribute}".split(".")))
    if not (colon and named) or name.endswith(".py"):
        raise ValueError(
            f"{what}: expected module:factory as Python names them, nets:make for "
            f"make() in nets.py, got {spec!r}"
        )
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

    Where all of the model's names are in the file behind one prefix, as those of
    ``DistributedDataParallel``, of a Lightning module's network or of averaged weights,
    it is taken off, and what has another one is left. The file is one that
    ``torch.save`` wrote, or of safetensors. ``key`` says where in it the weights are,
    with dots between keys, and before the rest of their names; None: at its top, or
    where training scripts put them.

    Raises:
        ValueError: If the file holds more than tensors and plain values, no weights,
            or others than the model's.
    """
    weights, where = _weights(_read(path), path, key)
    weights = {name.replace(_COMPILED, ""): x for name, x in weights.items()}
    inner = getattr(model, _COMPILED[:-1], model)
    tied = _tied(inner)
    prefixes = _prefixes(weights, tied)
    if len(prefixes) > 1:
        keys = (".".join(filter(None, (where, p)))[:-1] for p in prefixes)
        raise ValueError(
            f"{path}: {len(prefixes)} networks in it have the model's names. Say with "
            f"`--key` which: {', '.join(map(repr, keys))}."
        )
    for prefix in prefixes:
        own = ((n, x) for n, x in weights.items() if n.startswith(prefix))
        weights = {name.removeprefix(prefix): x for name, x in own}
        for names in tied:  # of tied weights some formats keep one
            kept = next(weights[n] for n in names if n in weights)
            weights |= {n: kept for n in names if n not in weights}
    own_names = {name.replace(_COMPILED, ""): name for name in inner.state_dict()}
    try:
        inner.load_state_dict({own_names.get(n, n): x for n, x in weights.items()})
    except RuntimeError as err:
        raise ValueError(f"{path} does not fit the model: {err}") from err


def _tied(model: nn.Module) -> list[list[str]]:
    """Return the names of the model's weights, those of one weight together."""
    found: dict[int, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        found.setdefault(id(x), []).append(name.replace(_COMPILED, ""))
    return list(found.values())


def _prefixes(weights: Iterable[str], tied: list[list[str]]) -> list[str]:
    """Return what all of the model's names have before them among those of weights."""
    there, first = set(weights), tied[0] if tied else []
    tried = {n.removesuffix(name) for name in first for n in there if n.endswith(name)}
    fit = [
        prefix
        for prefix in sorted(tried)
        if prefix[-1:] in ("", ".")
        and all(any(prefix + n in there for n in names) for names in tied)
    ]
    return [""] if "" in fit else fit


def _read(path: Path) -> Any:
    """Return what is in a file of weights; raise if reading it would run code."""
    if path.is_dir():
        found = sorted(x.name for x in path.iterdir() if x.suffix in _FORMATS)
        said = f"; in it are {', '.join(found)}" if found else ""
        raise ValueError(f"expected a file of weights, got the folder {path}{said}")
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():  # of torch, that the file is a script
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as err:
        raise ValueError(f"{path}: {err}. `pip install safetensors` reads it") from err
    except Exception as err:  # a pickle can fail in many ways
        raise ValueError(
            f"{path} is no file of tensors and plain values that can be loaded without "
            f"running code out of it{_objects(path)}, or it is damaged. Save "
            "`model.state_dict()` and load that."
        ) from err


def _objects(path: Path) -> str:
    """Say which objects are in a file that is not loaded for them."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return ""
    return f" (it has objects of {', '.join(sorted(found)[:3])})" if found else ""


def _weights(held: Any, path: Path, key: str | None) -> tuple[dict[str, Tensor], str]:
    """Return the weights in what a file holds, and under which key."""
    keys, where, whole = key.split(".") if key else [], "", held
    for place, part in enumerate(keys):
        if isinstance(held, Mapping) and part not in held:
            prefix = ".".join(keys[place:]) + "."
            own = ((str(n), x) for n, x in held.items())
            held = {n.removeprefix(prefix): x for n, x in own if n.startswith(prefix)}
            break
        held = held[part] if isinstance(held, Mapping) else None
    if key and not held:
        raise ValueError(
            f"{path}: expected weights under {key!r}, found none{_holding(whole)}"
        )
    for part in () if key else _KEYS:
        inner = held.get(part) if isinstance(held, Mapping) else None
        if isinstance(inner, Mapping):
            held, where = inner, part
            break
    named = isinstance(held, Mapping) and any(map(torch.is_tensor, held.values()))
    if not named:
        raise ValueError(
            f"{path}: expected a state dict of tensors{_holding(held)}. Say with "
            "`--key` where in the file it is."
        )
    return {**held}, where


def _holding(held: Any) -> str:
    """Say what the top of a file is made of."""
    if not isinstance(held, Mapping):
        return ""
    tops = dict.fromkeys(str(name).partition(".")[0] for name in held)
    more = ", ..." if len(tops) > _MOST_NAMED else ""
    return f", it holds {', '.join(map(repr, [*tops][:_MOST_NAMED]))}{more}"
