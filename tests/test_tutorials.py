"""Every tutorial runs to its last assert, in less than its half minute."""

import ast
import importlib.util
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
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_is_short_and_ends_in_what_it_showed(path):
    text = path.read_text()
    assert len(text.splitlines()) < 120
    assert re.search(r"^# %%", text, re.MULTILINE)
    last_cell = re.split(r"^# %%", text, flags=re.MULTILINE)[-1]
    assert re.search(r"^assert ", last_cell, re.MULTILINE)


@pytest.fixture(scope="module")
def render():
    path = ROOT / "tutorials" / "render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_the_cells_of_a_page_are_the_tutorial(path, render):
    text = path.read_text()
    cells = list(render.cells(text))
    assert cells[0][0].startswith("# ") and "Question: " in cells[0][0]
    whole = ast.parse(text)
    shown = ast.parse("\n".join(code for _, code in cells))
    assert ast.dump(ast.Module(whole.body[1:], [])) == ast.dump(shown)
    for prose, code in cells[1:]:
        assert prose and "#" not in prose and not code.startswith("#")


def test_a_page_holds_text_output_and_picture(render, tmp_path):
    pytest.importorskip("nbconvert", reason="the extra `tutorials` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `tutorials` is not installed")
    path = tmp_path / "07_small.py"
    path.write_text(
        '"""A title.\n\nQuestion: why?\n"""\n\n# %% Some *text*\n# in two lines.\n'
        "import matplotlib.pyplot as plt\n\nprint(6 * 7)\n\n"
        "# %% Drawn.\nplt.figure()\nplt.plot([1, 2])\n"
    )
    page = render.render(path, tmp_path).read_text()
    assert "Some <em>text</em> in two lines." in page and "<h1" in page
    assert ">42\n<" in page and "data:image/png;base64," in page
    assert (tmp_path / "07_small.ipynb").is_file()
    path.write_text('"""A title.\n\nWhy?\n"""\n# %% Wrong.\nassert 1 == 2\n')
    with pytest.raises(Exception, match="AssertionError"):
        render.render(path, tmp_path)
