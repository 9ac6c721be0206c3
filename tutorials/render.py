"""The tutorials as pages: code, what it prints and its pictures.

    python tutorials/render.py
    python tutorials/render.py tutorials/03_condensation.py --out pages

Runs each tutorial as a notebook and writes it as NN_title.ipynb and NN_title.html. A
cell begins at ``# %%``; the comment there is its text. Needs the extra ``tutorials``.
"""

import argparse
import ast
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIRST = "%matplotlib inline"  # a picture below the cell that draws it


def cells(text):
    """``(prose, code)`` of each cell; the first is the docstring's, without code."""
    head, *parts = re.split(r"^# %%", text, flags=re.MULTILINE)
    title, _, said = ast.get_docstring(ast.parse(head)).partition("\n\n")
    yield f"# {title.rstrip('.')}\n\n{said}", ""
    for part in parts:
        lines = part.splitlines()
        count = next((k for k, one in enumerate(lines) if k and one[:1] != "#"), None)
        prose = " ".join(line.lstrip("# ").strip() for line in lines[:count])
        yield prose, "" if count is None else "\n".join(lines[count:]).strip()


def notebook(text):
    """The tutorial as a notebook that has not run."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook  # an extra

    made = [new_code_cell(FIRST)]
    for prose, code in cells(text):
        made += [new_markdown_cell(prose)] if prose else []
        made += [new_code_cell(code)] if code else []
    return new_notebook(cells=made)


def render(path, out):
    """Run a tutorial in ``out`` and write its notebook and its page there."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    made = notebook(path.read_text())
    NotebookClient(made, timeout=600, resources={"metadata": {"path": out}}).execute()
    nbformat.write(made, out / f"{path.stem}.ipynb")
    exporter = HTMLExporter(embed_images=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.mathjax_url = exporter.require_js_url = ""  # a page that asks nobody
    made.cells = made.cells[1:]
    page, _ = exporter.from_notebook_node(made, {"metadata": {"name": path.stem}})
    (out / f"{path.stem}.html").write_text(page)
    return out / f"{path.stem}.html"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = sorted(HERE.glob("[0-9][0-9]_*.py"))
    parser.add_argument("tutorials", nargs="*", type=Path, default=every)
    parser.add_argument("--out", type=Path, default=Path("build/tutorials"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or torchrun warns, on the page
    for path in chosen.tutorials:
        print(render(path, chosen.out), flush=True)


if __name__ == "__main__":
    sys.exit(main())
