"""A checkpoint measured from the command line."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import loading, offline
from torch_dropout_ir.cli import main
from torch_dropout_ir.regularizers import gauss_newton

NETS = """
import torch
from torch import nn


def make():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 2)
    ).double()


def batches():
    draw = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, 4, generator=draw, dtype=torch.float64),
         torch.randn(n, 2, generator=draw, dtype=torch.float64))
        for n in (6, 3)
    ]


def halved(outputs, targets):
    return (outputs - targets).square().mean() / 2


def other_sizes():
    return [(torch.randn(6, 5).double(), torch.randn(6, 2).double())]


def fails():
    raise KeyError("rows")


def on_meta():
    with torch.device("meta"):
        return make()


def leaves():
    raise SystemExit(0)


def weighted():
    return [(torch.randn(6, 4).double(), torch.randn(6, 2).double(), torch.ones(6))]


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    return net


def compiled():
    return torch.compile(make())


def part_compiled():
    net = make()
    net[0] = torch.compile(net[0])
    return net


def asks(path):
    return path


number = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets_of_test.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("nets_of_test", None)
    sys.path.insert(0, str(tmp_path))
    import nets_of_test

    return nets_of_test


def analyze(*arguments):
    named = ["--model", "nets_of_test:make", "--data", "nets_of_test:batches"]
    return main(["analyze", *named, *arguments])


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.module.", "net._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "inner.weights"])
def test_the_report_is_what_the_functions_say(nets, capsys, wrap, key):
    model = nets.make()
    with torch.no_grad():
        model[0].weight.mul_(2)  # the weights are the checkpoint's
    weights = {wrap + name: x for name, x in model.state_dict().items()}
    held = {None: weights, "state_dict": {"state_dict": weights, "epoch": 3}}
    held["inner.weights"] = {"inner": {"weights": weights}, "model": {"x": 1}}
    torch.save(held[key], "last.pt")
    more = ["--key", key] if key == "inner.weights" else []
    assert not analyze(
        "--checkpoint", "last.pt", "--loss", "mse", "--json", "out.json",
        "--log-dir", "run", *more,
    )  # fmt: skip
    report = json.loads(Path("out.json").read_text())
    printed = capsys.readouterr().out
    found = report["records"]
    pairs = nets.batches()
    model.eval()
    # One batch of all: the batches differ in size.
    x, y = (torch.cat(column) for column in zip(*pairs, strict=True))
    r1 = tdi.regularizers.last_layer(model[:3](x), model[3].weight, 0.3)
    top = torch.linalg.eigvalsh(tdi.sharpness.hessian(model, "mse", (x, y)).dense())
    assert found["regularizer/R1"] == pytest.approx(float(r1.detach()))
    assert found["loss/R_S"] == pytest.approx(float(nn.MSELoss()(model(x), y).detach()))
    assert found["sharpness/top_eigenvalue"] == pytest.approx(float(top[-1]), rel=2e-3)
    assert report["sites"] == {"2": 0.3} and report["num_batches"] == 2
    assert report["absent"] == {} and all(report["notes"].values())
    assert not any("movement" in tag for tag in found)  # since when?
    for value in found.values():
        assert any(f"{value:.{k}g}" in printed.split() for k in (2, 4, 5))
    events = EventAccumulator("run").Reload()
    assert set(events.Tags()["scalars"]) == set(found)


