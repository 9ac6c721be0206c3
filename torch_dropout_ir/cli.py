"""Floor 4: ``torch-dropout-ir``, the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_dropout_ir.attach import check_data
from torch_dropout_ir.demo import Settings, run_demo
from torch_dropout_ir.demo.data import PIXELS, REDUCED
from torch_dropout_ir.loading import (
    load_device,
    load_factory,
    load_loss,
    load_weights,
    seed,
    told_as,
)
from torch_dropout_ir.offline import analyze, on_device

_DEMO = """\
Trains one network twice, without and with dropout, by full-batch gradient descent with
half the squared error on one-hot labels (the risk of Zhang & Xu, TPAMI 2024), and shows
what dropout does to it: R_1, R_2, condensation of the hidden neurons, top Hessian
eigenvalue and trace, live in TensorBoard and in one table and one picture at the end.

With --data-root DIR that holds MNIST (DIR/MNIST/raw/...), the network is the paper's
784-1000-10 on the first 1000 training images, tested on all 10 000. Without it, a like
network 20-200-10 on scikit-learn's digits: 300 training images, whitened on their 20
leading principal components, tested on the other 1497.

All parameters start normal with one standard deviation, larger than torch's default:
the paper's linear regime, where plain gradient descent generalizes less well and
dropout shows in the test accuracy. From a small start plain gradient descent does as
well. On raw pixels the neurons keep what they start with on pixels that never change,
and do not condense within the default steps; on whitened components they do.
"""


_ANALYZE = """\
Measures a trained network on data, without training it: R_1 with its error and its part
of each dropout site, R_S, effective neurons of each layer, top eigenvalue and trace of
the Hessian. MODULE:FACTORY is a function without arguments in a module that can be
imported from here:

  torch-dropout-ir analyze --model nets:make --data nets:validation \\
      --checkpoint run/last.pt --json found.json

Weights are loaded without running code out of the file (weights_only=True). They may
lie at its top or under state_dict, model_state_dict or model; --key says where else.
Prefixes are taken off the names: of DistributedDataParallel, torch.compile, averaged
models, or the attribute of a Lightning module that the network is. Of Hugging Face's
folders give the file, model.safetensors.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch-dropout-ir",
        description="What dropout does to a network, measured while it trains.",
        epilog="torch-dropout-ir COMMAND --help tells more of each.",
    )
    version = f"%(prog)s {importlib.metadata.version('torch-dropout-ir')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_analyze(commands)
    _add_board(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a network with and without dropout and show the difference",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder with MNIST/raw; default: scikit-learn's digits",
    )
    demo.add_argument(
        "--log-dir",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where event files and the picture go (default: %(default)s)",
    )
    demo.add_argument(
        "--p", type=float, default=0.5, help="probability of dropping (default: 0.5)"
    )
    for name, kind, what in (
        ("steps", int, "optimizer steps a run"),
        ("lr", float, "learning rate"),
        ("std", float, "standard deviation of all parameters at the start"),
        ("width", int, "hidden neurons"),
        ("components", int, "whitened principal components to feed; 0: raw pixels"),
    ):
        digits, pixels = (standard[name] for standard in (REDUCED, PIXELS))
        default = f"default: {digits} on components, {pixels} on MNIST's pixels"
        demo.add_argument(f"--{name}", type=kind, help=f"{what} ({default})")
    demo.add_argument(
        "--seed", type=seed, default=0, help="seed of start and masks (default: 0)"
    )
    demo.set_defaults(run=lambda x: print(run_demo(Settings.of(**x))))


def _add_analyze(commands: Any) -> None:
    verb = commands.add_parser(
        "analyze",
        help="measure a checkpoint: R_1, R_S, condensation, sharpness",
        description=_ANALYZE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, what in (
        ("model", "what makes the network, without weights"),
        ("data", "what makes batches (inputs, targets): one, a list, or a loader"),
    ):
        verb.add_argument(
            f"--{name}", required=True, metavar="MODULE:FACTORY", help=what
        )
    verb.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights, from torch.save(model.state_dict()); default: as the model is",
    )
    verb.add_argument(
        "--key",
        help="where in the file the weights are, with dots between keys and before "
        "the rest of their names: net.state_dict, or state_dict.teacher",
    )
    verb.add_argument(
        "--loss",
        default="cross_entropy",
        metavar="LOSS",
        help="cross_entropy, mse, or MODULE:NAME of a module or "
        "function of outputs and targets (default: %(default)s)",
    )
    _add_budget(verb)
    verb.add_argument("--log-dir", metavar="DIR", help="TensorBoard run to write")
    verb.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write")
    verb.set_defaults(run=_run_analyze)


