"""The table of the figures: README.md of this folder, from results/*.json alone.

python tutorials/paper/table.py
"""

import ast
import json
import re
from pathlib import Path

HERE = Path(__file__).parent
TOP = """# The paper, figure by figure

Zhang & Xu, *Implicit Regularization of Dropout*, TPAMI 2024. This page is written by
`table.py` from `results/*.json`, which the scripts write; reasons and captions are the
scripts' own words, and nothing else is typed in.
`make paper` runs all of them, cheapest first; `make paper ARGS=--quick` has a look at
each in minutes (its numbers never enter this table, nor do those of fewer than three
seeds). Every script takes `--help`, shows its progress, and goes on where it was
stopped.

"Ours" is the mean over the seeds ± half of the distance between the extremes. A claim
is **reproduced** when every seed meets the tolerance that its sentence states, and
**reproduced in direction** when every seed points the paper's way, or, where two things
are to be equal, is within a wider bound, the second of the claim in its script; why not
more is told below. Settings other than the paper's are stated at the top of each
script, where `--paper` restores them.
"""


def rows(record):
    """Lines of the table: one for each claim."""
    name = record["figure"]
    (script,) = HERE.glob(f"{name}_*.py")
    for k, claim in enumerate(record["claims"]):
        first = (
            f"[{record['title']}]({script.name})",
            f"{_time(record['seconds'])}, {record['seeds']} seeds",
            f"[picture](results/{name}.png)",
        )
        title, cost, picture = first if k == 0 else ("", "", "")
        verdict = f"**{claim['verdict']}**"
        if claim["verdict"] != "reproduced":
            verdict += f", [why](#{_anchor(record['title'])})"
        yield (
            f"| {title} | {_escaped(claim['text'])} | {claim['paper']} | "
            f"{claim['ours']} | {verdict} | {cost} | {picture} |"
        )


def told(script, *starts):
    """Paragraphs of a script's docstring that begin with one of ``starts``."""
    paragraphs = ast.get_docstring(ast.parse(script.read_text())).split("\n\n")
    return [one for one in paragraphs if one.startswith(starts)]


def reasons(script):
    """Why a claim falls short."""
    return told(script, "Not reproduced:", "In direction:")


def section(record):
    """The picture of a figure, how to read it, and why it falls short where it does."""
    title, figure = record["title"], record["figure"]
    (script,) = HERE.glob(f"{figure}_*.py")
    parts = [f"## {title}", f"`python tutorials/paper/{script.name}`"]
    if record["verdict"] != "reproduced":
        parts += reasons(script)
    parts += [f"![{title}](results/{figure}.png)", *told(script, "Picture:")]
    return "\n\n".join(parts) + "\n"


def _escaped(text):
    """With bars that do not end a cell."""
    return text.replace("|", "\\|")


def _anchor(title):
    """Where GitHub puts a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _time(seconds):
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main():
    """Write the page."""
    records = [json.loads(p.read_text()) for p in sorted(HERE.glob("results/*.json"))]
    lines = [
        TOP,
        "| figure | claim | paper | ours | verdict | one core | |",
        "|---|---|---|---|---|---|---|",
        *(line for record in records for line in rows(record)),
        "",
        *map(section, records),
    ]
    (HERE / "README.md").write_text("\n".join(lines))
    print(f"{HERE / 'README.md'}: {len(records)} figures")


if __name__ == "__main__":
    main()
