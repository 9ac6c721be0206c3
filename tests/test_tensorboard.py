"""Event files, read back with TensorBoard's own reader."""

import csv
import io
import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from tensorboard.util import tensor_util
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis import Histogram, Image
from torch_dropout_ir.analysis.tables import tables
from torch_dropout_ir.tensorboard import TensorBoardSink
from torch_dropout_ir.tensorboard.descriptions import describe_tag
from torch_dropout_ir.tensorboard.panels import draw, row_names
from torch_dropout_ir.tensorboard.values import bands, histogram


def read(path):
    found = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


@pytest.fixture
def run(tmp_path):
    """A run of 20 steps with everything on."""
    model = nn.Sequential(
        nn.Linear(4, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 2)
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss()
    with tdi.attach_analysis(model, log_dir=tmp_path, every=5) as analysis:
        for _ in range(20):
            sgd.zero_grad()
            criterion(model(torch.randn(16, 4)), torch.randn(16, 2)).backward()
            sgd.step()
    return analysis, read(tmp_path), model


def test_every_number_is_read_back(run):
    analysis, events, _ = run
    assert set(events.Tags()["scalars"]) == set(analysis.history)
    for tag, values in analysis.history.items():
        got = [(e.step, e.value) for e in events.Scalars(tag)]
        first = 1 if tag == "cost/share" else 0  # which is of what was before
        expected = [0, 5, 10, 15][first:]
        assert [s for s, _ in got] == [s for s, _ in values] == expected
        np.testing.assert_allclose([v for _, v in got], [v for _, v in values], 1e-6)


def test_a_resumed_run_leaves_the_scripts_own_curves_in_the_directory(tmp_path):
    for steps in (range(3), range(2, 5)):
        own = SummaryWriter(tmp_path)
        time.sleep(1.1)  # files are read in the order of the second they are made
        sink = TensorBoardSink(tmp_path)
        for step in steps:
            own.add_scalar("train/loss", 1.0, step)
            sink.write(step, {"loss/R_S": 1.0}, {})
        own.close()
        sink.close()
    assert {e.step for e in read(tmp_path).Scalars("train/loss")} == {*range(5)}


def test_the_contracts_tags_are_there(run):
    _, events, _ = run
    tags = events.Tags()
    assert {
        "regularizer/R1", "regularizer/R1/2", "regularizer/R1_standard_error",
        "regularizer/R1_standard_error/2", "regularizer/R2", "loss/R_S",
        "regularizer/R2_dropout_noise", "regularizer/R2_dropout_noise_standard_error",
        "loss/modified", "loss/modified_standard_error",
        "mask/keep_rate/2", "mask/z_score/2", "condensation/effective_ratio/0",
        "condensation/effective_neurons/0", "sharpness/top_eigenvalue",
        "sharpness/top_eigenvalue_residual", "sharpness/trace",
        "sharpness/trace_standard_error", "cost/seconds/sharpness", "cost/share",
    } <= set(tags["scalars"])  # fmt: skip
    assert {
        f"condensation/{name}/{layer}"
        for name in ("cosine", "orientation_amplitude")
        for layer in (0, 3)
    } == set(tags["images"])
    assert "condensation/cosines/0" in tags["histograms"]


def test_heat_map_shows_the_cosines(tmp_path):
    weights = torch.cat((torch.eye(3), -torch.eye(3)))
    field = tdi.condensation.cosine_similarity(weights)
    sink = TensorBoardSink(tmp_path)
    sink.write(0, {"condensation/cosine/x": Image(field, -1, 1)}, {})
    sink.close()
    (event,) = read(tmp_path).Images("condensation/cosine/x")
    picture = PillowImage.open(io.BytesIO(event.encoded_image_string))
    assert picture.size == (event.width, event.height) == (204 + 40, 204)
    colours = np.asarray(picture.convert("RGB"))[17:204:34, 17:204:34]
    assert (colours[0, 0] == (178, 24, 43)).all()  # parallel: red
    assert (colours[0, 3] == (33, 102, 172)).all()  # opposite: blue
    assert colours[0, 1].min() > 240  # orthogonal: white


def test_large_heat_maps_are_averaged_to_256():
    from torch_dropout_ir.analysis.measures import Condensation
    from torch_dropout_ir.analysis.snapshot import Snapshot

    model = nn.Linear(5, 1500)
    records = Condensation()(Snapshot(model, 0, ()))
    image = records["condensation/cosine/"]
    assert isinstance(image, Image)
    assert image.values.shape == (256, 256)
    (histogram,) = [r for r in records.values() if isinstance(r, Histogram)]
    assert int(histogram.counts.sum()) == 1500 * 1499 // 2


def test_histogram_of_cosines_counts_each_pair(run):
    _, events, _ = run
    histogram = events.Histograms("condensation/cosines/0")[0].histogram_value
    assert histogram.num == sum(histogram.bucket) == 40 * 39 / 2
    edges = [histogram.min, *histogram.bucket_limit]
    assert len(histogram.bucket) == len(edges) - 1 <= 80
    np.testing.assert_allclose(np.diff(edges), 1 / 40, 1e-6)  # fixed bins, ends cut
    assert histogram.bucket[0] > 0 and histogram.bucket[-1] > 0
    assert histogram.max == edges[-1]


@pytest.mark.parametrize("counts", [[0, 3, 0, 2, 0], [1, 2, 3, 4, 5], [0, 0, 7, 0, 0]])
def test_moments_of_a_histogram_are_those_of_its_centres(counts):
    found = histogram(Histogram(torch.tensor(counts), -1.0, 1.5))
    centres = np.repeat(-1.0 + 0.5 * (np.arange(5) + 0.5), counts)
    assert found.num == sum(counts)
    assert found.sum == pytest.approx(centres.sum())
    assert found.sum_squares == pytest.approx((centres**2).sum())
    filled = np.flatnonzero(counts)
    assert found.min == pytest.approx(-1 + 0.5 * filled[0])
    assert found.max == pytest.approx(-1 + 0.5 * (filled[-1] + 1))


def test_rows_of_a_picture_name_the_neurons_that_they_are_means_of():
    assert row_names(Image(torch.zeros(2, 2), -1, 1), 2) == []
    order = torch.tensor([4, 0, 2, 1, 3, 5, 6, 7, 8])
    image = Image(torch.zeros(9, 9), -1, 1, order)
    assert row_names(image, 9) == [str(int(i)) for i in order]
    assert row_names(image, 3) == ["4, 0, 2", "1, 3, 5", "6, 7, 8"]
    # Blocks share neurons where they do not come out even, as pooling has them.
    assert row_names(image, 2) == ["4, 0, 2 and 2 more", "3, 5, 6 and 2 more"]
    pooled = torch.nn.functional.adaptive_avg_pool1d(order[None].double(), 2)
    blocks = order[:5], order[4:]
    assert pooled[0].tolist() == [float(x.double().mean()) for x in blocks]


@pytest.mark.parametrize(
    ("shape", "grow"), [((3, 5), 41), ((104, 2), 2), ((150, 9), 1)]
)
def test_a_value_of_a_picture_is_as_many_pixels_as_fit(shape, grow):
    values = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)
    png, width, height = draw(Image(values, -1, 1))
    with PillowImage.open(io.BytesIO(png)) as picture:
        said = json.loads(picture.text["torch-dropout-ir"])
        pixels = np.asarray(picture).astype(float)
    assert (said["rows"], said["columns"], said["grow"]) == (*shape, grow)
    assert pixels.shape == (height, width) and max(width, height) <= 256
    assert height == max(96, grow * shape[0])
    levels = pixels[: grow * shape[0] : grow, : grow * shape[1] : grow]
    back = -1 + 2 * levels / (said["levels"] - 1)
    np.testing.assert_allclose(back, values, atol=1 / 128 + 1e-6)
    bar = pixels[:, -30]  # the scale: its high end is above
    assert bar[0] == said["levels"] - 1 and bar[height - 1] == 0


