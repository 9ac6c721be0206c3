"""The state of an analysis and what drives it: the optimizer's own step hooks."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from torch_dropout_ir.analysis.attempts import Attempts, Schedule
from torch_dropout_ir.analysis.cadence import Cadence
from torch_dropout_ir.analysis.capture import Capture
from torch_dropout_ir.analysis.distributed import Ranks
from torch_dropout_ir.analysis.meetings import processes
from torch_dropout_ir.analysis.records import Delivery, Sink, remember
from torch_dropout_ir.analysis.root_hook import compiled_in_place
from torch_dropout_ir.analysis.signal_handlers import handlers_raise
from torch_dropout_ir.analysis.snapshot import Measure, labels
from torch_dropout_ir.analysis.steps import NO_STEP, STEPS, OptimizerSteps
from torch_dropout_ir.analysis.summary import (
    SiteReport,
    describe,
    report_sites,
    run_facts,
)
from torch_dropout_ir.analysis.view import NOT_PICKLED, View, by_itself, check_state
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.nn import convert_dropout_, is_convertible, restore_dropout_
from torch_dropout_ir.turns import in_turn


class Analysis:
    """The state of an attached analysis; made by :func:`attach_analysis`.

    Attributes:
        model: The model that is watched.
        step: Optimizer steps seen.
        history: Every number recorded, by tag, as ``(step, value)``.
        absent: Measures left out the last time, with the reason.
        notes: How a number was obtained, by tag.
        inputs_of: What the measures call the model with, by the inputs of the pass and
            the number of passes of the step; by default :func:`by_itself`.
        targets_of: Where the loss does not show the targets: what finds them by the
            inputs of the pass. By default the argument ``labels``.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: nn.Module,
        loss: Loss | None,
        optimizer: Optimizer | None,
        cadence: Cadence,
        measures: Sequence[Measure],
        sinks: Sequence[Sink],
        data: list[Batch] | None,
        convert: bool,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.step = 0
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.absent, self.notes = dict[str, str](), dict[str, str]()
        self._steps = OptimizerSteps(model, optimizer)
        self._cadence = cadence
        self._ranks = ranks
        self._alone = ranks.group is None  # until the first step: it may be wrapped
        self._attempts = Attempts(measures, ranks, self.absent)
        self._schedule = Schedule(cadence, self._attempts, ranks)
        self._delivery = Delivery(sinks, self.absent)
        self._convert, self._converted = convert, list[nn.Module]()
        self._seed = ranks.first_seed()
        self._clock, self._due = time.perf_counter(), set[str]()
        # What is compiled draws other masks than the model as it is written.
        plain = watched is model and not compiled_in_place(model)
        self._capture = Capture(watched, model if plain else None)
        self._capture.accumulation.stride = cadence.stride
        self._view = View(model, self._capture, loss, data, self._steps, ranks)
        self._handles = contextlib.ExitStack()
        self._handles.callback(self._delivery.close)
        self._attached = False
        self._leave = weakref.finalize(self, self._handles.close)
        self.inputs_of: Callable[[Inputs, int], Inputs] = by_itself
        self.targets_of: Callable[[Inputs], Any] = labels

    @property
    def loss(self) -> Loss | None:
        """The loss: the one given, or what the script computes of the outputs."""
        return self._view.batch.loss

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The dropout sites found so far, and other noise with why it is not seen."""
        return report_sites(self.model, self._capture.masks)

    def attach(self) -> None:
        """Put the hooks in place; :func:`attach_analysis` has done it."""
        if self._convert:
            self._converted = [m for m in self.model.modules() if is_convertible(m)]
            convert_dropout_(self.model)
        self._capture.attach(self)
        self._handles.callback(self._steps.watch(self._before_step, self._after_step))
        self._attached, self._due = True, self._names()
        self.absent[STEPS] = NO_STEP
        self._plan()

    @handlers_raise()
    def _before_step(self) -> None:
        self.absent.pop(STEPS, None)
        if self._alone:
            self._settle_ranks()
        with in_turn():
            if self._capture.accumulation.stepped() and self._due:
                self._measure_safely(self._due, planned=True)
            else:
                self._capture.end_step()

    def _settle_ranks(self) -> None:
        """Go on with the other ranks, where the model was wrapped since."""
        self._alone = False
        model = self._capture.wrapper() or self.model
        try:
            if self._ranks.join_late(model, self._setting()):
                self._seed = self._ranks.first_seed()
                self._due = self._schedule.due(self.step)
                self._view.share()
                if self._ranks.rank:
                    self._delivery.close()
        except Exception as err:
            self._attempts.fail("ranks", err, self.step)

    def _setting(self) -> str:
        return f"{self._cadence.setting} at step {self.step}"

    def _after_step(self) -> None:
        self.step += 1
        before, self._clock = self._clock, time.perf_counter()
        may = self._cadence.stepped(self._clock - before, self.step)
        if self._steps.announced:
            with in_turn():
                self._plan()
        elif may or self._ranks.group is not None:
            self._plan()

    def _plan(self) -> None:
        """Decide what the coming step must show."""
        self._due = self._schedule.due(self.step)
        wanted = self._due if not self._alone or processes() == 1 else self._names()
        self._steps.announced = bool(wanted)
        each = (m.needs for m in self._attempts.named(wanted))
        self._capture.want(bool(wanted), set[str]().union(*each))

    def measure(self) -> dict[str, float]:
        """Take all measures now, on the last batch with targets seen; on all ranks.

        Returns:
            The numbers recorded, by tag.

        Raises:
            RuntimeError: If the analysis is detached, or measures already (a hook that
                calls this is called by what it does), or a rank does not call.
        """
        if not self._attached:
            raise RuntimeError("measure: this analysis is detached; attach a new one")
        self._ranks.wait_for_all("measure")
        with handlers_raise(), in_turn():
            if self._capture.paused:
                raise RuntimeError("measure: called inside a measurement")
            had = {tag: len(values) for tag, values in self.history.items()}
            self._measure_safely(self._names())
            found = self.history.items()
            return {t: x[-1][1] for t, x in found if had.get(t) != len(x)}

    def _names(self) -> set[str]:
        return {m.name for m in self._attempts.measures}

    def _measure_safely(self, names: set[str], planned: bool = False) -> None:
        """Measure; whatever a measure or a sink raises, training goes on."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        started, looking = time.perf_counter(), self._capture.spent()
        self._cadence.trained(started - self._clock - looking)
        try:
            with self._capture.aside():
                if planned:
                    taken = started - self._capture.started
                    names = self._schedule.afford(names, self.step, taken)
                seconds = self._take_and_write(names) if names else {}
        except Exception as err:
            self._attempts.fail("capture", err, self.step)
            seconds = dict.fromkeys(names, 0.0)
        finally:
            self._clock = time.perf_counter()
        whole = looking + self._clock - started
        self._schedule.enter(seconds, whole, self.step)

    def _take_and_write(self, names: set[str]) -> dict[str, float]:
        with self._ranks.together():
            each = [m.needs for m in self._attempts.named(names)]
            # More than the gradients that the optimizer has.
            runs = any(not needs or needs - {"gradients", "sites"} for needs in each)
            own = self.inputs_of, self.targets_of
            snapshot = self._view.snapshot(self.step, runs, *own).agree()
            self.notes.update(run_facts(self, self._steps.optimizer))
        self.absent.pop("capture", None)
        seed = (self._seed + 2 * self.step) % 2**62
        with self._capture.bystanders.aside(snapshot.model):
            records, seconds = self._attempts.take(snapshot, names, seed)
        if "masks" in seconds:
            seconds["masks"] += self._capture.masks.spent()
        found = {n: s for n, s in seconds.items() if n not in self.absent}
        cost = {f"cost/seconds/{name}": own for name, own in found.items()}
        cost |= {"cost/share": share} if (share := self._cadence.share) else {}
        records.update(self._ranks.first(cost))
        self.notes.update(snapshot.said(records))
        self.absent.update(snapshot.absent)
        remember(self.history, self.step, records)
        self._delivery.write(self.step, records, self.notes)
        return seconds

    @property
    def latest(self) -> dict[str, float]:
        """The last value of each number, by tag."""
        return {tag: values[-1][1] for tag, values in [*self.history.items()]}

    def summary(self) -> str:
        """Return a table of what was found, its cost, and what is absent and why."""
        return describe(self)

    @property
    def cost_share(self) -> float:
        """Share of the analysis in the time so far."""
        return self._cadence.share

    def state_dict(self) -> dict[str, Any]:
        """Return curves, counts, schedule and starts, to go on from after a restart."""
        return {
            "step": self.step,
            "history": {tag: list(values) for tag, values in self.history.items()},
            "statistics": self._view.state_dict(),
            "cadence": self._cadence.state_dict(),
            "measures": self._attempts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Of ranks that train together, all have to call it.

        Raises:
            RuntimeError: If a rank does not call.
            ValueError: If ``state`` is something else, or on some ranks another step's.
        """  # noqa: DOC502 (raised by the checks, and where ranks wait)
        check_state(state)
        self._ranks.wait_for_all("load_state_dict")
        self.step = state["step"]
        self.history = {tag: list(values) for tag, values in state["history"].items()}
        self._view.load_state_dict(state["statistics"])
        self._attempts.load_state_dict(state.get("measures", {}))
        self._schedule.restart()
        self._cadence.load_state_dict(state["cadence"])
        self._ranks.check_alike("load_state_dict", self._setting())
        self._plan()

    def detach(self) -> None:
        """Remove every hook, restore converted layers and close the sinks.

        Numbers stay readable. Calling it again does nothing.
        """
        if not self._attached:
            return
        self._attached = False
        self._capture.detach()
        for module in self._converted:
            restore_dropout_(module)
        self._leave()

    def __repr__(self) -> str:
        return f"<Analysis of {type(self.model).__name__} at step {self.step}>"

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    def __deepcopy__(self, _: Any) -> Analysis:
        return self  # in copies of what keeps it: it watches one model

    def __enter__(self) -> Analysis:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
