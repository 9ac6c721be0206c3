"""What a user sees in a browser: the tab in TensorBoard's frame, and its own pages."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis import Image
from torch_dropout_ir.tensorboard import TensorBoardSink
from torch_dropout_ir.tensorboard.board import write_report

from .browser import Browser
from .test_board import MODEL, served, wait_for, write_run

TAB = "data/plugin_entry.html?name=dropout_ir"
FRAME = "document.querySelector('iframe')?.contentDocument"
# Of all elements, through shadow roots, what is on the page of TensorBoard.
DRAWN = """(() => {
  const all = (at) => [...at.querySelectorAll('main *, :host *, *')].flatMap(
    (e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
  const seen = all(document.querySelector('main') ?? document);
  return (WHAT)(seen); })()"""


def drawn(what):
    return DRAWN.replace("WHAT", what)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages")
    write_run(path / "with", steps=range(0, 50, 5))
    write_run(path / "without", steps=range(0, 50, 5), shift=1.0)
    return served(path, runs=2)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def tab(page, address):
    page.open("about:blank")
    page.open(address + TAB)
    page.until("document.querySelectorAll('canvas').length === 2")
    yield page
    assert page.errors == []


def centre_of(page, element, right=0.5, down=0.5):
    box = page.run(
        f"(({{x, y, width, height}}) => [x, y, width, height])"
        f"({element}.getBoundingClientRect())"
    )
    return box[0] + right * box[2], box[1] + down * box[3]


def test_a_browser_without_two_schemes_of_colours_shows_the_light_one(tab):
    schemes = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.call("Emulation.setEmulatedMedia", features=schemes)
    shown = """(() => { const of = (e) => getComputedStyle(document.querySelector(e));
      return [of('body').backgroundColor, of('body').color, of('svg text').fill,
              of('.grid').stroke, of('#hint').backgroundColor]; })()"""
    try:
        dark = tab.run(shown)
        tab.run("""(async () => { const link = document.querySelector('link'),
          text = await (await fetch(link.href)).text(); link.remove();
          const plain = document.head.appendChild(document.createElement('style'));
          plain.textContent = text.replaceAll('light-dark(', 'unknown('); })()""")
        light = tab.run(shown)
    finally:
        tab.call("Emulation.setEmulatedMedia", features=[])
    grey = [f"rgb({level}, {level}, {level})" for level in (255, 33, 102, 221, 33)]
    assert light == grey and not set(dark) & {*grey}


def test_neurons_and_their_cosine_under_the_pointer(tab):
    weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    order = tdi.condensation.cluster_order(weights)
    cosines = tdi.condensation.cosine_similarity(weights[order])
    canvas, hint = "document.querySelector('canvas')", "document.getElementById('hint')"
    for row, column in ((0, 0), (2, 7), (11, 4)):
        place = centre_of(tab, canvas, (column + 0.5) / 12, (row + 0.5) / 12)
        tab.mouse("mouseMoved", *place)
        names = f"neurons {order[row]} × {order[column]}: cosine "  # noqa: RUF001
        tab.until(f"{hint}.textContent.startsWith({names!r})")
        said = tab.run(f"{hint}.textContent")
        value = float(said.removeprefix(names))
        assert abs(value - float(cosines[row, column])) < 1 / 128 + 0.005
        assert not tab.run(f"{hint}.hidden")
    tab.press("ArrowLeft")  # another step's picture: what was said is no longer so
    tab.until(f"{hint}.hidden")


def test_rows_of_several_neurons_have_their_mean(page, tmp_path):
    weights = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    field = tdi.condensation.cosine_similarity(weights)
    sink = TensorBoardSink(tmp_path / "run")
    sink.write(0, {"condensation/cosine/a": Image(field, -1, 1, torch.arange(400))}, {})
    sink.close()
    page.open(served(tmp_path, runs=1) + TAB)
    page.until("document.querySelectorAll('canvas').length === 1")
    page.mouse("mouseMoved", *centre_of(page, "document.querySelector('canvas')"))
    said = page.until("document.getElementById('hint').textContent")
    assert said.startswith("neurons 1") and ", " in said and ": mean cosine " in said


def test_the_slider_plays_to_the_end_and_stops(tab):
    state = "(({value}) => +value)(document.getElementById('slider'))"
    label = "document.getElementById('play').textContent"
    assert tab.run(state) == 9
    tab.click(*centre_of(tab, "document.getElementById('play')"))
    both = f"[{state}, document.getElementById('step').textContent]"
    tab.until(f"{state} === 0")
    seen, end = [], time.monotonic() + 30
    while not seen or seen[-1] < 9:
        assert time.monotonic() < end, seen
        at, said = tab.run(both)
        assert said == f"step {5 * at}"
        seen += [at] if at not in seen else []
    assert seen[0] == 0 and seen == sorted(seen) and len(seen) >= 8
    tab.until(f"{label}.includes('play')")
    assert tab.run(state) == 9
    tab.press(" ", " ")  # the focus is on the button still
    tab.until(f"{label}.includes('pause')")
    tab.press(" ", " ")
    tab.until(f"{label}.includes('play')")


def test_keys_reach_everything_and_keep_their_place(tab):
    focus = "document.activeElement.textContent"
    tab.press("Tab"), tab.press("Tab")
    assert "play" in tab.run(focus)
    tab.press("Tab"), tab.press("Tab")
    assert tab.run(focus) == "■ with"
    for pressed, canvases in (("false", 1), ("true", 2)):
        tab.press("Enter", "\r")
        tab.until(f"document.querySelectorAll('canvas').length === {canvases}")
        tab.until(f"{focus} === '■ with'")
        assert tab.run("document.activeElement.ariaPressed") == pressed
    tab.press("Tab"), tab.press("Tab")
    assert tab.run(focus) == "R_1"
    tab.press("Tab")
    assert tab.run(focus) == "R_S"
    tab.press("Enter", "\r")
    tab.until("document.querySelector('#curve h2').textContent.startsWith('R_S')")
    assert tab.run(focus) == "R_S"


SIZE = "(({width, height}) => [width, height])(%s.getBoundingClientRect())"


@pytest.mark.parametrize("wide", [390, 700, 1024])
def test_a_narrow_window_shows_whole_pictures(address, tmp_path, wide):
    with Browser(tmp_path, wide, 700) as page:
        page.open(address + TAB)
        page.until("document.querySelectorAll('canvas').length === 2")
        width, height = page.run(SIZE % "document.querySelector('canvas')")
        assert width == height >= 150
        room = page.run(SIZE % "document.getElementById('maps')")
        scale = "document.querySelector('.ends')"
        assert room[1] >= height + page.run(SIZE % scale)[1]
        assert page.run("document.documentElement.scrollWidth") <= wide
        assert page.run(SIZE % "document.getElementById('play')")[1] < 40
        across = f"{SIZE % 'document.querySelector(`#slice svg`)'}[0]"
        assert page.run(across) > wide / 2 - 60


def test_a_single_measurement_is_drawn_with_its_error(page, tmp_path):
    write_run(tmp_path / "short", steps=(0,))
    page.open(served(tmp_path, runs=1) + TAB)
    page.until("document.querySelectorAll('#curve circle').length === 1")
    bar = "document.querySelector('#curve line[stroke]:not([stroke=gray])')"
    assert page.run(SIZE % bar)[1] > 20
    said = page.run("document.querySelector('td').textContent")
    assert said == "0.50 ± 0.13"
    title = page.run("document.querySelector('th button').title")
    assert title.startswith("What dropout adds") and title.endswith(
        "draw regularizer/R1"
    )
    title = page.run("[...document.querySelectorAll('th button')].at(-1).title")
    assert "Directions of the neurons' input weights" in title
    assert "step 0; ± the standard error" in page.run(
        "document.querySelector('td').title"
    )


def test_a_number_of_long_ago_is_told_from_one_of_now(page, tmp_path):
    sink = TensorBoardSink(tmp_path / "a")
    sink.write(1, {"regularizer/R1": 0.5, "loss/R_S": 2.0}, {})
    sink.write(9, {"loss/R_S": 1.0, "loss/modified": 2.0}, {})  # later than any picture
    fields = Image(torch.eye(3), -1.0, 1.0, torch.arange(3))
    for step in (0, 2):
        sink.write(step, {"condensation/cosine/0": fields}, {})
    sink.close()
    sink = TensorBoardSink(tmp_path / "short")
    sink.write(1, {"loss/R_S": 1.0}, {})
    sink.close()
    rows = "[...document.querySelectorAll('td')].map((e) => e.className)"
    page.open(served(tmp_path, runs=2) + TAB)
    page.until("document.querySelectorAll('td').length === 6")
    # R_1 is of step 1; the other run has ended there.
    assert page.run(rows) == ["faint", "", "", "", "", ""]
    page.press("ArrowLeft")
    page.until("document.getElementById('step').textContent === 'step 2'")
    page.until("document.querySelectorAll('td').length === 4")
    assert page.run(rows) == [""] * 4


def test_what_a_log_scale_leaves_out_is_counted(page, tmp_path):
    for run, values in (("both", (0.5, -0.5, 0.0)), ("below", (-1.0, -1.0, -1.0))):
        sink = TensorBoardSink(tmp_path / run / "a")
        for step, value in enumerate(values):
            sink.write(step, {"regularizer/R1": value}, {})
        sink.close()
    said = "document.getElementById('curve')?.textContent ?? ''"
    page.open(served(tmp_path / "both", runs=1) + TAB)
    page.until(f"({said}).includes('2 not above 0: not on a log scale')")
    page.open(served(tmp_path / "below", runs=1) + TAB)
    page.until(f"({said}).includes('Nothing is above 0: press log for linear.')")
    page.press("l", "l")
    page.until("document.querySelectorAll('#curve circle').length === 3")
    assert "above" not in page.run(said)


def test_numbers_have_the_digits_that_their_errors_leave(tab):
    cases = {
        (189.5512, 0.0213): "189.55 ± 0.02", (2.34531, 0.000991): "2.3453 ± 0.0010",
        (6.164e-4, 6.9e-4): "(6 ± 7)e-4", (2.4941e-4, 1.02e-6): "(2.494 ± 0.010)e-4",
        (316.95, 13.2): "317 ± 13", (1234567.0, 4321.0): "(1.235 ± 0.004)e6",
        (33.248117, 3.4e-5): "33.248 ± 3e-5", (-0.5, 0.25): "-0.5 ± 0.3",
        (0.75, 0.0): "0.75", (12345.0, 200.0): "12345 ± 200",
    }  # fmt: skip
    for (value, error), said in cases.items():
        page = "import('/data/plugin/dropout_ir/index.js')"
        shown = tab.run(f"{page}.then((m) => m.measured({value}, {error}))")
        assert shown == said, (value, error)


def test_all_is_in_1280_by_800_and_ten_runs_take_no_more(page, address, tmp_path):
    for i in range(10):
        write_run(tmp_path / f"a-run-with-a-long-name-{i}", shift=i / 10)
    for url, runs in ((address, 2), (served(tmp_path, runs=10), 10)):
        page.open("about:blank")
        page.open(url + "#dropout_ir")
        page.until(f"{FRAME}?.querySelectorAll('canvas').length === {runs}")
        inside = page.run(
            f"(({{documentElement: e}}) => [e.scrollWidth, e.scrollHeight, "
            f"e.clientHeight])({FRAME})"
        )
        assert inside[0] <= 1280 and inside[1] <= inside[2] < 800, inside
        assert page.run(f"{FRAME}.querySelectorAll('#charts svg').length") == 4
        colours = f"new Set([...{FRAME}.querySelectorAll('#runs span')].map((e) => e.style.color))"  # noqa: E501
        assert page.run(f"{colours}.size") >= runs
    # Beside a wide table there is no room: the maps go below.
    page.run(
        f"{FRAME}.querySelector('#numbers').style.setProperty('min-width', '1000px')"
    )
    canvases = f"[...{FRAME}.querySelectorAll('canvas')]"
    lefts = f"new Set({canvases}.map((e) => e.getBoundingClientRect().left))"
    assert page.run(f"{lefts}.size") >= 4


def test_alone_the_page_follows_the_system(page, address, tmp_path):
    write_report(Path(write_run(tmp_path / "run").log_dir), tmp_path / "report.html")
    paper = "getComputedStyle(document.body).backgroundColor"
    for url in (address + TAB, (tmp_path / "report.html").as_uri()):
        page.open("about:blank")
        page.open(url)
        page.until("document.querySelectorAll('canvas').length > 0")
        for theme, colour in (("dark", "rgb(48, 48, 48)"), ("light", "rgb(255, 255, 255)")):  # fmt: skip # noqa: E501
            wanted = {"name": "prefers-color-scheme", "value": theme}
            page.call("Emulation.setEmulatedMedia", features=[wanted])
            page.until(f"{paper} === '{colour}'")
    page.call("Emulation.setEmulatedMedia", features=[])


def test_the_theme_follows_tensorboards_own_switch(page, address):
    page.open("about:blank")
    page.open(address + "?darkMode=false#dropout_ir")
    page.until(f"{FRAME}?.querySelectorAll('canvas').length === 2")
    paper = f"getComputedStyle({FRAME}.body).backgroundColor"
    assert page.run(paper) == "rgb(255, 255, 255)"
    page.run("document.querySelector('app-header-dark-mode-toggle button').click()")
    dark = "[...document.querySelectorAll('[role=menuitem]')].find((e) => /Dark/.test(e.textContent))"  # noqa: E501
    page.until(f"{dark} !== undefined")
    page.run(f"{dark}.click()")
    page.until(f"{paper} === 'rgb(48, 48, 48)'")


def test_a_run_in_progress_grows_in_the_open_tab(page, tmp_path):
    sink = write_run(tmp_path / "run", close=False)
    wait_for(lambda: not sink._steps.queue and sink._panels._turn == 3)
    sink._writer.flush()
    page.open("about:blank")
    page.open(served(tmp_path, runs=1) + "#dropout_ir")
    page.until(f"{FRAME}?.getElementById('step')?.textContent === 'step 10'")
    fields = Image(torch.eye(12), -1.0, 1.0, torch.arange(12))
    sink.write(15, {"condensation/cosine/0": fields, "loss/R_S": 17.0}, {})
    sink.close()

    clicks = itertools.count()

    def grown():
        if next(clicks) % 20 == 0:  # a busy page takes its time to answer one
            page.run("document.querySelector('app-header-reload button').click()")
        return page.run(f"{FRAME}.getElementById('step').textContent") == "step 15"

    wait_for(grown)
    page.until(f"{FRAME}.querySelector('figcaption').textContent.includes('step 15')")


NATIVE = {
    "timeseries": "(a) => a.filter((e) => e.tagName === 'LINE-CHART').length >= 2",
    "scalars": "(a) => a.some((e) => e.matches('vz-line-chart2') && "
    "e.shadowRoot.querySelector('svg path'))",
    "custom_scalars": "(a) => a.filter((e) => "
    "e.matches('tf-custom-scalar-margin-chart-card')).length >= 3 && a.some((e) => "
    "e.matches('path.line') || e.classList?.contains('plottable'))",
    "images": "(a) => { const m = a.filter((e) => e.tagName === 'IMG'); "
    "return m.length >= 4 && m.every((e) => e.naturalWidth > 60); }",
    "distributions": "(a) => a.some((e) => e.matches('path.area'))",
    "histograms": "(a) => a.some((e) => e.matches('.histogram path, path.histogram'))",
    "text": "(a) => a.filter((e) => e.matches('li')).some((e) => "
    f"e.textContent.trim() === {json.dumps(f'model: {MODEL}')})",
    "hparams": "(a) => a.some((e) => e.matches('vaadin-grid-cell-content') && "
    "/<script>/.test(e.textContent))",
}


@pytest.mark.parametrize("name", NATIVE)
def test_tensorboards_own_pages_draw_what_was_written(page, address, name):
    page.open("about:blank")
    page.open(f"{address}#{name}")
    page.until(drawn(NATIVE[name]))
    assert page.run("document.title") != "x"


def test_the_first_cards_are_numbers_and_bands_come_last(page, address):
    page.open("about:blank")
    page.open(f"{address}#timeseries")
    names = "[...document.querySelectorAll('.group-title')].map((e) => e.textContent.trim())"  # noqa: E501
    titles = page.until(f"{names}.length > 3 && {names}")
    assert titles[:2] == ["Pinned", "condensation"] and titles[-1] == "uncertainty"
