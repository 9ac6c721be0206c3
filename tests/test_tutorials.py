"""Every tutorial runs to its last assert, in less than its half minute."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error", str(path)]
    options = {"capture_output": True, "text": True, "timeout": 300}
    found = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, **options
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.strip()


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_is_short_and_ends_in_what_it_showed(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 120
    assert re.search(r"^# %%", text, re.MULTILINE)
    last_cell = re.split(r"^# %%", text, flags=re.MULTILINE)[-1]
    assert re.search(r"^assert ", last_cell, re.MULTILINE)