def _add_budget(verb: argparse.ArgumentParser) -> None:
    for name, default, what in (
        ("batches", 8, "most batches to measure on"),
        ("masks", 16, "masks a batch where R_1 has no closed form"),
    ):
        verb.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    verb.add_argument(
        "--seed", type=seed, default=0, help="seed of everything drawn (default: 0)"
    )
    verb.add_argument(
        "--device", default="cpu", help="device to measure on (default: cpu)"
    )
    verb.add_argument(
        "--no-sharpness", action="store_true", help="leave the Hessian out: it is dear"
    )


def _run_analyze(chosen: dict[str, Any]) -> int:
    for name, least in (("batches", 1), ("masks", 2)):  # of one there is no error
        if chosen[name] < least:
            raise ValueError(f"--{name}: expected at least {least}, got {chosen[name]}")
    if chosen["key"] is not None and chosen["checkpoint"] is None:
        raise ValueError("--key: it says where in a file; give `--checkpoint` with it")
    out, device = chosen["json"], load_device(chosen["device"])
    if out is not None and not (out.parent.is_dir() and not out.is_dir()):
        where = out if out.is_dir() else out.parent
        said = "expected a file, got the" if out.is_dir() else "there is no"
        raise ValueError(f"--json: {said} folder {where}")
    torch.manual_seed(chosen["seed"])
    model = load_factory(chosen["model"], "--model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: expected an nn.Module, got {type(model).__name__}")
    check_data(model, "--model")
    if chosen["checkpoint"] is not None:
        with told_as("--checkpoint"):
            load_weights(model, chosen["checkpoint"], chosen["key"])
    data = load_factory(chosen["data"], "--data")
    with told_as("--data"):
        batches = on_device(data, device, chosen["batches"])
    loss = load_loss(chosen["loss"])
    report = analyze(
        model.to(device),
        batches,
        loss,
        most_batches=chosen["batches"],
        num_masks=chosen["masks"],
        sharpness=not chosen["no_sharpness"],
        seed=chosen["seed"],
        log_dir=chosen["log_dir"],
        progress=sys.stderr.isatty(),
    )
    print(report)
    if out is not None:
        out.write_text(report.as_json() + "\n")
    failed = {"regularizer", "condensation", "sharpness"} & report.absent.keys()
    for name in sorted(failed):
        print(f"torch-dropout-ir: no {name}: {report.absent[name]}", file=sys.stderr)
    return 1 if failed else 0


def _add_board(commands: Any) -> None:
    board, report = (
        commands.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}."
        )
        for name, what in (
            ("board", "show runs in TensorBoard, on the tab Dropout IR"),
            ("report", "write the tab Dropout IR as one HTML file, to send on"),
        )
    )
    for command in (board, report):
        command.add_argument(
            "log_dir",
            type=Path,
            metavar="LOGDIR",
            help="a run or a folder of runs: what `log_dir=` was, or `runs` where none "
            "was given",
        )
    board.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s)",
    )
    board.add_argument(
        "--port", type=int, help="0: any (default: 6006, or the next free one)"
    )
    board.add_argument(
        "--no-browser", action="store_true", help="only print the address"
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: dropout-ir-report.html in LOGDIR",
    )
    board.set_defaults(run=_run_board)
    report.set_defaults(run=_run_report)


def _run_board(chosen: dict[str, Any]) -> None:
    from torch_dropout_ir.tensorboard.board import serve

    serve(chosen["log_dir"], chosen["host"], chosen["port"], not chosen["no_browser"])


def _run_report(chosen: dict[str, Any]) -> None:
    from torch_dropout_ir.tensorboard.board import write_report

    out = chosen["out"] or chosen["log_dir"] / "dropout-ir-report.html"
    print(write_report(chosen["log_dir"], out))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments; those of the process if None.

    Returns:
        Exit status: 0, 1 where something could not be read, written or computed, 2 for
        wrong arguments.
    """
    chosen = vars(_parser().parse_args(arguments))
    chosen.pop("command")
    run = chosen.pop("run")
    try:
        return run(chosen) or 0
    except (ValueError, TypeError, OSError, ImportError) as err:
        print(f"torch-dropout-ir: {err}", file=sys.stderr)
        return 2 if isinstance(err, (ValueError, TypeError)) else 1
    except KeyboardInterrupt:
        print("torch-dropout-ir: interrupted", file=sys.stderr)
        return 130
