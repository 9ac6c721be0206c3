"""TensorBoard on a log directory, opened on the panels; and the panels as one file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tensorboard import default, program
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import (
    EventMultiplexer,
)
from tensorboard.context import RequestContext

from torch_dropout_ir_board import BoardLoader
from torch_dropout_ir_board.plugin import STATIC, BoardPlugin
from torch_dropout_ir_board.reading import answer

# TensorBoard's own sample of ten pictures a tag loses most of a run.
SAMPLES: Final = {"images": 200, "histograms": 200, "scalars": 2000}
_MOST_PICTURES: Final = 600


def start(
    log_dir: Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    load_fast: str = "auto",
) -> str:
    """Return the address of the tab, in a TensorBoard started on a directory of runs.

    It may still be empty; the server runs until the process ends.

    Args:
        log_dir: Directory of runs.
        host: Address to listen on.
        port: Port; None: 6006, or the next that is free; 0: any.
        load_fast: TensorBoard's option: ``"false"`` reads without a second process.

    Raises:
        OSError: If ``log_dir`` does not exist, ``host`` is no address of this machine
            or the port is taken.
    """
    _check_directory(log_dir)
    samples = ",".join(f"{kind}={count}" for kind, count in SAMPLES.items())
    options = ["--logdir", str(log_dir), "--host", host, "--samples_per_plugin"]
    options += [
        samples,
        "--load_fast",
        load_fast,
        *(() if port is None else ("--port", str(port))),
    ]
    board = program.TensorBoard(_plugins())
    board.configure(["tensorboard", *options])
    try:
        address = board.launch()
    except (program.TensorBoardServerException, OverflowError, SystemExit) as err:
        why = "it has said why" if isinstance(err, SystemExit) else err
        raise OSError(
            f"--host, --port: TensorBoard cannot listen on {host} ({why})"
        ) from err
    return f"{address}#{BoardPlugin.plugin_name}"


def _plugins() -> list[Any]:
    """TensorBoard's plugins, those installed that can be loaded, and ours."""
    found = default.get_static_plugins()
    for entry in default._iter_entry_points("tensorboard_plugins"):
        try:
            found.append(entry.load())
        except Exception as err:
            print(f"the plugin {entry.name} was left out: {err!r}", file=sys.stderr)
    return found if BoardLoader in found else [*found, BoardLoader]


def serve(log_dir: Path, host: str, port: int | None, browse: bool) -> None:
    """Start TensorBoard, print and open its address, and wait for an interrupt."""
    address = start(log_dir, host, port)
    print(f"TensorBoard: {address}  (Ctrl+C ends it)", flush=True)
    graphical = sys.platform in {"darwin", "win32"}
    graphical |= bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if browse and graphical:
        webbrowser.open(address)
    threading.Event().wait()


def write_report(log_dir: Path, path: Path) -> str:
    """Return a line on what was written: the tab of ``log_dir`` as one HTML file.

    It needs no network and no server. At most 12 steps a picture are kept, fewer where
    there are many layers and runs, the first and the last always: of TensorBoard's
    sample of 200, which drops first ones of longer runs.

    Raises:
        OSError: If ``log_dir`` does not exist or ``path`` cannot be written.
        ValueError: If there is no run.
    """  # noqa: DOC502 (raised by what it calls)
    _check_directory(log_dir)
    runs = EventMultiplexer(tensor_size_guidance=SAMPLES)
    runs.AddRunsFromDirectory(str(log_dir)).Reload()
    provider = MultiplexerDataProvider(runs, str(log_dir))
    records = collect(lambda *asked: answer(provider, RequestContext(), "", *asked))
    names = records['["index",""]']["runs"]
    if not names:
        raise ValueError(
            f"LOGDIR: expected runs with event files, found none in {log_dir}"
        )
    text = page(records)
    path.write_text(text, encoding="utf-8")
    counted = "1 run" if len(names) == 1 else f"{len(names)} runs"
    return f"report: {path} ({counted}, {len(text) / 2**20:.1f} MiB)"


def collect(ask: Callable[..., Any]) -> dict[str, Any]:
    """Return all answers that the page will want, by question."""
    index = ask("index")
    found = {_key("index", ""): index}
    for kind in ("scalars", "histograms", "images"):
        for tag in index[kind]:
            found[_key(kind, tag)] = ask(kind, tag)
    pictures = [s for t in index["images"] for s in found[_key("images", t)].values()]
    most = min(12, max(2, _MOST_PICTURES // max(1, len(pictures))))
    for series in pictures:
        last = len(series) - 1
        kept = {round(i * last / (most - 1)) for i in range(most)} if last > 0 else {0}
        series[:] = [series[i] for i in sorted(kept)]
        for _, key in series:
            found[_key("picture", key or "")] = (
                ask("picture", key) if key else {"error": "Not a picture."}
            )
    return found


def _key(route: str, of: str) -> str:
    """What the page's ``JSON.stringify([route, of])`` gives."""
    return json.dumps([route, of], ensure_ascii=False, separators=(",", ":"))


def page(records: dict[str, Any]) -> str:
    """Return the page; what comes from a log stays text in it."""
    script, style = ((STATIC / n).read_text("utf-8") for n in ("index.js", "style.css"))
    script += '\nrender(JSON.parse(document.getElementById("records").textContent));\n'
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    )
    data = json.dumps(records, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<title>What dropout does: report</title>\n"
        f"<style>\n{style}</style></head>\n"
        f'<body><script type="application/json" id="records">{data}</script>\n'
        f'<script type="module">{script}</script></body></html>\n'
    )


def _check_directory(log_dir: Path) -> None:
    if not log_dir.is_dir():
        raise FileNotFoundError(
            f"LOGDIR: expected a directory of runs, got {log_dir}, which is none"
        )