@pytest.mark.parametrize("heads", [1, 2])
def test_calls_of_dropout_functions_act_in_training_mode_alone(nets, heads):
    class ByCall(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.first, self.last = net[0], net[3]
            self.norm = nn.BatchNorm1d(9).double()

        def forward(self, x):
            h = self.norm(self.first(x).tanh())
            out = self.last(nn.functional.dropout(h, 0.3, self.training))
            return out if heads == 1 or not self.training else (out, out)

    net = nets.make()
    model = ByCall(net).eval()
    twin = nn.Sequential(*net[:2], model.norm, *net[2:]).eval()
    found = offline.analyze(model, nets.batches(), "mse")
    expected = offline.analyze(twin, nets.batches(), "mse")
    assert not any(module.training for module in model.modules())
    assert found.records["loss/R_S"] == pytest.approx(expected.records["loss/R_S"])
    if heads == 2:
        assert "off in evaluation mode" in found.absent[":dropout#0"]
        assert "regularizer/R1" not in found.records
        return
    assert found.sites == {":dropout#0": 0.3} and "training" in found.notes["mode"]
    r1 = expected.records["regularizer/R1"]
    assert found.records["regularizer/R1"] == pytest.approx(r1)


def test_a_loss_function_and_fewer_batches(nets, capsys):
    pairs = nets.batches()[:1]
    assert not analyze("--loss", "nets_of_test:halved", "--batches", "1",
                       "--no-sharpness", "--json", "out.json")  # fmt: skip
    report = json.loads(Path("out.json").read_text())
    risk = nets.halved(nets.make().eval()(pairs[0][0]), pairs[0][1])
    assert report["records"]["loss/R_S"] == pytest.approx(float(risk.detach()))
    form = gauss_newton(nets.make(), pairs[0], nets.halved, num_samples=None)
    assert report["records"]["regularizer/R1"] == pytest.approx(float(form.value))
    assert report["records"]["regularizer/R1_standard_error"] == 0  # it adds squares
    assert not any(tag.startswith("sharpness") for tag in report["records"])


def test_means_over_batches_have_the_errors_of_means(monkeypatch):
    """Of an error that a batch does not have, the mean has none."""

    class Known:
        name, needs = "regularizer", frozenset()

        def __init__(self, num_masks):
            pass

        def __call__(self, snapshot):
            n = len(snapshot.inputs)
            found = {"regularizer/R1": 10.0 * n, "regularizer/R1/2": 1.0 * n}
            found["regularizer/R1_standard_error"] = 0.5 * n
            if n > 1:
                found["regularizer/R1_standard_error/2"] = 0.25 * n
            return found

    monkeypatch.setattr(offline, "Regularizer", Known)
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity(), nn.Dropout(0.2))
    pairs = [(torch.ones(n, 3), torch.ones(n, 2)) for n in (6, 2, 1)]
    for count, whole in ((2, 8), (3, 9)):
        sizes = [6, 2, 1][:count]
        found = offline.analyze(model, pairs[:count], "mse", sharpness=False).records
        squares, fourth = (sum(n**k for n in sizes) for k in (2, 4))
        assert found["regularizer/R1"] == pytest.approx(10 * squares / whole)
        error = found["regularizer/R1_standard_error"]
        assert error == pytest.approx(0.5 * fourth**0.5 / whole)
        error = found.get("regularizer/R1_standard_error/2")
        expected = pytest.approx(0.25 * fourth**0.5 / whole)
        assert error == (expected if count == 2 else None)


def loaded(model, **held):
    torch.save(held["file"], "held.pt")
    loading.load_weights(model, Path("held.pt"), held.get("key"))
    return [x.detach() for x in model.parameters()]


@pytest.mark.parametrize("make", ["make", "compiled", "part_compiled"])
def test_what_is_beside_the_network_is_left(nets, make):
    model = nets.make()
    with torch.no_grad():
        model[0].weight.mul_(2)
    weights = {f"module.{name}": x for name, x in model.state_dict().items()}
    file = {"n_averaged": torch.tensor(3), **weights}
    found = loaded(getattr(nets, make)(), file=file)
    assert all(map(torch.equal, found, model.parameters()))


def test_of_several_networks_one_is_to_be_named(nets):
    first, second = nets.make(), nets.make()
    with torch.no_grad():
        second[0].weight.mul_(2)
    both = {
        f"{of}.{name}": x
        for of, model in (("student", first), ("teacher", second))
        for name, x in model.state_dict().items()
    }
    said = "which: 'state_dict.student', 'state_dict.teacher'"
    with pytest.raises(ValueError, match=said):
        loaded(nets.make(), file={"state_dict": both})
    found = loaded(nets.make(), file={"state_dict": both}, key="state_dict.teacher")
    assert all(map(torch.equal, found, second.parameters()))


def test_names_of_compiled_parts_are_read_and_parts_of_names_are_not(nets):
    model = nets.make()
    with torch.no_grad():
        model[0].weight.mul_(2)
    own = model.state_dict()
    parts = {name.replace("0.", "0._orig_mod."): x for name, x in own.items()}
    found = loaded(nets.make(), file=parts)
    assert all(map(torch.equal, found, model.parameters()))
    with pytest.raises(ValueError, match="does not fit"):
        loaded(nets.make(), file={f"my{name}": x for name, x in own.items()})


