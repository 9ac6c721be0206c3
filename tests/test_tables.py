"""Tables of numbers that a person reads."""

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.analysis.measures import Condensation
from torch_dropout_ir.analysis.tables import in_short, section, tables

CURVES = {
    "regularizer/R1": [(0, 9.0), (4, 0.25)],
    "regularizer/R1_standard_error": [(0, 9.0), (4, 0.015)],
    "regularizer/R1/b": [(4, 0.125)],
    "regularizer/R1_standard_error/b": [(4, 0.5)],
    "regularizer/R1/a/x": [(4, 0.0625)],
    "mask/keep_rate/b": [(6, 0.75)],
    "loss/R_S": [(4, 2.5)],
    "sharpness/trace": [(8, 3.0)],
    "sharpness/trace_standard_error": [(4, 7.0)],
}


def test_a_row_a_number_a_layer_and_a_site():
    lines = [line.split() for line in tables(CURVES)]
    assert lines[0] == []
    assert lines[1] == ["last", "value", "+-", "error", "at", "step"]
    assert lines[2:6] == [
        ["loss/R_S", "2.5", "4"],
        ["regularizer/R1", "0.25", "0.015", "4"],
        ["sharpness/trace", "3", "8"],  # its error is of another step
        ["sharpness/trace_standard_error", "7", "4"],
    ]
    assert lines[6:] == [
        [],
        ["by", "dropout", "site", "part", "of", "R_1", "keep", "rate", "at", "step"],
        ["b", "0.125", "+-", "0.5", "4"],
        ["b", "0.75", "6"],
        ["a/x", "0.0625", "4"],
    ]
    ends = {len(line) for line in tables(CURVES)[1:4]}
    assert len(ends) == 1  # columns are aligned


def test_in_short():
    said = "dropout adds 0.25 +- 0.015 to a loss of 2.5 on average: 10 % of it"
    assert in_short(CURVES) == [f"{said} (step 4)"]
    assert in_short({}) == in_short({"loss/R_S": [(0, 1.0)]}) == []
    found = {"loss/R_S": [(0, 2.0)], "regularizer/R1": [(4, 0.5)]}
    assert in_short(found) == []  # of two steps
    found |= {"loss/R_S": [(4, 2.0)], "regularizer/R1_standard_error": [(4, 0.3)]}
    (line,) = in_short(found, steps=False)
    assert line.endswith("on average: less than twice its error, it may be nothing")
    found = {"loss/R_S": [(4, -2.0)], "regularizer/R1": [(4, 0.5)]}  # a likelihood
    assert in_short(found, steps=False) == [
        "dropout adds 0.5 to a loss of -2 on average"
    ]
    ratios = {f"condensation/effective_ratio/{x}": [(2, 1.0)] for x in ("a", "b")}
    assert "no layer is condensed" in in_short(ratios)[0]
    (line,) = in_short(ratios | {"condensation/effective_ratio/b": [(2, 0.25)]})
    assert line.startswith("most condensed is b: ") and line.endswith("0.25 (step 2)")


def test_what_the_analysis_costs_comes_last():
    curves = {"cost/seconds/masks": [(0, 1.0)], "loss/R_S": [(0, 1.0)], "x": [(0, 1.0)]}
    names = [line.split()[0] for line in tables(curves)[2:]]
    assert names == ["loss/R_S", "x", "cost/seconds/masks"]


def test_without_steps_and_without_numbers():
    assert tables({}) == []
    lines = tables({"condensation/movement/": [(0, 0.5)]}, steps=False)
    assert lines == [
        "",
        "by layer              movement",
        "  (the model itself)       0.5",
    ]


def test_what_is_said_of_many_is_said_once():
    said = dict.fromkeys(("g/a", "g/b", "g/c", "g/d"), "so") | {"x": "other"}
    assert section("title", said) == [
        "", "title", "  g/a and 3 more of g: so", "  x: other",
    ]  # fmt: skip
    said = dict.fromkeys(("c", "g/a", "r", "s"), "so")  # of no one group
    assert section("title", said) == ["", "title", "  c, g/a, r, s: so"]
    assert section("title", {}) == []


def test_a_summary_says_where_no_step_was_seen():
    net, batch = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)), torch.ones(4, 3)
    data = [(batch, torch.zeros(4, 2))]
    with tdi.attach_analysis(net, "mse", log_dir=False, data=data) as analysis:
        assert "no step of a torch.optim.Optimizer" in analysis.summary()
        analysis.measure()
        assert "nothing was measured" not in analysis.summary()


@pytest.mark.parametrize(
    ("steps", "last"), [(1, None), (2, 0), (10, 0), (11, None), (20, None), (30, None)]
)
def test_a_summary_says_where_most_steps_came_after_the_last_number(steps, last):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with tdi.attach_analysis(
        net, log_dir=False, every=10, measures=[Condensation()]
    ) as analysis:
        for _ in range(steps):
            net(torch.ones(4, 3)).sum().backward()
            sgd.step()
    said = [x for x in analysis.summary().splitlines() if x.startswith("nothing")]
    assert len(said) == (last is not None)
    assert all(f"after step {last}:" in line for line in said)
    assert f"after {steps} optimizer steps" in analysis.summary()
