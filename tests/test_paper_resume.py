"""That a script of the paper that was stopped loses nothing of what it had.

That the state that `Experiment.steps` is given comes back to the bit is shown in
test_paper_experiment.py; here, that every script gives it all that its steps change.
"""

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials" / "paper"
CHANGERS = {"append", "extend", "insert", "add", "update", "pop", "setdefault"}


def names(*trees):
    return {n.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Name)}


def root(node):
    """The name that a target or a call begins with; None of what a call returned."""
    node = node.func if isinstance(node, ast.Call) else node
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return getattr(node, "id", None)


def changed(node):
    """The names whose value this node changes: ``x += 1``, ``x[0] = 1``, ``x.add(1)``.

    And those that a sentence is about: ``x(1)``, ``x.step()``.
    """
    if isinstance(node, ast.Assign | ast.AugAssign):
        again = isinstance(node, ast.AugAssign)
        targets = [node.target] if again else node.targets
        return {root(t) for t in targets if again or not isinstance(t, ast.Name)}
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    if called and node.func.attr in CHANGERS:
        return {root(node)}
    return {root(node.value)} if isinstance(node, ast.Expr) else set()


def loops(text):
    """``(function, names that its steps change, names that are kept)``."""
    tree = ast.parse(text)
    outside = {n.asname or n.name for t in tree.body for n in getattr(t, "names", ())}
    outside |= {t.name for t in tree.body if hasattr(t, "name")}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        inside = list(ast.walk(function))
        for loop in inside:
            if not (isinstance(loop, ast.For) and ".steps(" in ast.unparse(loop.iter)):
                continue
            body = [n for one in loop.body for n in ast.walk(one)]
            stored = {n for n in body if isinstance(n, ast.Assign | ast.For)}
            fresh = {
                one.id
                for n in stored
                for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
                for one in ast.walk(t)
                if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
            }
            given = loop.iter.args[3]
            kept = names(given) | {
                name
                for n in inside
                if isinstance(n, ast.Assign) and root(given) in map(root, n.targets)
                for name in names(n.value)
            }
            touched = set().union(*map(changed, body)) - {None} - fresh - outside
            yield function, touched, kept


TRAININGS = [
    pytest.param(path, id=path.stem)
    for path in sorted([*FOLDER.glob("*.py"), *FOLDER.parent.glob("beyond/*.py")])
    if re.search(r"in (self\.)?exp\.steps\(", path.read_text())
]


@pytest.mark.parametrize("path", TRAININGS)
def test_what_a_step_changes_is_kept_for_a_run_that_goes_on(path):
    found = list(loops(path.read_text()))
    assert found
    for function, touched, kept in found:
        lost = sorted(touched - kept)
        assert touched and not lost, f"{function.name} loses {lost}"
        if "attach_analysis" in ast.unparse(function):
            assert kept & {"analysis", "watched"}  # or the TensorBoard run begins anew
