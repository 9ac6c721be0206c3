"""The README's code runs as it stands, and what the pages point to is there."""

import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from torch_dropout_ir.analysis import Histogram, Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PAGES = sorted([
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tutorials/*/*.md"),
])  # fmt: skip


def test_code_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    names["analysis"].detach()
    assert names["report"].agreeing
    printed = capsys.readouterr().out
    assert "regularizer/R1" in printed and "sharpness/trace" in printed
    assert not names["analysis"].absent
    assert abs(names["layer"].statistics.z_score) < 5


def test_sinks_of_the_page_take_what_an_analysis_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wandb, aim = mock.MagicMock(), mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "aim", aim)
    page = (ROOT / "docs" / "sinks.md").read_text()
    own, *others = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {"model": nn.Sequential(nn.Linear(4, 8), nn.Dropout())}
    for block in (own, *others):
        exec(compile(block, "sinks.md", "exec"), names)
    sinks = [names["WandbSink"](project="a"), names["AimSink"]()]
    with names["analysis"] as analysis:
        analysis.measure()
    assert (tmp_path / "run.jsonl").stat().st_size and (tmp_path / "run.csv").exists()
    records = {"regularizer/R1": 0.5, "a": Histogram(torch.ones(3), 0.0, 1.0)}
    records["b"] = Image(torch.tensor([[-1.0, 1.0]]), -1.0, 1.0)
    for sink in sinks:
        sink.write(7, records, {"run/model": "net"})
        sink.close()
    (row,) = wandb.init.return_value.log.call_args.args
    assert row.keys() == {"optimizer step", *records}
    assert wandb.Image.call_args.args[0].tolist() == [[0, 255]]
    counts, edges = wandb.Histogram.call_args.kwargs["np_histogram"]
    assert len(counts) == 3 and edges[-1] == 1.0
    aim.Run.return_value.track.assert_called_once_with(
        0.5, name="regularizer/R1", step=7
    )


def test_every_tag_of_the_table_has_a_description():
    from torch_dropout_ir.tensorboard.descriptions import describe_tag

    table = TEXT.split("## What is measured")[1].split("`p` is the")[0]
    stems = "regularizer|loss|mask|condensation|sharpness|cost"
    tags = re.findall(rf"`((?:{stems})/[^`]+)`", table)
    assert len(tags) > 12
    for tag in tags:
        assert describe_tag(tag, {}), tag


def anchors(path):
    """Where GitHub puts the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", page.read_text())
    for path, anchor in (link.partition("#")[::2] for link in links):
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), path
        assert not anchor or anchor in anchors(there), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_files_are_there(page):
    """Scripts that a page names, with the options that it gives them."""
    named = re.findall(
        r"((?:benchmarks|tutorials)/[\w/]+\.py)([^`\n]*)", page.read_text()
    )
    for script, options in named:
        assert (ROOT / script).exists(), script
        text = "".join(p.read_text() for p in (ROOT / script).parent.glob("*.py"))
        for option in re.findall(r"(?<=\s)--[a-z-]+", options):
            assert f'"{option}"' in text, f"{script} {option}"
