"""What is handed out holds what it takes to build it."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def test_a_source_distribution_holds_the_kernels_where_there_is_no_torch(tmp_path):
    """As in the environment that `python -m build` makes for itself."""
    for name in NEEDED:
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "torch_dropout_ir_board"):
        shutil.copytree(ROOT / name, tmp_path / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=tmp_path,
        env={**os.environ, "TORCH_DROPOUT_IR_NO_EXTENSION": "1"},
        check=True,
        capture_output=True,
    )
    (made,) = (tmp_path / "dist").iterdir()
    with tarfile.open(made) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert sources | {"torch_dropout_ir_board/static/index.js"} <= inside
    assert not any(name.startswith("tests/") for name in inside)
