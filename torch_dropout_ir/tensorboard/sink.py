"""One TensorBoard event a step, drawn and written beside the training thread."""

from __future__ import annotations

import atexit
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from torch_dropout_ir.analysis import Record
from torch_dropout_ir.arguments import check_count
from torch_dropout_ir.tensorboard import values
from torch_dropout_ir.tensorboard.descriptions import describe_tag
from torch_dropout_ir.tensorboard.panels import Panels

MAX_BYTES: Final = 2**16
_MOST_WAITING: Final = 64
_PATIENCE: Final = 10.0  # seconds that training waits for a disk that takes nothing
_Step = tuple[int, float, Mapping[str, Record], Mapping[str, str]]


def _lasting(log_dir: str | os.PathLike[str] | None) -> str:
    """Return a path that is the same where the script goes to another directory."""
    if log_dir is None:  # as SummaryWriter names it
        log_dir = f"runs/{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}"
        return _new(os.path.abspath(log_dir))
    path = os.fspath(log_dir)
    return path if "://" in path else os.path.abspath(path)


def _new(path: str) -> str:
    """Make a directory, by another name where a run of this second has it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    name, number = path, 1
    while True:
        try:
            os.mkdir(name)
            return name
        except FileExistsError:
            number += 1
            name = f"{path}_{number}"


class TensorBoardSink:
    """Writes records of an analysis as one event a step.

    Training waits for nothing but a queue: a thread draws the pictures and writes.
    Every number is in the event of its step. Pictures and histograms fill it up to
    ``max_bytes``, the longest unseen first; the others come with later events, in an
    event of their own step, or at the end. So an event step has at most ``max_bytes``,
    or its numbers (15 bytes and the tag each, and its description where it is new) and
    one picture. Errors of numbers also give the bands ``uncertainty/<tag>/...``, and
    the first picture of a tag stays under ``initial/<tag>``, as TensorBoard shows a
    random sample of ten. Model, sites, loss, seed and versions are text and
    hyperparameters of the run itself, and the page of Custom Scalars has its charts.

    Args:
        log_dir: Run directory; None: a new one, ``runs/<time>_<host>``.
        max_bytes: Most bytes of an event step.

    Attributes:
        log_dir: The directory written to, an absolute path.

    Raises:
        TypeError: If ``log_dir`` is no path.
        OSError: If the directory cannot be written.

    Example:
        >>> import os, tempfile
        >>> sink = TensorBoardSink(tempfile.mkdtemp(), max_bytes=2**15)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        >>> with tdi.attach_analysis(net, log_dir=False, sinks=[sink]) as analysis:
        ...     found = analysis.measure()
        >>> [name.split(".")[0] for name in os.listdir(sink.log_dir)]
        ['events']
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        check_count("TensorBoardSink", "max_bytes", max_bytes, 1)
        if not (log_dir is None or isinstance(log_dir, (str, os.PathLike))):
            raise TypeError(
                "attach_analysis: expected `log_dir` to be a path, None (for "
                "`runs/<time>_<host>`) or False (for no files), got "
                f"{type(log_dir).__name__}"
            )
        path = log_dir
        try:
            path = _lasting(log_dir)  # raises where the script's directory is gone
            self._writer = SummaryWriter(log_dir=path, flush_secs=5)
        except OSError as err:
            raise type(err)(
                err.errno,
                f"attach_analysis: cannot write TensorBoard events to `log_dir` "
                f"({err.strerror}); choose another, or pass `log_dir=False`",
                err.filename if log_dir is None else path,
            ) from err
        self.log_dir = self._writer.log_dir
        self._events = self._writer._get_file_writer()
        self._panels = Panels(max_bytes)
        self._described: set[str] = set()
        self._facts: dict[str, str] = {}
        self._started = False
        self._sites: tuple[str, ...] | None = None  # those of the last layout
        self._error: Exception | None = None
        self._process = os.getpid()
        self._steps: queue.Queue[_Step | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        # A script that ends without a word still has its last records written.
        atexit.register(self.close)

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Hand over the records of one step; raise what an earlier one's met."""
        if self._process != os.getpid():
            return  # the thread does not survive a fork
        if self._error is None and not self._thread.is_alive():
            self._error = RuntimeError("the thread that writes has died")
        if self._error is None:
            taken = (step, time.time(), dict(records), dict(notes))
            try:
                self._steps.put(taken, timeout=_PATIENCE)
            except queue.Full:
                self._error = TimeoutError(f"nothing was written in {_PATIENCE:.0f} s")
        if self._error is not None:
            atexit.unregister(self.close)  # it is told now
            raise self._error

    def close(self) -> None:
        """Write what is waiting and close the event file; raise what that met."""
        atexit.unregister(self.close)
        if self._process != os.getpid() or not self._thread.is_alive():
            return
        if isinstance(self._error, TimeoutError):
            raise self._error  # the thread may hang for good
        self._steps.put(None)
        self._thread.join()
        self._writer.close()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (taken := self._steps.get()) is not None:
            self._try(self._write, *taken)
        self._try(self._write_waiting)

    def _try(self, write: Callable[..., None], *given: Any) -> None:
        if self._error is None:
            try:
                write(*given)
            except Exception as err:
                self._error = err

    def _write_waiting(self) -> None:
        while self._panels.waiting:
            self._add_panels(-1, time.time(), Summary())

    def _write(
        self,
        step: int,
        when: float,
        records: Mapping[str, Record],
        notes: Mapping[str, str],
    ) -> None:
        summary = Summary()
        self._add_facts(summary, notes)
        for tag, record in records.items():
            if isinstance(record, float):
                value = summary.value.add(tag=tag, simple_value=record)
                values.describe(value, self._say(tag, notes))
            else:
                self._panels.add(step, tag, record, describe_tag(tag, notes))
        bands = values.bands(records)
        for tag, number in bands.items():
            values.add_band(summary, tag, number, self._say(tag, notes))
        self._add_layout(summary, bands)
        self._add_panels(step, when, summary)

    def _add_panels(self, step: int, when: float, summary: Summary) -> None:
        """Fill the event of this step, and write those of earlier ones that fit."""
        by_step = self._panels.take(summary.ByteSize())
        summary.MergeFrom(by_step.pop(step, Summary()))
        for earlier in sorted(by_step):
            self._events.add_summary(by_step[earlier], earlier, walltime=when)
        if summary.value:
            self._events.add_summary(summary, step, walltime=when)

    def _say(self, tag: str, notes: Mapping[str, str]) -> str:
        """The description of a tag that is new; nothing the next time."""
        if tag in self._described:
            return ""
        self._described.add(tag)
        return describe_tag(tag, notes)

    def _add_layout(self, summary: Summary, bands: Iterable[str]) -> None:
        """Add the layout; again where it has more sites to show."""
        sites = dict.fromkeys(self._sites or ()) | dict.fromkeys(values.sites_of(bands))
        if self._sites is None or len(sites) > len(self._sites):
            self._sites = tuple(sites)
            values.add_layout(summary, self._sites)

    def _add_facts(self, summary: Summary, notes: Mapping[str, str]) -> None:
        facts = {k[4:]: v for k, v in notes.items() if k.startswith("run/")}
        if not self._started:
            self._started = True
            for found in values.hyperparameters(facts) if facts else ():
                summary.MergeFrom(found)
        # A schedule of the learning rate is no news.
        lasting = {name: said for name, said in facts.items() if name != "lr"}
        if lasting != self._facts:
            self._facts = lasting
            values.add_facts(summary, facts)
