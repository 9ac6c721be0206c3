"""Where a measure's pass is not the script's own, that is said; nothing is moved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from tests import traces
from torch_dropout_ir.analysis.measures import (
    Masks,
    Regularizer,
)


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def batch():
    return torch.randn(6, 4), torch.randint(3, (6,))


def watched(model):
    return tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer(), Masks()]
    )


class Alternates(nn.Module):
    """Another branch at every second call, with as many random numbers."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.calls = mlp(), mlp(), 0

    def forward(self, x):
        self.calls += 1
        return (self.one if self.calls % 2 else self.other)(x)


class OneDraws(Alternates):
    def forward(self, x):
        self.calls += 1
        return self.one(x) if self.calls % 2 else self.other[0](x)[:, :3]


class CarriesOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.drop = nn.GRUCell(4, 8), nn.Dropout(0.2)
        self.head, self.state = nn.Linear(8, 3), None

    def forward(self, x):
        self.state = self.cell(x, None if self.state is None else self.state.detach())
        return self.head(self.drop(self.state))


@pytest.mark.parametrize(
    ("make", "said"),
    [(Alternates, True), (OneDraws, True), (CarriesOn, True), (mlp, False)],
)
def test_a_model_that_does_something_else_when_it_runs_again_is_said(make, said):
    model = make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        for _ in range(2):
            x, y = batch()
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            assert "loss/R_S" in analysis.latest
            assert ("did something else" in analysis.notes["loss/R_S"]) is said


def test_outputs_that_the_script_writes_on_are_not_compared():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        x, y = batch()
        outputs = model(x)
        F.cross_entropy(outputs, y).backward()
        outputs.detach().mul_(3)
        sgd.step()
    assert analysis.latest["loss/R_S"] > 0 and not analysis.notes["loss/R_S"]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return {"scores": self.net(x), "count": len(x)}


def test_outputs_in_whose_place_the_script_puts_others_are_not_compared():
    model = Named()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        x, y = batch()
        outputs = model(x)
        outputs["scores"] = 3 * outputs["scores"]
        F.cross_entropy(outputs["scores"], y).backward()
        sgd.step()
    assert analysis.latest["loss/R_S"] > 0 and not analysis.notes["loss/R_S"]


@pytest.mark.parametrize("back", [True, False])
def test_parameters_that_have_moved_since_the_pass_are_said(back):
    """Of sharpness-aware minimization the second pass is made elsewhere."""
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * p.grad
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if back:
            for p, was in zip(model.parameters(), before, strict=True):
                p.data = was
        clean = F.cross_entropy(nn.Sequential(*model[:2], model[3])(x), y)
        sgd.step()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(clean.detach()))
    assert ("were written on" in analysis.notes["loss/R_S"]) is back


def test_a_change_of_mode_since_the_pass_is_said():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis, pytest.warns(UserWarning, match="not observed"):
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
        model.eval()
        sgd.step()
    assert "to evaluation mode" in analysis.notes["loss/R_S"]


def test_parameters_of_another_model_are_said():
    """Of meta-learning the query batch is seen, not what the inner steps have made."""
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        own = dict(model.named_parameters())
        x, y = batch()
        slopes = torch.func.grad(
            lambda at: F.cross_entropy(torch.func.functional_call(model, at, (x,)), y)
        )(own)
        adapted = {n: p - 0.5 * slopes[n] for n, p in own.items()}
        outputs = torch.func.functional_call(model, adapted, (x,))
        F.cross_entropy(outputs, y).backward()
        clean = F.cross_entropy(nn.Sequential(*model[:2], model[3])(x), y)
        sgd.step()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(clean.detach()))
    assert "other parameters than the model's own" in analysis.notes["loss/R_S"]


def test_of_several_passes_the_last_is_meant_and_said():
    """A discriminator sees real and generated data, each with a loss of its own."""
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        for count in (1, 3, 1):
            for _ in range(count):
                x, y = batch()
                F.cross_entropy(model(x), y).backward()
            clean = F.cross_entropy(nn.Sequential(*model[:2], model[3])(x), y)
            sgd.step()
            said = analysis.notes["loss/R_S"]
            assert said == (
                "of the last of 3 passes that went backward since the optimizer "
                "stepped before" if count > 1 else ""
            )  # fmt: skip
            found = analysis.latest["loss/R_S"]
            assert found == pytest.approx(float(clean.detach()))


def test_a_hook_that_changes_the_inputs_acts_once_in_measures():
    model = mlp()
    model.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
        clean = F.cross_entropy(nn.Sequential(*model[:2], model[3])(3 * x), y)
        sgd.step()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(clean.detach()))


