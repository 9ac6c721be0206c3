"""The tab, the report and the command that shows them."""

import base64
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import quote

import numpy as np
import pytest
import torch
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter

import torch_dropout_ir as tdi
import torch_dropout_ir_board
from torch_dropout_ir.analysis import Histogram, Image
from torch_dropout_ir.cli import main
from torch_dropout_ir.tensorboard import TensorBoardSink
from torch_dropout_ir.tensorboard.board import start, write_report
from torch_dropout_ir_board.plugin import STATIC, BoardPlugin
from torch_dropout_ir_board.reading import picture

CHROMIUM = shutil.which("chromium")
EVIL = "<script>document.title='x'</script>"
MODEL = f"{EVIL} a|b *c* `d` [e](f)"


def write_run(path, *, layers=2, steps=(0, 5, 10), shift=0.0, close=True):
    """What an analysis writes, with pictures and curves that are known."""
    sink = TensorBoardSink(path)
    for step in steps:
        records = {"regularizer/R1": 0.5 + shift, "loss/R_S": 2.0 + step,
                   "regularizer/R1_standard_error": 0.125}  # fmt: skip
        for layer in range(layers):
            weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(layer))
            order = tdi.condensation.cluster_order(weights)
            field = tdi.condensation.cosine_similarity(weights[order])
            records[f"condensation/cosine/{layer}"] = Image(field, -1.0, 1.0, order)
            records[f"condensation/effective_ratio/{layer}"] = 0.25
        places = torch.zeros(4, 6)
        places[1, 2], places[3, 3] = 1.0, -1.0
        records["condensation/orientation_amplitude/0"] = Image(places, -1.0, 1.0)
        curve = torch.tensor([4.0, 1.0, 4.0])
        records["sharpness/loss_slice"] = Histogram(curve + shift, -1.5, 1.5)
        records["sharpness/spectral_density"] = Histogram(curve, -1.0, 5.0)
        sink.write(step, records, {"run/model": MODEL})
    if close:
        sink.close()
    return sink


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    write_run(path / "with")
    write_run(path / EVIL.replace("/", "_"), shift=1.0)
    foreign = SummaryWriter(path / "foreign")
    foreign.add_image("condensation/cosine/0", np.zeros((3, 5, 5)), 3)
    foreign.add_scalar("regularizer/R1", float("nan"), 3)
    foreign.close()
    return path


@pytest.fixture(scope="module")
def server(two_runs):
    return served(two_runs, runs=3)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def served(path, runs):
    """The address of a server that has read everything."""
    address = start(path, port=0, load_fast="false").split("#")[0]
    index = address + "data/plugin/dropout_ir/index"

    def loaded():
        with urllib.request.urlopen(index) as answer:
            return len(json.load(answer)["runs"]) == runs

    wait_for(loaded)
    return address


def ask(server, path):
    with urllib.request.urlopen(server + "data/" + path) as answer:
        assert answer.headers["X-Content-Type-Options"] == "nosniff" or "plugin/" not in path  # fmt: skip # noqa: E501
        return json.loads(answer.read())


