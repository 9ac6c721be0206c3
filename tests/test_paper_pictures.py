"""The paper's pictures name their axes, and cells lie where their numbers do."""

import pytest
import torch
from matplotlib.figure import Figure


@pytest.fixture
def panels(monkeypatch):
    """The panels that a script draws, colour bars last."""

    def drawn(draw, *about):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda own, _: figures.append(own))
        draw(*about, "unused.png")
        return figures[0].axes

    return drawn


def test_fig_1_names_its_axes_and_the_units_of_the_loss(script, panels):
    fig01 = script("fig01_flat_between_points")
    one = torch.zeros(len(fig01.LINE)), torch.rand(10, len(fig01.ALPHAS))
    numbers = {arm: {"farthest_from_line": 0.5} for arm in fig01.ARMS}
    left, middle, right = panels(fig01.draw, numbers, dict.fromkeys(fig01.ARMS, one))
    assert left.get_ylabel() == "output"
    assert left.get_ylim() == middle.get_ylim()
    assert "units of the loss" in right.get_ylabel()
    assert all(panel.get_xlabel() for panel in (left, middle, right))


def test_cells_of_fig_8_lie_where_their_numbers_do(script, panels):
    fig08 = script("fig08_samples_needed")
    errors = torch.rand(3, len(fig08.SAMPLES), len(fig08.KEEP)) + 0.1
    left, right, bar = panels(fig08.draw, fig08.SAMPLES, errors)
    assert fig08.ERROR in bar.get_ylabel() and fig08.ERROR == right.get_ylabel()
    (cells,) = left.collections
    held = torch.tensor(cells.get_array()).view(len(fig08.KEEP), len(fig08.SAMPLES))
    corners = torch.tensor(cells.get_coordinates())
    for row, keep in enumerate(fig08.KEEP):
        for column, count in enumerate(fig08.SAMPLES):
            ends = corners[row : row + 2, column : column + 2].reshape(4, 2)
            (x0, y0), (x1, y1) = ends.amin(0).tolist(), ends.amax(0).tolist()
            assert x0 < count < x1 and y0 < keep < y1
            mean = errors[:, column, row].log10().mean()
            torch.testing.assert_close(held[row, column], mean)
