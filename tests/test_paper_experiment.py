"""The frame of the paper's scripts: resuming, verdicts, options, older code."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "tutorials" / "paper"
SCRIPTS = sorted((*FOLDER.glob("fig[0-9]*_*.py"), *FOLDER.glob("thm[0-9]*_*.py")))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def claims():
    module = load("claims")
    yield module
    sys.modules.pop("claims")


@pytest.fixture
def frame(claims):
    before = sys.modules.get("experiment")
    load("options")
    module = load("experiment")
    yield module
    sys.modules.pop("options")
    sys.modules.pop("experiment")
    if before is not None:
        sys.modules["experiment"] = before


@pytest.fixture
def start(frame, tmp_path):
    def make(*arguments, out="out", figure="fig99"):
        found = ["--out", str(tmp_path / out), *arguments]
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        return frame.Experiment("A title.\n", figure, arguments=found, home=home)

    return make


class Stopped(Exception):
    """What stands for Ctrl-C."""


def training(exp, stop_at=None):
    """A cell with dropout, Adam and a schedule: all of them have a state."""

    def compute():
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        adam = torch.optim.Adam(net.parameters(), lr=0.1)
        decay = torch.optim.lr_scheduler.StepLR(adam, 3)
        losses = torch.zeros(20)
        kept = Kept(losses)
        for step in exp.steps("arm", 1, 20, (net, adam, decay, kept)):
            if step == stop_at:
                raise Stopped
            adam.zero_grad()
            loss = net(torch.randn(5, 3)).square().mean()
            loss.backward()
            adam.step()
            decay.step()
            losses[step] = loss.detach()
        return {"losses": losses, "net": net.state_dict()}

    return exp.cell("arm", 1, compute)


class Kept:
    """A tensor with a state."""

    def __init__(self, tensor):
        self.tensor = tensor

    def state_dict(self):
        return {"tensor": self.tensor.clone()}

    def load_state_dict(self, state):
        self.tensor.copy_(state["tensor"])


def every_step_saved(frame, monkeypatch):
    """Let more than half a minute pass at each look at the clock."""
    clock = iter(range(0, 10**9, 31))
    monkeypatch.setattr(frame.time, "perf_counter", lambda: float(next(clock)))


def test_seconds_are_those_of_the_core(frame, start, monkeypatch):
    """A machine that is busy or asleep does not make a figure more expensive."""
    clock = iter((10.0, 17.0))
    monkeypatch.setattr(frame.time, "process_time", lambda: next(clock))
    exp = start()
    training(exp)
    assert torch.load(exp._path("arm", 1))["seconds"] == 7


def test_a_stopped_cell_goes_on_to_the_same_bits(frame, start, monkeypatch):
    whole = training(start(out="whole"))
    every_step_saved(frame, monkeypatch)
    exp = start(out="stopped")
    with pytest.raises(Stopped):
        training(exp, stop_at=13)
    assert not exp._path("arm", 1).exists() and exp._part("arm", 1).exists()
    torch.manual_seed(99)  # another process draws from elsewhere
    steps = []
    original = frame.tqdm

    def counted(numbers, **keywords):
        steps.extend(numbers)
        return original(numbers, **keywords)

    monkeypatch.setattr(frame, "tqdm", counted)
    again = training(start(out="stopped"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert steps == list(range(13, 20))
    assert not exp._part("arm", 1).exists()


def test_a_cell_stopped_after_its_last_step_takes_that_again(frame, start, monkeypatch):
    """What the last step left in a local name is not lost."""
    every_step_saved(frame, monkeypatch)

    def compute(exp, stop):
        for step in exp.steps("arm", 1, 3, []):
            loss = 7 + step
        if stop:
            raise Stopped
        return loss

    exp = start()
    with pytest.raises(Stopped):
        exp.cell("arm", 1, lambda: compute(exp, True))
    assert exp._part("arm", 1).exists()
    again = start()
    assert again.cell("arm", 1, lambda: compute(again, False)) == 9


def test_a_finished_cell_is_not_computed_again(start):
    first = training(start())
    exp = start()
    kept = exp.cell("arm", 1, lambda: pytest.fail("computed again"))
    torch.testing.assert_close(kept, first, rtol=0, atol=0)
    assert start("--restart").cell("arm", 1, lambda: 7) == 7


def test_the_seed_and_not_the_order_decides_a_cell(start):
    def compute(arm, seed):
        return torch.rand(2)

    forward = start(out="a").cells(("x", "y"), compute)
    backward = start(out="b").cells(("y", "x"), compute)
    torch.testing.assert_close(
        forward, {k: backward[k] for k in forward}, rtol=0, atol=0
    )
    assert not torch.equal(forward["x"][0], forward["x"][1])


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 2.0, 3.0], "reproduced"),
        ([1.0, 2.0, 0.1], "reproduced in direction"),
        ([9.0, 9.0, -0.1], "not reproduced"),
        ([], "not reproduced"),
        ([2.0, float("nan"), 2.0], "not reproduced"),
    ],
)
def test_the_worst_seed_decides_a_claim(claims, values, verdict):
    claim = claims.Claim("text", "1", values, lambda v: v >= 1, lambda v: v > 0)
    assert claim.verdict == verdict


def test_the_worst_claim_decides_a_figure_and_its_record(claims, start):
    exp = start("--seeds", "3")
    exp.cells(("arm",), lambda arm, seed: float(seed))
    holds = claims.Claim("first", "1", [1.0, 2.0], lambda v: v >= 1, lambda v: v > 0)
    points = claims.Claim("second", "5", [1.0, 2.0], lambda v: v >= 5, lambda v: v > 0)
    assert exp.finish([holds, points], {"more": [1]}) == "reproduced in direction"
    record = json.loads((exp.home / "results" / "fig99.json").read_text())
    assert record["seeds"] == 3 and record["profile"] == "default"
    assert [c["verdict"] for c in record["claims"]] == [holds.verdict, points.verdict]
    assert record["claims"][0]["ours"] == "1.5 ± 0.5"
    assert record["numbers"] == {"more": [1]}


@pytest.mark.parametrize("options", [["--quick"], ["--seeds", "1"]])
def test_a_look_stays_out_of_the_results(claims, start, options):
    exp = start(*options)
    assert list(exp.seeds) == [0]
    exp.finish([claims.Claim("text", "1", [1.0], lambda v: True, lambda v: True)])
    assert not (exp.home / "results").exists()
    assert (exp.folder / "fig99.json").is_file()


def test_each_profile_has_its_size_and_its_folder(start):
    found = [start(), start("--quick"), start("--paper")]
    assert [exp.pick(1, 2, 3) for exp in found] == [2, 1, 3]
    assert len({exp.folder for exp in found}) == 3


def test_a_quick_run_does_not_say_that_something_is_not_so(claims, start):
    def claim(bound):
        return claims.Claim("text", "1", [1.0], lambda v: v > bound, lambda v: True)

    for options, short in (
        (["--quick"], "a quick run cannot tell"),
        (["--seeds", "1"], "reproduced in direction"),
    ):
        exp = start(*options)
        assert exp.finish([claim(0), claim(2)]) == short
        record = json.loads((exp.folder / "fig99.json").read_text())
        assert [c["verdict"] for c in record["claims"]] == ["reproduced", short]


def test_what_is_no_number_is_null_and_is_said(claims, start):
    """JSON has no NaN: most readers refuse a file with one."""
    nan, exp = float("nan"), start("--seeds", "1")
    some = claims.Claim("text", "1", [2.0, nan], lambda v: v > 0, lambda v: v > 0)
    none = claims.Claim("text", "1", [nan], lambda v: v > 0, lambda v: v > 0)
    exp.finish([some, none], {"seeds": [{"R_S": float("inf")}, (nan, 1.0)]})
    text = (exp.folder / "fig99.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert [c["values"] for c in record["claims"]] == [[2.0, None], [None]]
    assert record["numbers"] == {"seeds": [{"R_S": None}, [None, 1.0]]}
    assert some.ours == "2 ± 0, no number in 1 of 2 seeds" and none.ours == "no number"


def test_a_finished_cell_leaves_no_part_behind(frame, start, monkeypatch):
    """Nor one of the trainings that it is made of, whatever they are called."""
    every_step_saved(frame, monkeypatch)
    exp = start()

    def compute():
        for arm in ("first", "arm"):
            for _ in exp.steps(arm, 1, 3, []):
                pass

    exp.cell("arm", 1, compute)
    assert [path.name for path in exp.folder.glob("*.pt")] == ["arm-seed1.pt"]


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0"], ["--quick", "--paper"], ["--out", f"{__file__}/runs"]]
)
def test_options_that_cannot_be_are_said(start, wrong, capsys):
    with pytest.raises(SystemExit):
        start(*wrong)
    assert wrong[0].strip("-") in capsys.readouterr().err


def script(tmp_path, number, comment):
    """A script's function ``compute``, from a file of its own."""
    path = tmp_path / "fig99_edited.py"
    path.write_text(
        f'"""{comment}"""\n\ndef compute(arm, seed):\n    return {number}\n'
    )
    spec = importlib.util.spec_from_file_location("fig99_edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute


def test_cells_of_an_edited_script_are_said(start, tmp_path, capsys):
    start().cells(("arm",), script(tmp_path, 1, "as it was"))
    start().cells(("arm",), script(tmp_path, 1, "other words only"))
    assert "--restart" not in capsys.readouterr().err
    kept = start().cells(("arm",), script(tmp_path, 2, "another number"))
    said = capsys.readouterr().err
    assert kept == {"arm": [1, 1, 1]}  # hours of work are not thrown away unasked
    assert said.count("edited,") == 1 and "fig99_edited.py" in said
    assert "--restart" in said
    fresh = start("--restart").cells(("arm",), script(tmp_path, 2, "another number"))
    assert fresh == {"arm": [2, 2, 2]} and not capsys.readouterr().err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_tells_its_options(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    before = set(sys.modules)
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(path), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if (
                Path(getattr(sys.modules[name], "__file__", None) or "/").parent
                == FOLDER
            ):
                del sys.modules[name]
    said = capsys.readouterr().out
    assert left.value.code in (0, None)
    assert all(one in said for one in ("--quick", "--paper", "--seeds", "--restart"))
    assert f"python tutorials/paper/{path.name}" in said
    assert not list(tmp_path.iterdir())  # nothing is made by asking


def test_all_runs_cheapest_first_and_past_a_failure(tmp_path, monkeypatch, capfd):
    for name, body in (
        ("fig01_dear", "print('ran dear')"),
        ("fig02_cheap", "import sys; print('ran cheap', sys.argv[1:])"),
        ("fig03_broken", "raise SystemExit(3)"),
        ("thm1_new", "print('ran new')"),
        ("two_layer", "print('no figure')"),
    ):
        (tmp_path / f"{name}.py").write_text(body)
    (tmp_path / "results").mkdir()
    for name, seconds in (("fig01", 900), ("fig02", 5), ("fig03", 50)):
        path = tmp_path / "results" / f"{name}.json"
        path.write_text(json.dumps({"seconds": seconds}))
    monkeypatch.syspath_prepend(str(FOLDER))
    every = load("all")
    monkeypatch.setattr(every, "HERE", tmp_path)
    monkeypatch.setattr(every.table, "main", lambda: print("ran table", flush=True))
    assert every.main(["--seeds", "3"])
    printed, said = capfd.readouterr()
    order = [printed.index(f"ran {k}") for k in ("cheap", "dear", "new", "table")]
    assert order == sorted(order) and "['--seeds', '3']" in printed
    assert "no figure" not in printed and "failed: fig03_broken.py" in said
    every.main(["--quick"])
    assert "ran table" not in capfd.readouterr().out
    for options, said in (["--help"], "cheapest first"), (["--sedes"], "--sedes"):
        with pytest.raises(SystemExit):
            every.main(options)
        printed = "".join(capfd.readouterr())
        assert said in printed and "ran " not in printed  # once, not by every script


RECORDS = sorted((FOLDER / "results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_claim_that_falls_short_has_its_reason_on_the_page(path):
    table, record = load("table"), json.loads(path.read_text())
    page, below = (FOLDER / "README.md").read_text(), table.section(record)
    assert below in page
    for row in table.rows(record):
        assert row in page and len(re.findall(r"(?<!\\)\|", row)) == 8  # seven cells
    (script,) = FOLDER.glob(f"{path.stem}_*.py")
    short = record["verdict"] != "reproduced"
    assert any(one in below for one in table.reasons(script)) == short
