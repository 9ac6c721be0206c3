"""Tables of numbers that a person reads."""

from torch_dropout_ir.analysis.tables import section, tables

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