def test_facts_are_what_runs_and_nothing_else(tmp_path):
    sink = TensorBoardSink(tmp_path)
    notes = {"run/seed": "7", "regularizer/R1": "a note of a number"}
    sink.write(0, {"regularizer/R1": 1.0}, notes)
    sink.close()
    (said,) = [
        tensor_util.make_ndarray(v.tensor).item().decode()
        for _, v in summaries(tmp_path)[0]
        if v.tag == "run/facts"
    ]
    assert said == "* **seed**: 7"


def test_numbers_of_a_run_are_numbers_among_its_hyperparameters(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(0, {"x": 1.0}, {"run/seed": "7", "run/lr": "0.5", "run/loss": "MSELoss"})
    sink.close()
    (started,) = [
        parse_session_start_info_plugin_data(v.metadata.plugin_data.content)
        for _, v in summaries(tmp_path)[0]
        if v.tag == "_hparams_/session_start_info"
    ]
    found = {name: x.WhichOneof("kind") for name, x in started.hparams.items()}
    assert found == {
        "seed": "number_value", "lr": "number_value", "loss": "string_value"
    }  # fmt: skip
    assert started.hparams["lr"].number_value == 0.5


def test_one_event_a_step_and_descriptions_once(run, tmp_path):
    (file,) = tmp_path.glob("events*")
    events = [
        e for e in LegacyEventFileLoader(str(file)).Load() if e.HasField("summary")
    ]
    assert [e.step for e in events] == [0, 5, 10, 15]
    said = {v.tag: v.metadata.summary_description for v in events[0].summary.value}
    for tag in said:
        assert said[tag], f"{tag} has no description"
    for value in events[0].summary.value:  # else `EventAccumulator` warns of each
        assert value.metadata.plugin_data.plugin_name, value.tag
    assert "exact, closed form" in said["regularizer/R1"]
    again = {v.tag: v.metadata.summary_description for v in events[1].summary.value}
    assert {tag for tag, text in again.items() if text} == {"cost/share"}


def test_default_directory_is_summary_writers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tdi.attach_analysis(nn.Linear(2, 2)):
        pass
    (found,) = (tmp_path / "runs").iterdir()
    assert os.uname().nodename in found.name


def test_two_models_of_one_script_are_two_runs(tmp_path, monkeypatch):
    """Which begin in the same second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    models = [nn.Sequential(nn.Linear(2, 2), nn.Dropout()) for _ in range(3)]
    measured = [tdi.attach_analysis(model) for model in models]
    for analysis in measured:
        analysis.measure()
        analysis.detach()
    name = f"now_{os.uname().nodename}"
    found = sorted(x.name for x in (tmp_path / "runs").iterdir())
    assert found == [name, f"{name}_2", f"{name}_3"]
    for run in found:
        movement = read(tmp_path / "runs" / run).Scalars("condensation/movement/0")
        assert [event.step for event in movement] == [0]


def test_a_process_that_may_not_write_opens_no_run_before_it_does(
    tmp_path, monkeypatch
):
    """As one of several that `torchrun` starts, where they are joined later."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with tdi.attach_analysis(nn.Sequential(nn.Linear(2, 2), nn.Dropout())) as analysis:
        assert not [*tmp_path.iterdir()]
        analysis.measure()
    assert len([*(tmp_path / "runs").iterdir()]) == 1


@pytest.mark.parametrize("log_dir", [None, "runs/a"])
def test_a_script_may_go_to_another_directory(tmp_path, monkeypatch, log_dir):
    monkeypatch.chdir(tmp_path)
    with tdi.attach_analysis(nn.Linear(2, 2), log_dir=log_dir) as analysis:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        analysis.measure()
    assert not analysis.absent.keys() & {"TensorBoardSink"}
    (found,) = (tmp_path / "runs").iterdir()
    assert "condensation/movement/" in read(found).Tags()["scalars"]


def test_unwritable_directory_attaches_nothing(tmp_path):
    (tmp_path / "file").touch()
    model = nn.Sequential(nn.Dropout())
    with pytest.raises(OSError, match="log_dir"):
        tdi.attach_analysis(model, log_dir=tmp_path / "file" / "run", convert=True)
    assert type(model[0]) is nn.Dropout and not model._forward_hooks


def test_events_are_on_disk_without_detach(tmp_path):
    """A script that just ends, as scripts do."""
    import subprocess
    import sys

    script = f"""
import torch, torch_dropout_ir as tdi
from torch import nn
model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
tdi.attach_analysis(model, nn.MSELoss(), log_dir={str(tmp_path)!r}, every=1)
for _ in range(3):
    model(torch.ones(4, 2)).sum().backward()
    sgd.step()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert [e.step for e in read(tmp_path).Scalars("regularizer/R1")] == [0, 1, 2]


def summaries(path):
    """Values of all events, as ``(step, value)``, and sizes of events."""
    (file,) = path.glob("events*")
    events = [
        e for e in LegacyEventFileLoader(str(file)).Load() if e.HasField("summary")
    ]
    return [(e.step, v) for e in events for v in e.summary.value], events


def test_bands_layout_facts_and_initial_state(run, tmp_path):
    _, events, _ = run
    values, _ = summaries(tmp_path)
    tensors = {v.tag: tensor_util.make_ndarray(v.tensor) for s, v in values
               if v.HasField("tensor") and s == 0}  # fmt: skip
    trace, error = (
        events.Scalars(f"sharpness/trace{end}")[0].value
        for end in ("", "_standard_error")
    )
    assert tensors["uncertainty/sharpness/trace/lower"] == pytest.approx(trace - error)
    assert tensors["uncertainty/sharpness/trace/upper"] == pytest.approx(trace + error)
    known = {"a": 5.0, "a_standard_error": 1.0, "b": 2.0, "c_residual": 1.0}
    assert bands(known) == {"uncertainty/a/lower": 4.0, "uncertainty/a/upper": 6.0}
    layout = layout_pb2.Layout.FromString(tensors["custom_scalars__config__"].item())
    charts = layout.category[0].chart[::-1]  # as the page draws them
    assert charts[0].margin.series[0].value == "regularizer/R1"
    series = charts[1].margin.series[0]
    assert series.value == "sharpness/trace"
    assert {series.lower, series.upper} <= set(tensors)
    assert charts[-1].margin.series[0].value == "loss/modified"
    (sites,) = layout.category[1].chart
    assert [x.value for x in sites.margin.series] == ["regularizer/R1/2"]
    assert "uncertainty/regularizer/R1/2/upper" in tensors
    assert sum(v.tag == "custom_scalars__config__" for _, v in values) == 1
    facts = tensors["run/facts"].item().decode()
    for said in ("Sequential", "0.5", "MSELoss", "SGD", torch.__version__):
        assert said.replace("_", "&#95;") in facts
    assert "_hparams_/session_start_info" in {v.tag for _, v in values}
    kept = tensors["initial/condensation/cosine/0"][2]
    assert kept == events.Images("condensation/cosine/0")[0].encoded_image_string


def test_errors_are_of_numbers_and_not_of_names():
    """A layer may be called as the error of another."""
    known = {
        "regularizer/R1/a": 5.0, "regularizer/R1_standard_error/a": 1.0,
        "condensation/movement/conv": 0.5, "condensation/movement/conv_residual": 0.125,
        "mask/keep_rate/a": 0.5, "mask/keep_rate/a_standard_error": 0.25,
    }  # fmt: skip
    stem = "uncertainty/regularizer/R1/a"
    assert bands(known) == {f"{stem}/lower": 4.0, f"{stem}/upper": 6.0}
    lines = [x.split() for x in tables({tag: [(0, x)] for tag, x in known.items()})]
    assert ["a", "5", "+-", "1", "0.5", "0"] in lines  # R_1 and its error, keep rate
    assert ["a_standard_error", "0.25", "0"] in lines  # a site of that name
    assert ["conv_residual", "0.125", "0"] in lines


def test_the_layout_grows_with_the_sites(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step, sites in enumerate(("", "b", "ba", "a")):
        records = {"regularizer/R1": 1.0, "regularizer/R1_standard_error": 0.5}
        for site in sites:
            records[f"regularizer/R1/{site}"] = 0.5
            records[f"regularizer/R1_standard_error/{site}"] = 0.25
        sink.write(step, records, {})
    sink.close()
    found = [
        (step, layout_pb2.Layout.FromString(tensor_util.make_ndarray(v.tensor).item()))
        for step, v in summaries(tmp_path)[0]
        if v.tag == "custom_scalars__config__"
    ]
    shown = [
        (step, [x.value for x in chart.margin.series])
        for step, layout in found
        for category in layout.category
        for chart in category.chart
        if "each site and" in chart.title
    ]
    b, a = "regularizer/R1/b", "regularizer/R1/a"
    assert [step for step, _ in found] == [0, 1, 2] and shown == [(1, [b]), (2, [b, a])]


def test_events_are_bounded_and_every_picture_comes(tmp_path):
    layers, bound = 30, 2**16
    sink = TensorBoardSink(tmp_path, max_bytes=bound)
    for step in range(3):
        noise = torch.rand(100, 100) * 2 - 1
        sink.write(step, {f"condensation/cosine/{i}": Image(noise, -1, 1)
                          for i in range(layers)} | {"loss/R_S": 1.0}, {})  # fmt: skip
    sink.close()
    values, events = summaries(tmp_path)
    assert max(e.ByteSize() for e in events) <= bound
    assert [s for s, v in values if v.tag == "loss/R_S"] == [0, 1, 2]
    last = {v.tag: s for s, v in values}
    for i in range(layers):
        assert last[f"condensation/cosine/{i}"] == 2  # the newest, at the latest at end
        assert last[f"initial/condensation/cosine/{i}"] == 0


def test_writing_fails_in_the_next_step_and_training_is_told(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(0, {"own/record": "text"}, {})
    with pytest.raises(TypeError, match="own/record"):
        sink.close()
    with pytest.raises(TypeError, match="own/record"):
        sink.write(1, {}, {})


def test_other_sinks_get_the_same_records(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = tdi.sinks.Memory()
    places = [tdi.sinks.JsonLines(tmp_path / "run.jsonl"),
              tdi.sinks.Csv(tmp_path / "run.csv"), memory]  # fmt: skip
    with tdi.attach_analysis(model, log_dir=False, every=1, sinks=places) as analysis:
        for _ in range(3):
            nn.MSELoss()(model(torch.ones(4, 4)), torch.ones(4, 1)).backward()
            sgd.step()
    lines = [json.loads(x) for x in (tmp_path / "run.jsonl").read_text().splitlines()]
    rows = list(csv.reader((tmp_path / "run.csv").read_text().splitlines()))
    assert rows[0] == ["step", "tag", "value"] and memory.closed
    for tag, curve in analysis.history.items():
        assert memory.records[tag] == curve
        got = [
            (x["step"], float(x["records"][tag])) for x in lines if tag in x["records"]
        ]
        assert got == curve
        assert [(int(s), float(v)) for s, t, v in rows[1:] if t == tag] == curve
    assert memory.notes["run/model"] == "Sequential, 31 parameters"
    assert memory.notes["run/sites"] == "'1' (Dropout)"
    image = lines[0]["records"]["condensation/cosine/0"]
    assert len(image["values"]) == 5 and sorted(image["order"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float64])
def test_records_of_own_measures_are_of_any_dtype_and_may_have_a_graph(tmp_path, dtype):
    x = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    x.requires_grad_(x.is_floating_point())
    records = {"own/image": Image(x, 0.0, 1.0), "own/counts": Histogram(x[0], 0.0, 1.0)}
    lines = tdi.sinks.JsonLines(tmp_path / "run.jsonl")
    for sink in (TensorBoardSink(tmp_path), lines):
        sink.write(0, records, {})
        sink.close()
    found = json.loads((tmp_path / "run.jsonl").read_text())["records"]
    assert found["own/image"]["values"] == [[0, 1], [1, 0]]
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert "own/image" in tags["images"] and "own/counts" in tags["histograms"]


@pytest.mark.parametrize("sink", [tdi.sinks.JsonLines, tdi.sinks.Csv])
def test_a_line_that_a_killed_run_has_cut_takes_no_other_along(tmp_path, sink):
    path = tmp_path / "run"
    for step in (0, 1, 2):
        again = sink(path)
        again.write(step, {"loss/R_S": 0.5}, {})
        again.close()
        if step == 1:
            path.write_bytes(path.read_bytes()[:-6])
    lines = path.read_text().splitlines()
    assert len(lines) == (3 if sink is tdi.sinks.JsonLines else 4)
    if sink is tdi.sinks.JsonLines:
        assert [json.loads(lines[k])["step"] for k in (0, 2)] == [0, 2]
    else:
        assert [lines[k] for k in (1, 3)] == ["0,loss/R_S,0.5", "2,loss/R_S,0.5"]


def test_descriptions_say_what_the_run_says_of_a_tag_or_of_its_kind():
    notes = {"regularizer/R1": "exact", "mask/keep_rate/2": "of one layer"}
    assert "exact." in describe_tag("regularizer/R1/0", notes)
    assert "of one layer." in describe_tag("mask/keep_rate/2", notes)
    assert describe_tag("mask/keep_rate/3", notes).endswith("is expected.")
    for end, sign in (("lower", "-"), ("upper", "+")):
        said = describe_tag(f"uncertainty/regularizer/R1/{end}", notes)
        assert said.startswith(f"regularizer/R1 {sign} its error.")


def test_what_has_no_finite_error_has_no_band():
    found = bands({"a": 1.0, "a_standard_error": np.inf, "b": 2.0, "b_residual": 0.5})
    assert found == {"uncertainty/b/lower": 1.5, "uncertainty/b/upper": 2.5}
