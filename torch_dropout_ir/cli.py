"""Floor 4: ``torch-dropout-ir``, the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_dropout_ir.demo import Settings, run_demo
from torch_dropout_ir.demo.settings import PIXELS, REDUCED

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch-dropout-ir",
        description="What dropout does to a network, measured while it trains.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
        digits, pixels = (getattr(standard, name) for standard in (REDUCED, PIXELS))
        default = f"default: {digits} on components, {pixels} on MNIST's pixels"
        demo.add_argument(f"--{name}", type=kind, help=f"{what} ({default})")
    demo.add_argument("--seed", type=int, default=0, help="default: 0")
    _add_board(commands)
    return parser


def _add_board(commands: Any) -> None:
    board = commands.add_parser("board", help="show runs in TensorBoard, on the panels")
    report = commands.add_parser(
        "report", help="write the panels as one HTML file, to send to a colleague"
    )
    for command in (board, report):
        command.add_argument("log_dir", type=Path, metavar="LOGDIR", help="runs")
    board.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    board.add_argument("--port", type=int, help="default: 6006, or the next free one")
    board.add_argument(
        "--no-browser", action="store_true", help="only print the address"
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: dropout-ir-report.html in LOGDIR",
    )


def _run(command: str, chosen: dict[str, Any]) -> None:
    if command == "demo":
        print(run_demo(Settings.of(**chosen)))
        return
    from torch_dropout_ir.tensorboard.board import serve, write_report

    log_dir = chosen["log_dir"]
    if command == "board":
        serve(log_dir, chosen["host"], chosen["port"], not chosen["no_browser"])
    else:
        out = chosen["out"] or log_dir / "dropout-ir-report.html"
        print(write_report(log_dir, out))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments; those of the process if None.

    Returns:
        Exit status: 0, 1 where something could not be read, written or computed, 2 for
        wrong arguments.
    """
    chosen = vars(_parser().parse_args(arguments))
    try:
        _run(chosen.pop("command"), chosen)
    except (ValueError, OSError, ImportError) as err:
        print(f"torch-dropout-ir: {err}", file=sys.stderr)
        return 2 if isinstance(err, ValueError) else 1
    except KeyboardInterrupt:
        print("torch-dropout-ir: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
