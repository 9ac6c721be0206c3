"""The house itself: floors, names, sizes, public surface."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torch_dropout_ir as tdi

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_dropout_ir"
FILES = sorted(PACKAGE.rglob("*.py"))
# fmt: off
FLOORS = {
    0: ("kernels", "_C"),
    1: (
        "arguments", "exhaustion",
        "registration",
        "tracing", "recomputation",
        "ops",
        "functional", "generators", "inputs", "leaves",
        "batches",
        "substitution", "written_parameters",
        "vectors",
        "arrivals", "collectives", "weight_parts", "gradient_factors",
        "sites",
        "survey", "turns", "hooks",
        "dropout_calls",
        "module_calls",
        "attention_again", "composed",
        "normalization",
        "losses", "inner_derivatives",
        "loss_terms", "loss_cuts",
        "output_hessian",
        "output_products",
        "output_scales",
        "softmax_roots",
        "jet_kinds", "jet_program", "jet_rules", "jet_nodes", "jet_places",
        "jet_products", "jet_derivatives", "jet_moments", "row_powers",
        "sample_blocks", "entry_curvature",
    ),
    2: ("nn", "masks", "regularizers", "condensation", "sharpness"),
    3: ("analysis",),
    4: (
        "sinks",
        "tensorboard",
        "attach",
        "integrations",
        "loading",
        "offline",
        "demo",
        "testing",
        "cli", "__main__",
    ),
}
# fmt: on
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
DRAWERS = {"utils", "util", "misc", "helpers", "common", "base", "manager", "engine",
           "processor", "handler"}  # fmt: skip
CONTRACT = {
    "dropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "convert_dropout_",
    "restore_dropout_", "frozen_masks", "MaskStatistics", "attach_analysis",
    "regularizers", "condensation", "sharpness", "testing",
}  # fmt: skip


def unit(path):
    """The part of the package that a file belongs to: its floor's name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Names of our own units that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "torch_dropout_ir":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("torch_dropout_ir."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch_dropout_ir."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    if unit(path) == "__init__":
        return
    floor = FLOOR_OF[unit(path)]
    above = {name for name in imports(path) if FLOOR_OF[name] > floor}
    assert not above, f"floor {floor} imports {above}"


def test_measures_do_no_io_and_keep_no_hooks():
    """Floor 2 is pure functions of tensors and models; hooks end with their context."""
    for path in FILES:
        if FLOOR_OF.get(unit(path)) == 2:
            names = {n.id for n in ast.walk(ast.parse(path.read_text()))
                     if isinstance(n, ast.Name)}  # fmt: skip
            assert not names & {"open", "print", "SummaryWriter"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    assert path.stem not in DRAWERS
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{node.name} has {length} lines"


def test_public_names():
    assert CONTRACT <= set(tdi.__all__)
    assert tdi.__all__ == sorted(tdi.__all__)
    for name in tdi.__all__:
        assert getattr(tdi, name).__doc__, name
    for module in (tdi.regularizers, tdi.condensation, tdi.sharpness):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_an_extension_of_other_sources_is_refused():
    code = """
import sys, types
sys.modules["torch_dropout_ir._C"] = types.ModuleType("torch_dropout_ir._C")
import torch_dropout_ir
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "got None: they were built from other sources" in done.stderr
    assert "pip install" in done.stderr


def test_without_the_extension_there_is_one_warning_and_the_same_mask():
    code = """
import sys, warnings
sys.modules["torch_dropout_ir._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, torch_dropout_ir as tdi
ours = [str(w.message) for w in caught if "torch_dropout_ir" in str(w.message)]
assert len(ours) == 1 and "pip install" in ours[0], ours
assert not tdi.ops.COMPILED
layer = tdi.Dropout()
x = torch.ones(100, requires_grad=True)
layer(x).sum().backward()
assert torch.equal(x.grad != 0, layer.last_mask)
print(tdi.dropout(torch.ones(40), rng=torch.tensor([1, 2])).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    import torch

    here = tdi.dropout(torch.ones(40), rng=torch.tensor([1, 2])).tolist()
    assert done.stdout.strip() == str(here)


def test_the_import_takes_little_beside_torchs():
    """Dynamo takes as long as torch itself, distributed tensors half of that."""
    code = (
        "import sys, torch_dropout_ir\n"
        "assert not {'torch._dynamo', 'torch.distributed.tensor'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MAKERS = {"zeros", "ones", "empty", "full", "tensor", "arange", "linspace", "eye",
          "rand", "randn", "randint", "randperm"}  # fmt: skip


def test_tensors_are_made_where_it_says():
    # Else they are where a script's `set_default_device` puts them.
    found = []
    for path in FILES:
        for call in ast.walk(ast.parse(path.read_text())):
            made = isinstance(call, ast.Call) and ast.unparse(call.func)
            if made and made.removeprefix("torch.") in MAKERS and "torch." in made:
                if {"device", None}.isdisjoint(k.arg for k in call.keywords):
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {made}")
    assert not found
