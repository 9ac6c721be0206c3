"""The demonstration and its command line."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torch_dropout_ir as tdi
from torch_dropout_ir.cli import main
from torch_dropout_ir.demo import Settings
from torch_dropout_ir.demo.data import load
from torch_dropout_ir.demo.run import network


def numbers(text):
    """The table's rows: name -> (without, with)."""
    rows = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) >= 3:
            try:
                rows[cells[0]] = [float(c.split()[0]) for c in cells[1:3]]
            except ValueError:
                continue
    return rows


def test_digits_show_the_papers_direction(tmp_path, capsys):
    """The default settings, a shorter run; also everything that it leaves behind."""
    assert main(["demo", "--log-dir", str(tmp_path), "--steps", "6000"]) == 0
    printed = capsys.readouterr().out
    rows = numbers(printed)
    for name in ("R_1 at p=0.5", "effective ratio", "trace of the Hessian"):
        without, with_ = rows[name]
        assert with_ < without, name
        assert re.search(rf"{re.escape(name)}.*lower, as in the paper", printed)
    assert re.search(r"trace of the Hessian +[\d.]+ +[\d.]+ +lower", printed)  # exact
    assert re.search(r"top Hessian eigenvalue .* lower\n", printed)  # not the paper's
    assert printed.count(" ± ") >= 2
    without, with_ = rows["test accuracy (%)"]
    assert with_ > without > 85
    runs = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert [run.name.split("-", 2)[2] for run in runs] == [
        "with-dropout",
        "without-dropout",
    ]
    for run, column in zip(runs, (1, 0), strict=True):
        events = EventAccumulator(str(run))
        events.Reload()
        last = {t: events.Scalars(t)[-1] for t in events.Tags()["scalars"]}
        assert last["demo/R1_at_p"].step == 6000
        for tag, row in (
            ("demo/R1_at_p", "R_1 at p=0.5"),
            ("loss/R_S", "R_S"),
            ("condensation/effective_ratio/0", "effective ratio"),
        ):
            assert last[tag].value == pytest.approx(rows[row][column], rel=1e-3)
    (picture,) = tmp_path.glob("*.png")
    assert str(picture) in printed and f"torch-dropout-ir board {tmp_path}" in printed
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 300


def test_both_runs_start_alike():
    settings = Settings.of()
    first, second = network(settings, 20, 0.0), network(settings, 20, 0.5)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert float(first[0].weight.detach().std()) == pytest.approx(0.15, rel=0.05)


def test_whitened_components_have_variance_one():
    data = load(None, 20)
    x, y = data.train
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(20), atol=1e-4, rtol=0)
    assert y.shape == (300, 10) and (y.sum(1) == 1).all()
    assert len(data.test[0]) == 1497
    assert load(None, 0).train[0].shape == (300, 64)


@pytest.mark.data
def test_mnist_is_the_papers_network(data_root, tmp_path, capsys):
    arguments = ["demo", "--data-root", str(data_root), "--log-dir", str(tmp_path)]
    assert main([*arguments, "--steps", "20"]) == 0
    printed = capsys.readouterr().out
    assert "784-1000-10 network" in printed and "first 1000 images" in printed
    rows = numbers(printed)
    assert rows["R_1 at p=0.5"][1] < rows["R_1 at p=0.5"][0]
    settings = Settings.of(data_root=data_root)
    assert (settings.width, settings.components) == (1000, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--p", "1.5"], "--p"),
        (["--p", "nan"], "--p"),
        (["--steps", "0"], "--steps"),
        (["--lr", "-1"], "--lr"),
        (["--components", "999"], "--components"),
        (["--lr", "100", "--steps", "50"], "diverged"),
    ],
)
def test_bad_values_get_a_sentence(arguments, says, tmp_path, capsys):
    assert main(["demo", "--log-dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_missing_data_and_unwritable_directory_get_a_sentence(tmp_path, capsys):
    arguments = ["demo", "--log-dir", str(tmp_path), "--data-root", "/nowhere"]
    assert main(arguments) == 1
    assert "--data-root: expected MNIST" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["demo", "--log-dir", str(tmp_path / "file")]) == 1
    assert "--log-dir: cannot write" in capsys.readouterr().err


def test_help_and_bad_flags(capsys):
    for arguments, status, says in (
        (["--help"], 0, "demo"),
        (["demo", "--help"], 0, "--data-root"),
        (["demo", "--stepz", "3"], 2, "unrecognized arguments"),
        ([], 2, "COMMAND"),
        (["demo", "--steps", "many"], 2, "invalid int"),
        (["demo", "--seed", "9" * 23], 2, "expected 0 to 2^64 - 1"),
        (["analyze", "--model", "m", "--data", "d", "--seed", "-1"], 2, "expected 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
        shown = capsys.readouterr()
        assert says in shown.out + shown.err


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "torch_dropout_ir", "demo", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch-dropout-ir: --steps: expected" in done.stderr


def test_interrupt_says_so(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tdi.demo.run, "train", interrupted)
    assert main(["demo", "--log-dir", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