def seen(url, tmp_path, wait=8000):
    """The page's elements after its scripts have run."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-sync",
        "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        f"--virtual-time-budget={wait}", "--window-size=1280,800",
        "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    page = done.stdout.decode()
    # A report has styles and scripts before what they draw.
    return page[: page.index(">", 20) + 1] + page.split("</script>")[-1]


def test_endpoints_give_what_was_written(server):
    listing = ask(server, "plugins_listing")["dropout_ir"]
    assert listing["enabled"] and listing["tab_name"] == "Dropout IR"
    index = ask(server, "plugin/dropout_ir/index")
    assert len(index["runs"]) == 3 and any("<script>" in run for run in index["runs"])
    assert set(index["images"]["condensation/cosine/1"]) == set(index["runs"]) - {"foreign"}  # fmt: skip # noqa: E501
    assert index["said"]["loss/R_S"] == "Loss of the batch with dropout off."
    assert "Def. 3" in index["said"]["condensation/effective_ratio"]  # of all layers
    points = ask(server, "plugin/dropout_ir/scalars?of=loss/R_S")["with"]
    assert points == [[0, 2.0], [5, 7.0], [10, 12.0]]
    slices = ask(server, "plugin/dropout_ir/histograms?of=sharpness/loss_slice")
    assert slices["with"][2] == [10, [-1.5, 1.5, [4.0, 1.0, 4.0]]]
    nan = ask(server, "plugin/dropout_ir/scalars?of=regularizer/R1")["foreign"]
    assert nan == [[3, None]]


def test_steps_made_again_after_a_restart_take_the_place_of_those_before(tmp_path):
    path = tmp_path / "run"
    write_run(path, steps=(0, 5, 10, 15))
    write_run(path, steps=(10, 12, 20), shift=1.0)
    server = served(tmp_path, runs=1)

    def made(kind, tag):
        return ask(server, f"plugin/dropout_ir/{kind}?of={tag}")["run"]

    found = made("scalars", "regularizer/R1")
    assert found == [[0, 0.5], [5, 0.5], [10, 1.5], [12, 1.5], [20, 1.5]]
    for kind, tag in (
        ("histograms", "sharpness/loss_slice"),
        ("images", "condensation/cosine/0"),
    ):
        assert [step for step, _ in made(kind, tag)] == [0, 5, 10, 12, 20]


def test_pictures_give_back_names_and_cosines(server):
    series = ask(server, "plugin/dropout_ir/images?of=condensation/cosine/1")["with"]
    assert [step for step, _ in series] == [0, 5, 10]
    found = ask(server, f"plugin/dropout_ir/picture?of={quote(series[0][1])}")
    weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    order = tdi.condensation.cluster_order(weights)
    cosines = tdi.condensation.cosine_similarity(weights[order]).numpy()
    levels = np.frombuffer(base64.b64decode(found["cells"]), np.uint8)
    levels = levels.reshape(12, 12).astype(float)
    values = -1 + 2 * levels / (found["levels"] - 1)
    np.testing.assert_allclose(values, cosines, atol=1 / 128 + 1e-6)
    assert found["names"] == [str(i) for i in order.tolist()]


def test_foreign_and_malformed_pictures_are_said_to_be_so(server):
    series = ask(server, "plugin/dropout_ir/images?of=condensation/cosine/0")["foreign"]
    found = ask(server, f"plugin/dropout_ir/picture?of={quote(series[0][1])}")
    assert "Not a picture of ours" in found["error"]
    for broken in (b"", b"\x89PNG\r\n\x1a\n", b"<script>"):
        assert "Not a picture of ours" in picture(broken)["error"]
    with pytest.raises(urllib.error.HTTPError):
        ask(server, "plugin/dropout_ir/picture?of=nonsense")


def test_the_tab_draws_both_runs(server, tmp_path):
    page = seen(server + "data/plugin_entry.html?name=dropout_ir", tmp_path=tmp_path)
    assert page.count("<canvas") == 2  # a heat map a run, side by side
    assert "Not a picture of ours" in page  # the foreign run's
    # A dot a run in the scatter, and one a measurement in the curve of R_1.
    assert page.count("<circle") == 2 + 6
    assert page.count("<polyline") >= 4  # density and slice of both
    assert "0.50 ± 0.13" in page and "1.50 ± 0.13" in page
    bands = re.findall('<polygon points="([^"]+)"', page)
    curves = re.findall('<polyline points="([^"]+)"', page)[-len(bands) :]
    assert len(bands) == 2  # of R_1, which has errors
    for band, curve in zip(bands, curves, strict=True):
        band, curve = (np.loadtxt(x.split(), delimiter=",") for x in (band, curve))
        upper, lower = band[:3], band[:2:-1]
        assert (upper[:, 0] == curve[:, 0]).all() and (lower[:, 0] == curve[:, 0]).all()
        assert (upper[:, 1] < curve[:, 1]).all() and (curve[:, 1] < lower[:, 1]).all()
    assert "&lt;script&gt;" in page and "<script>document" not in page
    assert "<title>x</title>" not in page


def test_an_empty_directory_says_so(tmp_path):
    (tmp_path / "logs").mkdir()
    address = served(tmp_path / "logs", runs=0)
    assert ask(address, "plugin/dropout_ir/index")["runs"] == []
    page = seen(address + "data/plugin_entry.html?name=dropout_ir", tmp_path=tmp_path)
    assert "No run here yet" in page and "<canvas" not in page


def test_a_run_in_progress_and_200_layers(tmp_path):
    sink = write_run(tmp_path / "logs" / "run", layers=200, steps=(0,), close=False)
    sink.write(1, {"loss/R_S": 1.0}, {})
    wait_for(lambda: sink._panels._turn == 2)
    sink._writer.flush()
    path = tmp_path / "report.html"
    write_report(tmp_path / "logs", path)
    page = seen(path.as_uri(), tmp_path=tmp_path)
    assert page.count("<option") == 200
    assert page.count("<canvas") == 1
    sink.close()


def test_the_report_is_one_file_that_draws(two_runs, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(two_runs), "--out", str(out)]) == 0
    assert "3 runs" in capsys.readouterr().out
    text = out.read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text and "<script>document" not in text
    page = seen(out.as_uri(), tmp_path=tmp_path)
    assert page.count("<canvas") == 2 and page.count("<polyline") >= 4
    assert "<title>x</title>" not in page


def test_the_keyboard_moves_steps_runs_and_layers(two_runs, tmp_path):
    out = tmp_path / "report.html"
    write_report(two_runs, out)
    text = out.read_text()
    text = text[: text.index("<meta http-equiv")] + text[text.index("<title>") :]
    presses = """<script type="module">
    const wait = (ms) => new Promise((done) => setTimeout(done, ms));
    await wait(500);
    for (const key of KEYS) {
      document.dispatchEvent(new KeyboardEvent("keydown", { key })); await wait(200);
    }</script>"""
    for keys, step, layer, hidden in (
        (["ArrowLeft"], 5, 0, 0), (["Home"], 0, 0, 0),
        (["Home", "ArrowRight"], 3, 0, 0),
        (["]"], 10, 1, 0), (["["], 10, 1, 0), (["1"], 10, 0, 1), (["1", "1"], 10, 0, 0),
    ):  # fmt: skip
        out.write_text(text + presses.replace("KEYS", json.dumps(keys)))
        page = seen(out.as_uri(), tmp_path=tmp_path)
        assert f"step {step}</output>" in page, keys
        assert page.count('aria-pressed="false"') == hidden, keys
        chosen = page.split("</select>")[0]
        assert f'value="{layer}"' in chosen


@pytest.mark.parametrize("command", ["board", "report"])
def test_bad_directories_get_a_sentence(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "none")]) == 1
    assert "LOGDIR: expected a directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "found none" in capsys.readouterr().err


def test_the_package_is_light_and_small():
    code = (
        "import sys, torch_dropout_ir_board.plugin\n"
        "assert not {'torch', 'PIL', 'torch_dropout_ir'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    files = [*STATIC.parent.glob("*.py"), *STATIC.iterdir()]
    assert sum(file.read_text().count("\n") for file in files) < 400


def test_a_failing_import_stops_nothing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch_dropout_ir_board.plugin", None)
    found = torch_dropout_ir_board.BoardLoader().load(TBContext())
    assert found is None and "no Dropout IR tab" in caplog.text


def test_names_of_the_plugin():
    plugin = BoardPlugin(TBContext())
    assert set(plugin.get_plugin_apps()) == {
        "/index", "/picture", "/scalars", "/histograms", "/images",
        "/index.js", "/style.css",
    }  # fmt: skip


@pytest.mark.parametrize(
    "asked", [{"host": "no such host"}, {"port": 2**20}, {"port": -1}]
)
def test_an_address_that_cannot_be_had_gets_a_sentence(tmp_path, asked):
    with pytest.raises(OSError, match="--host, --port: TensorBoard cannot listen on"):
        start(tmp_path, load_fast="false", **{"port": 0, **asked})