def test_a_loss_module_is_made_and_a_function_is_taken():
    made = loading.load_loss("torch.nn:SmoothL1Loss")
    assert isinstance(made, nn.SmoothL1Loss)
    taken = loading.load_loss("torch.nn.functional:huber_loss")
    assert taken is nn.functional.huber_loss


def test_dropout_that_drops_nothing_is_no_site_of_a_report():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Dropout(0.2))
    batch = torch.randn(5, 3), torch.randn(5, 4)
    report = offline.analyze(model, batch, "mse", num_masks=2, sharpness=False)
    assert report.sites == {"2": 0.2}


class Size:
    """Says how many samples it was given, as a number and its error."""

    name, needs = "regularizer", frozenset({"inputs"})

    def __init__(self, num_masks):
        pass

    def __call__(self, snapshot):
        size = float(len(snapshot.inputs))
        return {"loss/R_S": size, "regularizer/R1_standard_error": size}


@pytest.mark.parametrize(
    ("reduction", "most", "mean", "error"),
    [
        ("mean", 8, (12 * 6 + 6 * 3) / 18, ((12 * 6) ** 2 + (6 * 3) ** 2) ** 0.5 / 18),
        ("sum", 8, 6 + 3, (6**2 + 3**2) ** 0.5),
        ("mean", 1, 6, 6),
    ],
)
def test_batches_and_their_errors_are_joined(
    nets, monkeypatch, reduction, most, mean, error
):
    monkeypatch.setattr(offline, "Regularizer", Size)
    found = offline.analyze(
        nets.make(), nets.batches(), nn.MSELoss(reduction=reduction),
        most_batches=most, sharpness=False,
    )  # fmt: skip
    assert found.records["loss/R_S"] == pytest.approx(mean)
    assert found.records["regularizer/R1_standard_error"] == pytest.approx(error)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_batch_that_cannot_be_measured_is_told_wherever_it_stands(nets, capsys, bad):
    pairs = nets.batches()
    pairs[bad][0][0, 0] = torch.nan
    nets.spoiled = lambda: pairs
    given = "--data", "nets_of_test:spoiled", "--loss", "mse", "--no-sharpness"
    assert analyze(*given, "--json", "out.json") == 1
    assert "no regularizer: ValueError" in capsys.readouterr().err
    found = json.loads(Path("out.json").read_text())
    assert "regularizer/R1" not in found["records"]
    assert set(found["absent"]) == {"regularizer"}


def test_the_seed_is_that_of_masks_and_what_has_no_start_is_not_absent(nets):
    nets.make = lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), nn.Tanh())
    model, pairs = nets.make().double(), [(nets.batches()[0][0], torch.zeros(6, 9))]
    runs = [
        offline.analyze(model, pairs, "mse", seed=seed, sharpness=False).records
        for seed in (0, 1, 0)
    ]
    first, other, again = (run["regularizer/R1"] for run in runs)
    assert first == again != other
    nn.init.constant_(model[0].weight, torch.inf)
    found = offline.analyze(model, pairs, "mse", sharpness=False)
    assert set(found.absent) == {"regularizer", "condensation/effective_ratio/0"}


