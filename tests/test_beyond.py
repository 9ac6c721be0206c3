"""The studies beyond the paper: what their scripts write by hand."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi

TUTORIALS = Path(__file__).parents[1] / "tutorials"
BEYOND = TUTORIALS / "beyond"


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("torchvision", reason="the studies take networks from it")
    pytest.importorskip("scipy", reason="the studies take rank correlations from it")
    monkeypatch.syspath_prepend(str(TUTORIALS / "paper"))
    monkeypatch.syspath_prepend(str(BEYOND))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        path = Path(getattr(sys.modules[name], "__file__", None) or "/")
        if TUTORIALS in path.parents:
            del sys.modules[name]


def test_what_p_explains_does_not_count_among_models_of_one_p(script):
    study = script("study")
    drops = (0.0, 0.0, 0.2, 0.2)
    values, gaps = (4.0, 3.0, 2.0, 1.0), (3.0, 4.0, 1.0, 2.0)
    rows = [
        {"R1": r1, "train_loss": -r1, "gap": gap}
        for r1, gap in zip(values, gaps, strict=True)
    ]
    for name in ("R1", "train_loss"):  # a smaller loss is to mean a larger gap
        assert math.isclose(study.correlation(rows, name), 1 - 6 * 4 / (4 * 15))
        assert study.agreement(rows, drops, name) == 0
        assert study.agreement(rows, (0, 1, 0, 1), name) == 1
        assert study.agreement(rows, (0, 0, 0, 0), name) == 4 / 6


def test_condensation_is_1_for_random_orientations_of_any_width(script):
    study = script("study")
    torch.manual_seed(0)
    for width in (30, 100):
        layer = nn.Linear(width, 4 * width)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        model = nn.Sequential(nn.Linear(width, width), layer, nn.Linear(4 * width, 2))
        assert abs(study.condensation(model) - 1) < 0.05
        with torch.no_grad():
            layer.weight[1:], layer.bias[1:] = layer.weight[:1], layer.bias[:1]
        assert math.isclose(study.condensation(model), width + 1, rel_tol=1e-4)


def test_a_letter_is_predicted_from_those_before_it(script):
    transformer = script("transformer")
    first, other, letters = transformer.text(500)
    assert len(first) == len(other) == 500 and not torch.equal(first, other)
    assert int(max(first.max(), other.max())) < letters
    x, y = transformer.windows(first, torch.tensor([0, 100]))
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y[1], first[101:165])
    torch.manual_seed(0)
    model = transformer.Model(letters, 8, 0.5).eval()
    changed = x.clone()
    changed[:, 40:] = (x[:, 40:] + 1) % letters
    before, after = model(x), model(changed)
    assert before.shape == (2, letters, 64)
    torch.testing.assert_close(before[..., :40], after[..., :40])
    assert bool((before[..., 40:] != after[..., 40:]).any(1).all())


def test_all_models_are_measured_at_one_p_and_left_with_dropout_off(script):
    study, transformer = script("study"), script("transformer")
    first, other, letters = transformer.text(300)
    train, test = (
        transformer.windows(codes, torch.arange(0, 200, 50)) for codes in (first, other)
    )
    found = []
    for p in (0.0, 0.5):
        torch.manual_seed(0)
        model = transformer.Model(letters, 8, p)
        torch.manual_seed(1)
        found.append(study.measure(model, train, test, train, masks=8, products=2))
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {study.P}
    assert found[0] == found[1]
    row = found[0]
    by_site = tdi.regularizers.gauss_newton(model, train, "cross_entropy").per_site
    assert len(by_site) == 1 + 3 * transformer.BLOCKS  # with attention's
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y) for x, y in (train, test)]
    assert math.isclose(row["gap"], losses[1] - losses[0], abs_tol=1e-6)
    squares = sum(float(p.detach().square().sum()) for p in model.parameters())
    assert math.isclose(row["norm"], squares**0.5, rel_tol=1e-5)
    assert row["R1"] > 0 and row["R2"] > 0


def test_stochastic_depth_is_a_site_of_the_convolutional_network(script):
    convnet, study = script("convnet"), script("study")
    torch.manual_seed(0)
    model = convnet.build(8, 0.3)
    rates = [m.p for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    assert rates == sorted(rates) and rates[-1] == 0.3  # it grows with depth
    batch = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    measured = study.measure(model, batch, batch, batch, masks=80, products=2)
    assert measured["R1"] > 5 * measured["R1_standard_error"] > 0
    assert measured["gap"] == 0
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("StochasticDepth") == 4 and kinds.count("Dropout") == 1
    assert {m.p for m in model.modules() if hasattr(m, "p")} == {study.P}


def test_the_page_is_made_of_the_records(script, tmp_path):
    study = script("study")
    shutil.copytree(BEYOND / "results", tmp_path / "results")
    study.write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == (BEYOND / "README.md").read_text()
    path = tmp_path / "results" / "transformer.json"
    record = json.loads(path.read_text())
    record["numbers"]["predictors"]["R1"]["correlation"] = [0.12, 0.34, 0.56]
    for model in record["numbers"]["models"].values():
        model["test_loss"] = [4 * r1 for r1 in model["R1"]]
        model["train_loss"] = [-r1 for r1 in model["R1"]]
    record["claims"][3]["values"] = [0.7, 0.8, 0.9]
    path.write_text(json.dumps(record))
    study.write_page(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| R_1 | 0.34 [0.12, 0.56] | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in page
    lines = [x for x in page.splitlines() if x.startswith("| training loss")]
    assert lines[1].endswith("| 1.00 [1.00, 1.00] |")  # less of it, more test loss
    values = zip(*(m["R1"] for m in record["numbers"]["models"].values()), strict=True)
    most = max(max(r1) - min(r1) for r1 in values)
    assert f"up to {most:.2f} apart, the test losses up to {4 * most:.2f}." in page
    assert "0.80 [0.70, 0.90] with the test loss" in " ".join(page.split())


def test_what_unrelated_models_correlate_is_as_the_page_says():
    ranks = torch.stack([torch.randperm(9) for _ in range(20_000)])
    correlation = 1 - (ranks - torch.arange(9)).square().sum(1) / 120
    assert abs((correlation.abs() > 0.699).float().mean() - 0.04) < 0.01


@pytest.mark.parametrize("name", ["convnet", "transformer"])
def test_the_answers_of_a_record_are_those_of_its_numbers(script, name):
    study = script("study")
    record = json.loads((BEYOND / "results" / f"{name}.json").read_text())
    models = list(record["numbers"]["models"].values())
    claims = study.claims_of(record["numbers"]["predictors"], models)
    assert [c.text for c in claims] == [c["text"] for c in record["claims"]]
    for claim, kept in zip(claims, record["claims"], strict=True):
        assert (list(claim.values), claim.verdict) == (kept["values"], kept["verdict"])
    # What the page says in short of both studies.
    answers = ["reproduced", "reproduced", "not reproduced", "not reproduced"]
    assert [c.verdict for c in claims] == answers
    r1, losses = ([m[key][0] for m in models] for key in ("R1", "test_loss"))
    ranks = [torch.tensor(one).argsort().argsort() for one in (r1, losses)]
    expected = torch.corrcoef(torch.stack(ranks).double())[0, 1]
    assert math.isclose(claims[3].values[0], expected, abs_tol=1e-9)
