"""The options of every script of this folder."""

import argparse
import os
from pathlib import Path

# As many as are reported.
SEEDS = 3


def parse(doc, options=(), arguments=None):
    """Read the options of a script whose help is ``doc``; ends it at wrong ones.

    Those are the options of every script and ``(flags, keywords)`` of ``add_argument``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a look, in a minute")
    size.add_argument(
        "--paper", action="store_true", help="the paper's own setting, at its size"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        help=f"default: {SEEDS}; with --quick 1. Results of fewer than {SEEDS} stay in "
        "--out",
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        default=os.environ.get("DROPOUT_IR_DATA", "data"),
        help="folder of the data sets; what is missing is downloaded to it "
        "(default: $DROPOUT_IR_DATA, else data)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/paper"),
        help="finished cells and TensorBoard runs (default: runs/paper)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="forget what --out holds of it"
    )
    for flags, keywords in options:
        parser.add_argument(*flags, **keywords)
    chosen = parser.parse_args(arguments)
    if chosen.seeds is None:
        chosen.seeds = 1 if chosen.quick else SEEDS
    if chosen.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {chosen.seeds}")
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot write to {chosen.out} ({error.strerror})")
    return chosen
