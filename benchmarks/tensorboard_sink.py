"""What showing a run costs: the training thread, bytes, and the tab's first picture.

Ours is one event a step, written by a thread of its own; beside it, what one would
write with torch's ``SummaryWriter``: ``add_scalar``, ``add_histogram``, ``add_image``.

    python benchmarks/tensorboard_sink.py --png tensorboard.png
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from torch_dropout_ir.analysis import Image
from torch_dropout_ir.analysis.measures import Condensation
from torch_dropout_ir.analysis.snapshot import Snapshot
from torch_dropout_ir.tensorboard import TensorBoardSink
from torch_dropout_ir.tensorboard.board import start


def records_of(layers, width, step):
    """What an analysis records of a network, and curves of its sites."""
    torch.manual_seed(step)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    found = dict(Condensation()(Snapshot(net, step, ())))
    for i in range(layers):
        found |= {f"mask/keep_rate/{i}": 0.5, f"mask/z_score/{i}": 0.1,
                  f"regularizer/R1/{i}": 0.2}  # fmt: skip
    return found


def event_bytes(path):
    """Bytes by step, without the first event of the file."""
    sizes = {}
    for file in Path(path).glob("events*"):
        for event in LegacyEventFileLoader(str(file)).Load():
            if event.HasField("summary"):
                size = event.ByteSize()
                sizes.setdefault(round(event.wall_time, 6), []).append(size)
    return [sum(found) for found in sizes.values()]


def ours(path, found):
    """CPU microseconds of the caller a step, and of the process."""
    sink, caller, whole = TensorBoardSink(path), [], time.process_time()
    for step, records in enumerate(found):
        started = time.thread_time()
        sink.write(step, records, {})
        caller.append(1e6 * (time.thread_time() - started))
        time.sleep(0.2)
    sink.close()
    return caller, 1e6 * (time.process_time() - whole) / len(found)


def plain(path, found):
    """The same with a ``SummaryWriter``."""
    writer, caller, whole = SummaryWriter(path), [], time.process_time()
    for step, records in enumerate(found):
        started = time.thread_time()
        for tag, record in records.items():
            if isinstance(record, float):
                writer.add_scalar(tag, record, step)
            elif isinstance(record, Image):
                writer.add_histogram(f"{tag}/values", record.values, step)
                writer.add_image(tag, (record.values[None] + 1) / 2, step)
        caller.append(1e6 * (time.thread_time() - started))
    writer.close()
    return caller, 1e6 * (time.process_time() - whole) / len(found)


TAG = "condensation/cosine/0"
# Milliseconds from the page's start to its first frame with a drawn heat map.
DRAWN = """new Promise((done) => {
  const look = () => {
    const canvas = document.querySelector('canvas');
    const seen = canvas?.width && canvas.getContext('2d')
      .getImageData(0, 0, canvas.width, canvas.height).data.some((x) => x);
    seen ? done(performance.now()) : requestAnimationFrame(look);
  };
  look();
})"""


def in_the_browser(path, runs, times=5):
    """Seconds from opening the tab's page to its first picture, each time; or None.

    Of a server of its own, which has read all runs and answered nothing else yet.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        return None
    address, _ = served(path, runs)
    found = []
    with tempfile.TemporaryDirectory() as profile, Browser(profile) as page:
        for _ in range(times):
            page.open(address + "data/plugin_entry.html?name=dropout_ir")
            page.until("document.querySelector('canvas') !== null")
            found.append(page.run(DRAWN) / 1000)
            page.open("about:blank")
    return found


def asked(address, route, of=""):
    """What the tab's server answers."""
    url = f"{address}data/plugin/dropout_ir/{route}?of={urllib.parse.quote(of)}"
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def served(path, runs):
    """The address of a new server, and the seconds until it has read all runs."""
    address = start(Path(path), port=0).split("#")[0]
    started = time.perf_counter()
    while len(asked(address, "index").get("images", {}).get(TAG, ())) < runs:
        time.sleep(0.02)
    return address, time.perf_counter() - started


def first_picture(found, runs, steps):
    """Seconds until all is read, of the tab's questions, and of its first drawing."""
    with tempfile.TemporaryDirectory() as path:
        for run in range(runs):
            sink = TensorBoardSink(f"{path}/{run}")
            for step in range(steps):
                sink.write(step, found[step % len(found)], {})
            sink.close()
        address, read = served(path, runs)
        started = time.perf_counter()
        index = asked(address, "index")
        for scalar in list(index["scalars"])[:10]:
            asked(address, "scalars", scalar)
        for points in asked(address, "images", TAG).values():
            asked(address, "picture", points[-1][1])
        answers = time.perf_counter() - started
        return read, answers, in_the_browser(path, runs)


def draw(rows, path):
    """Draw bytes a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, sizes in rows.items():
        axes.plot([size / 1024 for size in sizes], marker=".", label=name)
    axes.axhline(64, color="grey", linestyle=":", label="the bound, 64 KiB")
    axes.set(xlabel="logging step", ylabel="KiB", yscale="log", title="Bytes a step")
    axes.legend(frameon=False)
    figure.savefig(path)
    print(f"picture: {path}")


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--png", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = [records_of(chosen.layers, chosen.width, s) for s in range(chosen.steps)]
    print(f"{chosen.layers} layers of {chosen.width} neurons, {len(found[0])} records")
    print(f"{'':18}{'caller, us':>12}{'process, us':>13}{'KiB a step':>12}{'most':>8}")
    rows = {}
    for name, write in (("TensorBoardSink", ours), ("SummaryWriter", plain)):
        with tempfile.TemporaryDirectory() as path:
            caller, whole = write(path, found)
            if write is ours:
                sizes = event_bytes(path)
            else:
                total = sum(f.stat().st_size for f in Path(path).glob("events*"))
                sizes = [total / len(found)] * len(found)
        rows[name] = sizes
        middle = statistics.median(sizes) / 1024
        print(f"{name:18}{statistics.median(caller):>12.0f}{whole:>13.0f}"
              f"{middle:>12.1f}{max(sizes) / 1024:>8.1f}")  # fmt: skip
    read, answers, shown = first_picture(found, runs=4, steps=50)
    print(f"tab, 50 steps x {chosen.layers} layers x 4 runs: all runs read after "
          f"{read:.2f} s; answers for the first picture {answers:.2f} s")  # fmt: skip
    if shown is None:
        print("chromium is not installed: the drawing itself is not timed")
    else:
        first, *later = shown
        print(f"in the browser, from opening the tab to its drawn heat map: "
              f"{first:.2f} s, then {statistics.median(later):.2f} s")  # fmt: skip
    if chosen.png:
        draw(rows, chosen.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
