"""Floor 4: what an analysis measures, of a checkpoint on data, without training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_dropout_ir.analysis.attempts import Attempts
from torch_dropout_ir.analysis.attributes import Generators
from torch_dropout_ir.analysis.distributed import Ranks
from torch_dropout_ir.analysis.measures import Condensation, Regularizer, Sharpness
from torch_dropout_ir.analysis.records import Record, estimate_of
from torch_dropout_ir.analysis.replay import Replay, replay
from torch_dropout_ir.analysis.snapshot import Snapshot
from torch_dropout_ir.analysis.tables import in_short, section, tables
from torch_dropout_ir.arguments import check_count, check_flag
from torch_dropout_ir.batches import fixed_batches
from torch_dropout_ir.functional import Batch, call
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.sharpness.frozen import modes, modes_of
from torch_dropout_ir.sharpness.reading import terms
from torch_dropout_ir.sites import Site, find_sites, unobservable
from torch_dropout_ir.tensorboard import TensorBoardSink

# A checkpoint has no start to be away from.
_SINCE: Final = ("condensation/movement/", "condensation/cosine_to_start/")
_IN_TRAINING: Final = (
    "training, with running statistics as in evaluation: calls of dropout functions "
    "act in it alone"
)
_OFF: Final = (
    "a call of a dropout function, off in evaluation mode; in training mode the loss "
    "does not take what the model returns"
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        records: Numbers by tag.
        absent: What is missing, with the reason.
        notes: How a number was obtained.
        sites: Dropout sites that are seen, with ``p``.
        num_batches: Batches measured.
    """

    records: dict[str, float]
    absent: dict[str, str]
    notes: dict[str, str]
    sites: dict[str, float]
    num_batches: int

    def as_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    def __str__(self) -> str:
        counts = ("dropout site", len(self.sites)), ("batch", self.num_batches)
        sites = ", ".join(f"{name} (p={p:g})" for name, p in self.sites.items())
        lines = [", ".join(_counted(*count) for count in counts)]
        lines += [f"dropout sites: {sites}"] if sites else []
        curves = {tag: [(0, x)] for tag, x in self.records.items()}
        lines += [*in_short(curves, steps=False), *tables(curves, steps=False)]
        lines += section("how the numbers were obtained", self.notes)
        lines += section("absent", self.absent)
        return "\n".join(lines)


def _counted(what: str, number: int) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{plural if number != 1 else ''}"


def on_device(data: Any, device: torch.device, most: int) -> list[Batch]:
    """Return up to ``most`` batches of ``data`` with their tensors on ``device``."""
    batches = fixed_batches(data, most)[:most]
    moved: list[Batch] = tree_map_only(Tensor, lambda x: x.to(device), batches)
    return moved