class Plain(torch.optim.Optimizer):
    """Gradient descent that is compiled quickly."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self):
        with torch.no_grad():
            for group in self.param_groups:
                for x in group["params"]:
                    x.sub_(group["lr"] * x.grad)


def test_a_compiled_step_of_the_optimizer_is_left_alone():
    def trained(attach):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, graphs = mlp(), []

        def backend(graph, _):
            graphs.append(len(graph.graph.nodes))
            return graph.forward

        sgd = Plain(model.parameters(), lr=0.1)
        step = torch.compile(sgd.step, backend=backend)
        analysis = watched(model) if attach else None
        for _ in range(2):
            sgd.zero_grad()
            x, y = batch()
            F.cross_entropy(model(x), y).backward()
            if analysis is not None:
                assert "loss/R_S" in analysis.measure()
            step()
        if analysis is not None:
            analysis.detach()
        return (traces.left_behind(model, sgd), graphs), analysis

    expected, _ = trained(False)
    seen, analysis = trained(True)
    assert seen == expected and expected[1]
    assert "in eager code" in analysis.absent["optimizer steps"]


class Stacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, rows):
        return self.net(torch.stack(list(rows)))


def test_a_generator_that_the_pass_has_used_up_is_said():
    model = Stacks()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        x, y = batch()
        F.cross_entropy(model(row for row in x), y).backward()
        sgd.step()
    assert "used up its inputs" in analysis.absent["regularizer"]
    assert not analysis.notes.get("masks")


class Encodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def encode(self, x):
        return self.net(x)


def test_a_method_of_another_name_is_told_and_its_part_can_be_watched():
    model = Encodes()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for part, seen in ((model, False), (model.net, True)):
        with watched(part) as analysis:
            x, y = batch()
            F.cross_entropy(model.encode(x), y).backward()
            sgd.step()
        assert bool(analysis.absent) != seen
        assert ("regularizer/R1" in analysis.latest) == seen
        if not seen:
            assert "attach to the part of the model" in analysis.absent["regularizer"]


def test_dropout_that_is_not_measured_is_not_said_to_be_none():
    model = nn.Sequential(nn.Linear(4, 8), nn.AlphaDropout(0.2), nn.Linear(8, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model) as analysis:
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
    assert "`analysis.sites` lists what is not" in analysis.absent["regularizer/R1"]
    found = {site.name: site.reason for site in analysis.sites}
    assert "1" in found and all(found.values())


class Trainer(nn.Module):
    """A model whose call is a step of training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def forward(self, x):
        self.optimizer.zero_grad()
        loss = self.net(x).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@pytest.mark.parametrize("part", [False, True])
def test_a_call_that_is_a_step_of_training_is_not_made_again(part):
    def trained(attach):
        torch.manual_seed(0)
        model, found = Trainer(), None
        if attach:
            options = {} if part else {"data": [(torch.ones(4, 6),) * 2], "loss": "mse"}
            watched = model.net if part else model
            found = tdi.attach_analysis(watched, log_dir=False, every=1, **options)
        for _ in range(3):
            model(torch.randn(8, 6))
        if found is not None:
            found.measure()
            found.detach()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), found

    (bare, _), (watched, analysis) = trained(False), trained(True)
    assert torch.equal(bare, watched)
    assert analysis.step == 3 and analysis.latest["regularizer/R2"] > 0
    assert ("regularizer/R1" in analysis.latest) is part
    assert part or "inside the model's own call" in analysis.absent["regularizer"]


def test_a_call_that_goes_back_itself_leaves_the_gradients():
    class Back(Trainer):
        def forward(self, x):
            self.optimizer.zero_grad()
            loss = self.net(x).square().mean()
            if torch.is_grad_enabled():
                loss.backward()
            return loss.detach()

    def trained(attach):
        torch.manual_seed(0)
        model, analysis = Back(), None
        data = [(torch.ones(4, 6),) * 2]
        if attach:
            analysis = tdi.attach_analysis(model, "mse", log_dir=False, data=data)
        for _ in range(2):
            model(torch.randn(8, 6))
            model.optimizer.step()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.optimizer.zero_grad()
        if analysis is not None:
            analysis.measure()
        assert all(p.grad is None for p in model.parameters())
        return found, analysis

    (bare, _), (watched, analysis) = trained(False), trained(True)
    assert torch.equal(bare, watched)
    assert analysis.latest["regularizer/R2"] > 0