class Draws(nn.Module):
    """It calls dropout, and draws what no dropout function does."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training) + torch.rand(1)


def test_what_a_report_cannot_see_is_said_and_no_generator_moves():
    before = torch.get_rng_state()
    batch = torch.ones(4, 3), torch.zeros(4, 3)
    found = offline.analyze(Draws(), batch, "mse", num_masks=2, sharpness=False)
    assert torch.equal(before, torch.get_rng_state())
    assert list(found.sites) == [":dropout#0"]
    assert "no dropout function draws" in found.absent[":rand"]


def test_files_of_safetensors_keep_one_of_tied_weights(nets):
    save_file = pytest.importorskip("safetensors.torch", reason="none").save_file
    model = nets.tied()
    weights = {n: x for n, x in model.state_dict().items() if n != "2.weight"}
    save_file(weights, "model.safetensors")
    again = nets.tied()
    loading.load_weights(again, Path("model.safetensors"))
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    with pytest.raises(
        ValueError, match=r"the folder \.; in it are model\.safetensors"
    ):
        loading.load_weights(again, Path("."))


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


def test_no_code_of_the_file_runs(nets, capsys, tmp_path):
    with open("bad.pt", "wb") as file:
        pickle.dump(Evil(), file)
    torch.save({"weights": Evil()}, "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        assert analyze("--checkpoint", name) == 2
        said = capsys.readouterr().err
        assert "without running code" in said
        assert "weights_only" not in said  # torch's own advice is to run it
    assert "(it has objects of io.open)" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "none.pt"], "--checkpoint: there is no file none.pt"),
        (["--model", "nets_of_test"], "expected module:factory"),
        (["--model", "nets_of_test:other"], "cannot find"),
        (["--model", "nets_of_test.py:make"], "nets:make for make() in nets.py"),
        (["--model", "./nets_of_test:make"], "nets:make for make() in nets.py"),
        (["--model", "nets_of_test:make()"], "nets:make for make() in nets.py"),
        (["--loss", "CrossEntropyLoss"], "as torch.nn:SmoothL1Loss"),
        (["--checkpoint", "nested.pt"], "it holds 'net', 'epoch'. Say with `--key`"),
        (["--model", "no_such_module:make"], "cannot find"),
        (["--model", "nets_of_test:number"], "expected an nn.Module, got int"),
        (["--model", "unreadable:make"], "'unreadable:make' raised SyntaxError"),
        (["--data", "nets_of_test:number"], "--data: expected a batch"),
        (["--data", "nets_of_test:fails"], "raised KeyError: 'rows' ("),
        (["--data", "nets_of_test:leaves"], "raised SystemExit: 0 ("),
        (["--data", "nets_of_test:weighted"], "got a tuple of 3. Make pairs"),
        (["--model", "nets_of_test:on_meta"], "('0.weight' first)"),
        (["--model", "own_arguments:make"], "'own_arguments:make' raised SystemExit"),
        (["--data", "nets_of_test:asks"], "--data: 'nets_of_test:asks' raised TypeE"),
        (["--loss", "l3"], "'mse'"),
        (["--batches", "0"], "at least 1"),
        (["--masks", "1"], "--masks: expected at least 2, got 1"),
        (["--key", "a.b"], "give `--checkpoint` with it"),
        (["--checkpoint", "other.pt"], "does not fit"),
        (["--checkpoint", "."], "expected a file of weights, got the folder ."),
        (["--checkpoint", "list.pt"], "--key"),
        (["--checkpoint", "nested.pt", "--key", "a.b"], "it holds 'net', 'epoch'"),
        (["--checkpoint", "list.pt", "--key", "a.b"], "a.b"),
        (["--device", "cuda:77"], "--device: expected a device of this machine"),
        (["--device", "meta"], "--device: expected a device of this machine"),
        (["--device", "nothing"], "--device: expected a device of this machine"),
        (["--json", "nowhere/out.json"], "--json: there is no folder nowhere"),
        (["--json", "."], "--json: expected a file, got the folder ."),
    ],
)
def test_wrong_arguments_are_said(nets, capsys, arguments, said):
    torch.save({"x": torch.ones(2)}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"net": nets.make().state_dict(), "epoch": 3}, "nested.pt")
    Path("unreadable.py").write_text("def make(:")
    Path("own_arguments.py").write_text("raise SystemExit('usage: train.py')")
    assert analyze(*arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out


def test_what_could_not_be_measured_is_said_and_the_status_tells(nets, capsys):
    status = analyze(  # without a warning that training goes on
        "--data", "nets_of_test:other_sizes", "--loss", "mse", "--json", "out.json"
    )
    printed = capsys.readouterr()
    assert status == 1
    assert "no regularizer: RuntimeError" in printed.err
    assert "shapes cannot be multiplied" in printed.err
    assert "no sharpness: " in printed.err and "condensation" not in printed.err
    found = json.loads(Path("out.json").read_text())
    assert "condensation/effective_ratio/0" in found["records"]
    assert set(found["absent"]) == {"regularizer", "sharpness"}


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as done:
        main(["analyze", "--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "--checkpoint run/last.pt" in said and "weights_only=True" in said