def analyze(
    model: nn.Module,
    data: Any,
    loss: Any,
    *,
    most_batches: int = 8,
    num_masks: int = 16,
    sharpness: bool = True,
    seed: int = 0,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Report:
    """Measure a model on data: R_1, R_S, condensation and sharpness.

    R_1 and R_S are means over the batches, in evaluation mode with dropout as it would
    be in training. Calls of dropout functions act in training mode alone: a model that
    has some is measured in it, with running statistics as in evaluation. The model is
    left as it was, but for what its own code counts or writes on in a pass.

    Args:
        model: The model.
        data: A batch ``(inputs, targets)``, or batches.
        loss: As in :func:`attach_analysis`.
        most_batches: Batches to take of a loader.
        num_masks: Masks a batch to average over where R_1 has no closed form.
        sharpness: Whether to measure eigenvalue and trace of the Hessian.
        seed: Seed of masks and probes.
        log_dir: A TensorBoard run to write; None: none.
        progress: Whether to draw a bar on the standard error.

    Returns:
        The report.

    Raises:
        TypeError: If ``data`` holds no batches.
        ValueError: If there is no batch, or ``loss`` is unknown.
    """  # noqa: DOC502 (raised by the parts that read)
    check_count("analyze", "most_batches", most_batches, 1)
    check_count("analyze", "num_masks", num_masks, 2)
    check_count("analyze", "seed", seed, 0)
    check_flag("analyze", "sharpness", sharpness)
    check_flag("analyze", "progress", progress)
    resolved = resolve_loss(loss)
    batches = fixed_batches(data, most_batches)[:most_batches]
    if not batches:
        raise ValueError("analyze: expected at least one batch, got none")
    with modes(modes_of(model)), preserved_rng(model):
        return _Run(model, resolved, batches).report(
            num_masks, sharpness, seed, log_dir, progress
        )


class _Run:
    """One analysis of a model that stands still."""

    def __init__(self, model: nn.Module, loss: Loss, batches: list[Batch]) -> None:
        self.model = model
        self.loss = loss
        self.batches = batches
        self.absent = dict(unobservable(model))
        self.notes: dict[str, str] = {}
        calls = self._calls()
        sites = (*find_sites(model), *calls.values())
        self.sites = tuple(site for site in sites if site.p > 0)

    def _calls(self) -> dict[str, Site]:
        """Choose the mode to measure in; return the dropout calls that act in it."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        inputs, targets = self.batches[0]
        found = Replay()
        with contextlib.suppress(Exception):  # of no use in training mode
            found = replay(self.model, inputs, Generators(self.model))
            with torch.no_grad():
                self.loss(call(self.model, inputs), targets)
            if found.calls:
                self.notes["mode"] = _IN_TRAINING
                self.absent |= found.unseen
                return found.calls
        self.model.eval()
        self.absent |= dict.fromkeys(found.calls, _OFF)
        return {}

    def _take(self, measure: Any, batch: Batch, seed: int) -> dict[str, Record]:
        snapshot = Snapshot(
            self.model, 0, self.sites, self.loss, *batch, batches=self.batches
        )
        absent: dict[str, str] = {}  # what one batch lacks, another's success leaves
        attempts = Attempts([measure], Ranks(), absent)
        with warnings.catch_warnings():  # that training goes on: there is none
            warnings.filterwarnings("ignore", "torch_dropout_ir: the measure")
            records, _ = attempts.take(snapshot, {measure.name}, seed)
        self.notes |= snapshot.notes
        absent |= snapshot.absent
        self.absent |= {t: x for t, x in absent.items() if not t.startswith(_SINCE)}
        return {t: x for t, x in records.items() if not t.startswith(_SINCE)}

    def report(
        self, num_masks: int, sharpness: bool, seed: int, log_dir: Any, progress: bool
    ) -> Report:
        """Take the measures, write and return what they say."""
        sink = None if log_dir is None else TensorBoardSink(log_dir)
        more: list[Any] = [Condensation(), *([Sharpness()] if sharpness else [])]
        work: list[tuple[Any, Batch]] = [
            (Regularizer(num_masks), batch) for batch in self.batches
        ]
        work += [(measure, self.batches[0]) for measure in more]
        draw = torch.Generator("cpu").manual_seed(seed)
        seeds = torch.randint(
            2**62, (len(work),), generator=draw, device="cpu"
        ).tolist()
        taken = [
            self._take(measure, batch, own)
            for own, (measure, batch) in zip(seeds, _bar(work, progress), strict=True)
        ]
        records = self._mean(taken[: len(self.batches)])
        for found in taken[len(self.batches) :]:
            records |= found
        if sink is not None:
            sink.write(0, records, self.notes)
            sink.close()
        numbers = {t: x for t, x in records.items() if isinstance(x, float)}
        notes = {tag: said for tag, said in self.notes.items() if said}
        sites = {site.name: site.p for site in self.sites}
        return Report(numbers, self.absent, notes, sites, len(self.batches))

    def _mean(self, taken: list[dict[str, Record]]) -> dict[str, Record]:
        """The mean over batches, weighted as the loss weighs them."""
        whole = self.loss.reduction == "sum"
        weights = [1.0 if whole else terms(self.loss, batch) for batch in self.batches]
        divisor = 1.0 if whole else sum(weights)
        mean: dict[str, Record] = {}
        for tag in [t for t in taken[0] if all(t in found for found in taken)]:
            pairs = zip(weights, (float(found[tag]) for found in taken), strict=True)  # type: ignore[arg-type]
            if estimate_of(tag):  # of draws that are independent
                mean[tag] = math.sqrt(sum((w * x) ** 2 for w, x in pairs)) / divisor
            else:
                mean[tag] = sum(w * x for w, x in pairs) / divisor
        return mean


def _bar(work: Iterable[Any], progress: bool) -> Iterator[Any]:
    items = list(work)
    for done, item in enumerate(items):
        if progress:
            filled = 24 * done // len(items)
            name = f"{item[0].name} ({done + 1} of {len(items)})"
            print(f"\r[{'#' * filled:<24}] {name:<32}", end="", file=sys.stderr)
        yield item
    if progress:
        print(f"\r{'':<60}\r", end="", file=sys.stderr)
