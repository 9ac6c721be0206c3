"""Numbers for a person: in short, and as tables of the run, by layer, by site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from torch_dropout_ir.analysis.records import estimate_of

# Behind these beginnings of tags is the name of a layer or a site.
_NAMED: Final = {
    "by layer": ("condensation/",),
    "by dropout site": ("mask/", "regularizer/R1/"),
}


class _Last(NamedTuple):
    """The last value of a number, its error in words, and when it was measured."""

    value: float
    error: str
    step: int


def tables(
    history: Mapping[str, list[tuple[int, float]]], *, steps: bool = True
) -> list[str]:
    """Return the last values as lines, each with its error beside it.

    A table of the run, one with a row a layer, one with a row a dropout site; with
    ``steps`` they say at which step each number was measured.
    """
    last = _last_values(history)
    named = {
        title: {tag: x for tag, x in last.items() if tag.startswith(beginnings)}
        for title, beginnings in _NAMED.items()
    }
    whole = last.keys() - {tag for found in named.values() for tag in found}
    # What the analysis costs is not what it is asked for: it comes last.
    order = sorted(whole, key=lambda tag: (tag.startswith("cost/"), tag))
    table = [["", "last value", "+- error", "at step"]]
    for tag in order:
        x = last[tag]
        table.append([tag, f"{x.value:.5g}", x.error, str(x.step)])
    lines = _aligned(table, steps)
    for title, found in named.items():
        lines += _by_name(title, found, steps)
    return lines


def _last_values(history: Mapping[str, list[tuple[int, float]]]) -> dict[str, _Last]:
    """Last values by tag; of an error, that is told with what it is the error of."""
    last = {tag: _Last(x[-1][1], "", x[-1][0]) for tag, x in history.items()}
    for tag in history:
        estimate = estimate_of(tag)
        if estimate in last and last[estimate].step == last[tag].step:
            error = f"{last.pop(tag).value:.2g}"
            last[estimate] = last[estimate]._replace(error=error)
    return last


def in_short(
    history: Mapping[str, list[tuple[int, float]]], *, steps: bool = True
) -> list[str]:
    """Return what dropout does to the network, in a sentence a line.

    Example:
        >>> curves = {"loss/R_S": [(8, 2.0)], "regularizer/R1": [(8, 0.5)]}
        >>> in_short(curves)
        ['dropout adds 0.5 to a loss of 2 on average: 25 % of it (step 8)']
    """
    last = _last_values(history)
    lines = _added(last, steps)
    stem = "condensation/effective_ratio/"
    ratios = {
        tag.removeprefix(stem): x for tag, x in last.items() if tag.startswith(stem)
    }
    if ratios:
        name = min(ratios, key=lambda layer: ratios[layer].value)
        said = "no layer is condensed: each neuron has a direction of its own"
        if (least := ratios[name]).value < 1:
            said = f"most condensed is {name or 'the model itself'}: directions over "
            said += f"neurons, the effective ratio, are {least.value:.2g}"
        lines.append(said + (f" (step {least.step})" if steps else ""))
    return lines


def _added(last: Mapping[str, _Last], steps: bool) -> list[str]:
    """What dropout adds to the loss, where both are of one step."""
    r1, loss = last.get("regularizer/R1"), last.get("loss/R_S")
    if r1 is None or loss is None or r1.step != loss.step:
        return []
    error = f" +- {r1.error}" if r1.error and float(r1.error) else ""
    said = (
        f"dropout adds {r1.value:.3g}{error} to a loss of {loss.value:.3g} on average"
    )
    if error and abs(r1.value) < 2 * float(r1.error):
        said += ": less than twice its error, it may be nothing"
    elif loss.value > 0:
        said += f": {100 * r1.value / loss.value:.3g} % of it"
    return [said + (f" (step {r1.step})" if steps else "")]


def _by_name(title: str, found: Mapping[str, _Last], steps: bool) -> list[str]:
    """A row a layer or site, a column a quantity; more rows where steps differ."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for tag, last in found.items():
        group, quantity, name = tag.split("/", 2)
        of_r1 = group == "regularizer"
        column = "part of R_1" if of_r1 else quantity.replace("_", " ")
        error = f" +- {last.error}" if last.error else ""
        rows.setdefault((name, last.step), {})[column] = f"{last.value:.4g}{error}"
    columns = list(dict.fromkeys(c for cells in rows.values() for c in cells))
    names = list(dict.fromkeys(name for name, _ in rows))
    table = [[title, *columns, "at step"]]
    for name, step in sorted(rows, key=lambda row: names.index(row[0])):
        cells = (rows[name, step].get(c, "") for c in columns)
        table.append([name or "(the model itself)", *cells, str(step)])
    return _aligned(table, steps)


def _aligned(table: list[list[str]], steps: bool) -> list[str]:
    """Lines of a table with a title row; its last column are the steps."""
    if len(table) == 1:
        return []
    kept = [row if steps else row[:-1] for row in table]
    kept = [kept[0], *([f"  {name}", *cells] for name, *cells in kept[1:])]
    first, *rest = (max(map(len, column)) for column in zip(*kept, strict=True))
    lines = [""]
    for name, *cells in kept:
        padded = (f"{x:>{width}}" for x, width in zip(cells, rest, strict=True))
        lines.append("  ".join((f"{name:<{first}}", *padded)).rstrip())
    return lines


def section(title: str, lines: Mapping[str, str]) -> list[str]:
    """Return sentences under a title, each once, with the names that it is said of."""
    if not lines:
        return []
    named: dict[str, list[str]] = {}
    for name, said in sorted(lines.items()):
        named.setdefault(said, []).append(name)
    return ["", title, *(f"  {_together(names)}: {x}" for x, names in named.items())]


def _together(names: list[str]) -> str:
    """Name tags that have the same said of them, shortly where they are many."""
    if len(names) < 4:
        return ", ".join(names)
    groups = {name.partition("/")[0] for name in names}
    if len(groups) > 1:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1} more of {groups.pop()}"
