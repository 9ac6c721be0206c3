"""The loss of a script, followed from the outputs to `backward()`."""

import collections
import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import torch_dropout_ir as tdi
from tests import traces
from torch_dropout_ir.analysis.accumulation import Accumulation
from torch_dropout_ir.analysis.followed_loss import FollowedLoss
from torch_dropout_ir.analysis.loss_calls import LossCalls
from torch_dropout_ir.analysis.measures import Regularizer
from torch_dropout_ir.analysis.measures.regularizer import terms
from torch_dropout_ir.analysis.script_loss import ScriptLoss

X, Y = torch.linspace(-1, 1, 48).view(8, 6).sin(), torch.linspace(0, 2, 24).view(8, 3)
LABELS, WORDS = torch.arange(8) % 3, torch.arange(20).view(4, 5) % 7


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))


class Pair(nn.Module):
    """A model with two outputs, or with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, y=None):
        out = self.net(x)
        return {"extra": out.mean(), "logits": out, "loss": y and F.mse_loss(out, y[0])}


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.drop = nn.Embedding(7, 6), nn.Dropout(0.2)
        self.head = nn.Linear(6, 7)

    def forward(self, words):
        return self.head(self.drop(self.table(words)))


def next_word(model):
    out = model(WORDS)
    count, length, words = out.shape
    flat = out[:, :-1].reshape(count * (length - 1), words)
    return F.cross_entropy(flat, WORDS[:, 1:].reshape(-1), ignore_index=3)


def summed(model):
    out = model(X)
    return F.cross_entropy(out, LABELS) + 0.1 * nn.MSELoss()(out, Y)


def weighted(model):
    """Weights of the outputs, that are not differentiated."""
    each = F.cross_entropy(out := model(X), LABELS, reduction="none")
    with torch.no_grad():
        weights = 1 - out.softmax(1).max(1).values
    return (weights * each).mean()


def written(model):
    """A loss that is put together by writing on it, as scripts add terms up."""
    loss = F.cross_entropy(out := model(X), LABELS)
    loss += 0.1 * F.mse_loss(out, Y)
    loss *= 3
    total = torch.full((), 0.5)
    total += loss
    return total


def filled(model):
    """Terms by sample that are written on, as label smoothing does for padding."""
    logs = model(X).log_softmax(1)
    own, each = -logs.gather(1, LABELS[:, None]), -logs
    own.masked_fill_(LABELS[:, None] == 1, 0.0)
    each *= torch.linspace(0, 1, 8)[:, None]
    return own.sum() / 5 + each.mean()


def contrasted(model):
    """Pairs among a batch, none with itself."""
    out = F.normalize(model(X), dim=1)
    alike = out @ out.T
    alike.fill_diagonal_(-1e9)
    return F.cross_entropy(alike, torch.arange(8) ^ 1)


def forbidden(model):
    """Actions that are not allowed, as policies leave them out."""
    out = model(X)
    out[LABELS == 1, 2] = -1e8
    return nn.CrossEntropyLoss()(out, LABELS % 2)


def compared(model):
    """Three passes, one of them of fewer rows."""
    near, far = model(X), model(-X[:4])
    loss = F.mse_loss(near, far.repeat(2, 1)) + F.cross_entropy(near, LABELS)
    return loss + model(2 * X).softmax(1).square().sum()


def consistent(model):
    """Two passes on one batch, which a script lets agree."""
    one, two = model(X), model(X)
    loss = F.cross_entropy(one, LABELS) + nn.CrossEntropyLoss()(two, LABELS)
    return loss + F.kl_div(one.log_softmax(1), two.softmax(1), reduction="batchmean")


HEAD = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
NORM = nn.InstanceNorm1d(3, track_running_stats=True)

SCRIPTS = {
    "function": (mlp, lambda m: F.cross_entropy(m(X), LABELS), "cross_entropy"),
    "options": (
        mlp,
        lambda m: F.cross_entropy(
            m(X), LABELS, weight=torch.tensor([1.0, 2, 3]), label_smoothing=0.1
        ),
        "cross_entropy",
    ),
    "keywords": (mlp, lambda m: F.mse_loss(input=m(X), target=Y), "squared"),
    "sum": (mlp, lambda m: F.mse_loss(m(X), Y, reduction="sum"), "squared"),
    "paper's": (mlp, lambda m: tdi.half_squared_error(m(X), Y), "squared"),
    "two steps": (mlp, lambda m: F.nll_loss(m(X).log_softmax(1), LABELS), "general"),
    "by hand": (mlp, lambda m: ((m(X) - Y) ** 2).sum() / len(X), "general"),
    "half": (mlp, lambda m: 0.5 * F.mse_loss(m(X), Y), "general"),
    "several": (mlp, lambda m: (m(X).max(1).values - Y.mean()).abs().mean(), "general"),
    "masked": (mlp, lambda m: F.l1_loss(m(X)[LABELS > 0], Y[LABELS > 0]), "general"),
    "weighted": (mlp, weighted, "general"),
    "added": (mlp, summed, "general"),
    "written": (mlp, written, "general"),
    "filled": (mlp, filled, "general"),
    "three passes": (mlp, compared, "general"),
    "two passes": (mlp, consistent, "general"),
    "passes of structures": (
        Pair,
        lambda m: F.mse_loss(m(X)["logits"], m(-X)["logits"]),
        "general",
    ),
    "the first of two": (mlp, lambda m: (F.mse_loss(m(X), Y), m(-X))[0], "squared"),
    "contrasted": (mlp, contrasted, "general"),
    "forbidden": (mlp, forbidden, "general"),
    "outputs, written": (mlp, lambda m: m(X).sub_(Y).square().mean(), "general"),
    "in place": (mlp, lambda m: F.relu(m(X), inplace=True).square().mean(), "general"),
    "model's, written": (Pair, lambda m: m(X, y=[Y])["loss"].mul_(2), "general"),
    "module": (mlp, lambda m: nn.MSELoss()(m(X), Y), "squared"),
    "structure": (Pair, lambda m: F.mse_loss(m(X)["logits"], Y), "general"),
    "model's own": (Pair, lambda m: m(X, y=[Y])["loss"], "general"),
    "language": (Language, next_word, "general"),
    "a head": (mlp, lambda m: F.cross_entropy(HEAD(m(X)), LABELS), "general"),
    "statistics": (mlp, lambda m: F.mse_loss(NORM(m(X).T[None])[0].T, Y), "general"),
    "another net": (mlp, lambda m: F.mse_loss(m(X), HEAD[1:](Y)[:, :3]), "general"),
}


def measured(model, script, **options):
    """One step with the analysis, and what the loss is with dropout off."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    measures = [Regularizer(num_masks=64)]
    options = {"log_dir": False, "every": 1, "measures": measures, **options}
    with tdi.attach_analysis(model, **options) as analysis:
        script(model).backward()
        optimizer.step()
    assert torch._C._len_torch_function_stack() == 0
    with torch.no_grad():
        clean = script(model.eval())
    model.train()
    return analysis, float(clean)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_loss_is_what_the_script_computes(name):
    make, script, kind = SCRIPTS[name]
    model = make()
    analysis, clean = measured(model, script)
    assert set(analysis.absent) - {traces.PARTS} == set()
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert analysis.loss.kind == kind
    with torch.no_grad():
        excess = torch.stack([script(model) for _ in range(1000)]) - clean
    own = analysis.latest["regularizer/R1_standard_error"]
    error = math.hypot(float(excess.std()) / 1000**0.5, own)
    assert abs(analysis.latest["regularizer/R1"] - float(excess.mean())) < 4.5 * error


def test_a_single_site_has_its_part_where_the_model_returns_its_loss():
    model = Pair().double()
    x, y = X.double(), Y.double()
    analysis, _ = measured(model, lambda m: m(x, y=[y])["loss"])
    site = model.net[2], model.net[3].weight
    with torch.no_grad():
        exact = tdi.regularizers.last_layer(model.net[:2](x), site[1], site[0].p)
    part = analysis.latest["regularizer/R1/net.2"]
    error = analysis.latest["regularizer/R1_standard_error/net.2"]
    assert abs(part - float(exact)) < 4 * error < 2 * float(exact)


class Named(dict):
    """Keys as attributes, by looking them up."""

    __getattr__ = dict.__getitem__


class Same(dict):
    """Keys that are the attributes."""

    def __init__(self, **found):
        super().__init__(**found)
        self.__dict__ = self


class Ordered(collections.OrderedDict):
    """Keys in an order, and an attribute that is told to the constructor alone."""

    def __init__(self, **found):
        super().__init__(**found)
        self.count = len(found)

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize("kind", [Named, Same, Ordered])
@pytest.mark.parametrize("own", [False, True])
def test_a_model_may_return_a_dictionary_of_a_class_of_its_own(kind, own):
    class Told(Pair):
        def forward(self, x, y=None):
            return kind(**super().forward(x, y))

    model = Told().double()
    x, y = X.double(), Y.double()

    def loss(m):
        return m(x, y=[y]).loss if own else F.mse_loss(m(x).logits, y)

    analysis, _ = measured(model, loss)
    with torch.no_grad():
        expected = F.mse_loss(model.eval().net(x), y)
    assert analysis.latest["loss/R_S"] == pytest.approx(float(expected))
    assert {"regularizer/R1", "regularizer/R1/net.2"} <= set(analysis.latest)


def test_what_a_script_does_not_differentiate_is_not():
    out, model = torch.randn(8, 3), mlp()
    seen = ScriptLoss()
    seen.follow(model, Accumulation(), noisy := model(X), None, [])
    try:
        weighted(lambda _: noisy).backward()
    finally:
        seen.leave()
    loss, targets = seen.found()[:2]
    found, expected = (out.clone().requires_grad_() for _ in range(2))
    loss(found, targets).backward()
    weighted(lambda _: expected).backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("name", ["a head", "statistics"])
def test_what_the_script_has_behind_the_model_is_left_as_it_is(name):
    """The loss is run again, and normalization would count those runs."""
    make, script, _ = SCRIPTS[name]
    found = []
    for on in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
            for norm in (HEAD[0], NORM):
                norm.reset_running_stats()
            optimizer = torch.optim.SGD([*model.parameters(), *HEAD.parameters()], 0.0)
            with contextlib.ExitStack() as stack:
                if on:
                    stack.enter_context(
                        tdi.attach_analysis(model, log_dir=False, every=1)
                    )
                for _ in range(2):
                    script(model).backward()
                    optimizer.step()
        found.append([x.clone() for norm in (HEAD[0], NORM) for x in norm.buffers()])
        HEAD.zero_grad()
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["function", "by hand", "added", "model's own"])
def test_training_is_as_without(name):
    make, script, _ = SCRIPTS[name]
    analysis = traces.compared(make, script)
    assert set(analysis.absent) <= {traces.PARTS}
    assert {"sharpness/trace", "regularizer/R2_dropout_noise"} <= set(analysis.latest)


def test_ranks_weigh_what_the_loss_counts():
    analysis, _ = measured(Language(), next_word)
    targets = WORDS[:, 1:].reshape(-1)
    counted = terms(analysis.loss, (WORDS, targets))
    assert counted == int((targets != 3).sum()) < targets.numel()
    analysis, _ = measured(mlp(), SCRIPTS["sum"][1])
    assert analysis.loss.reduction == "sum"


def test_a_tensor_that_the_loss_is_weighted_by_is_a_part_of_it():
    """It looks as a gradient scaler's factor does."""
    weight = torch.tensor(3.0)
    analysis, clean = measured(mlp(), lambda m: F.mse_loss(m(X), Y) * weight)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)


@pytest.mark.parametrize("at_once", [True, False])
def test_gradients_that_the_script_asks_for_are_trained_on(at_once):
    """As of several tasks, whose gradients it puts together."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    own = list(model.parameters())

    def tasks():
        out = model(X)
        return F.cross_entropy(out, LABELS), 0.3 * F.mse_loss(out, Y)

    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        roots = [sum(tasks())] if at_once else tasks()
        asked = [torch.autograd.grad(x, own, retain_graph=True) for x in roots]
        for p, *slopes in zip(own, *asked, strict=True):
            p.grad = sum(slopes)
        optimizer.step()
    model.eval()
    clean = float(sum(tasks()).detach())
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert not analysis.notes["loss/R_S"]


def test_gradients_that_the_script_looks_at_are_not_trained_on():
    def balanced(model):
        out = model(X)
        both = F.cross_entropy(out, LABELS), F.mse_loss(out, Y)
        for x in both if out.requires_grad else ():
            torch.autograd.grad(x, model[0].weight, retain_graph=True)
        return both[0] + 2 * both[1]

    analysis, clean = measured(mlp(), balanced)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)


@pytest.mark.parametrize(
    "goes_back",
    [
        lambda out, judge: judge(out.detach()).square().mean().backward(),
        lambda out, judge: F.mse_loss(judge(Y), out[:, :1].detach()).backward(),
        lambda out, judge: judge(Y).square().mean().backward(),
        lambda out, judge: (
            judge(out)
            .square()
            .mean()
            .backward(None, True, inputs=[*judge.parameters()])
        ),
    ],
    ids=["detached", "target", "apart", "inputs"],
)
def test_by_what_another_model_learns_the_model_does_not(goes_back):
    """As by the loss of a discriminator, which steps before the generator goes back."""
    judge = nn.Linear(3, 1)
    sgd = torch.optim.SGD(judge.parameters(), lr=0.5)

    def script(model):
        out = model(X)
        if out.requires_grad:
            goes_back(out, judge)
            sgd.step()
        return F.mse_loss(judge(out), torch.ones(8, 1)) + 0.1 * out.abs().mean()

    analysis, clean = measured(mlp(), script)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert not analysis.notes["loss/R_S"]
    assert not {"regularizer", "regularizer/R1"} & set(analysis.absent)


@pytest.mark.parametrize("first", [-1.0, 0.25, 1.0])
@pytest.mark.parametrize("at_once", [True, False])
def test_the_number_that_a_derivative_begins_with_is_a_factor(first, at_once):
    """As -1, by which the critic of a Wasserstein GAN goes up."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        loss = F.mse_loss(model(X), Y)
        if at_once:
            torch.autograd.backward([loss], [torch.tensor(first)])
        else:
            loss.backward(torch.tensor(first))
        optimizer.step()
    clean = F.mse_loss(model.eval()(X), Y).item()
    assert analysis.latest["loss/R_S"] == pytest.approx(first * clean, rel=1e-5)
    assert analysis.latest["regularizer/R1"] * first > 0
    assert "exact" in analysis.notes["regularizer/R1"] or first < 0


def test_scalers_and_accumulation_are_no_part_of_it():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    analysis, clean = measured(mlp(), lambda m: scaler.scale(F.mse_loss(m(X), Y)))
    assert analysis.latest["loss/R_S"] == pytest.approx(clean / 1024, rel=1e-5)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for step in range(2):
            for part in (slice(4), slice(4, 8)):
                loss = ((model(X[part]) - Y[part]) ** 2).mean()
                (loss / 2).backward()
            with torch.no_grad():
                clean = F.mse_loss(model.eval()(X[4:]), Y[4:])
            model.train()
            optimizer.step()
            _, found = analysis.history["loss/R_S"][step]
            assert found == pytest.approx(float(clean), rel=1e-5)


@pytest.mark.parametrize("divided", [lambda x: x / 4, lambda x: x * 0.25 / 1])
def test_a_short_last_group_is_measured_by_its_loss(divided):
    """Ten batches in groups of four, which the script divides by four."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for count in (4, 4, 2, 4, 4, 1):
            for _ in range(count):
                divided(F.mse_loss(model(X), Y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    clean = F.mse_loss(model.eval()(X), Y).item()
    for tag in ("loss/R_S", "regularizer/R1"):
        found = [value for _, value in analysis.history[tag]]
        assert found == pytest.approx([found[0]] * 6, rel=1e-5)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)


@pytest.mark.parametrize("to_none", [True, False])
def test_passes_whose_gradients_are_let_go_of_are_not_accumulated(to_none):
    """As the one that tells how to change the inputs, in adversarial training."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        F.mse_loss(model(X), Y).backward()
        optimizer.zero_grad(set_to_none=to_none)
        (F.mse_loss(model(X + 0.1), Y) / 2).backward()
        half = F.mse_loss(model.eval()(X + 0.1), Y).item() / 2
        model.train()
        optimizer.step()
    assert analysis.latest["loss/R_S"] == pytest.approx(half, rel=1e-5)
    assert "passes" not in analysis.notes["loss/R_S"]


def test_passes_that_do_not_train_are_not_accumulated():
    """A batch that did not fit, and is taken in halves; one that is skipped."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for first in (X, torch.full_like(X, float("nan"))):
            F.mse_loss(model(first), Y)  # and no `backward()`
            for part in (slice(4), slice(4, 8)):
                (F.mse_loss(model(X[part]), Y[part]) / 2).backward()
            with torch.no_grad():
                clean = F.mse_loss(model.eval()(X[4:]), Y[4:])
            model.train()
            optimizer.step()
            found = analysis.latest["loss/R_S"]
            assert found == pytest.approx(float(clean), rel=1e-5)


@pytest.mark.parametrize("written", ["targets", "inputs"])
@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), lambda out, y: (out - y).abs().mean()]
)
def test_what_changes_in_place_before_the_step_is_not_measured(criterion, written):
    model = mlp()
    model.forward = lambda batch: nn.Sequential.forward(model, batch["x"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        x, y = X.clone(), Y.clone()
        criterion(model({"x": x}), y).backward()
        (y if written == "targets" else x).zero_()
        optimizer.step()
    assert "in place" in analysis.absent["regularizer"]
    assert "loss/R_S" not in analysis.latest


def spoiled(model):
    """A second term that is made by writing on a view."""
    out = model(X)
    alike = out.T @ out
    alike.diagonal().zero_()
    return F.mse_loss(out, Y) + alike.square().sum()


@pytest.mark.parametrize("criterion", [nn.MSELoss(), F.mse_loss])
def test_outputs_that_are_written_on_are_not_those_of_the_model(criterion):
    def script(model):
        out = model(X)
        out[:, 0] /= 2
        return criterion(out, Y)

    analysis, _ = measured(mlp(), script)
    assert "loss" in analysis.absent["regularizer"]
    assert "loss/R_S" not in analysis.latest


def test_a_term_that_is_written_on_makes_the_loss_known_in_part():
    analysis, _ = measured(mlp(), spoiled)
    assert "first loss function" in analysis.notes["loss/R_S"]


def test_a_loss_module_with_parameters_of_its_own_is_the_whole_loss():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.eye(3))

        def forward(self, out, labels):
            return F.cross_entropy(out @ self.rows, labels)

    criterion = Prototypes()
    analysis, clean = measured(mlp(), lambda model: criterion(model(X), LABELS))
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert not analysis.notes["loss/R_S"]
    norm = criterion.rows.norm()
    more, clean = measured(mlp(), lambda m: criterion(m(X), LABELS) + norm)
    assert more.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert not more.notes["loss/R_S"]


@pytest.mark.parametrize("how", ["attribute", "closure", "constant"])
def test_a_loss_module_that_reads_more_than_it_is_called_with_is_followed(how):
    held = {}

    class Reads(nn.Module):
        def forward(self, out, y):
            kept = vars(self)["kept"] if how == "attribute" else held["kept"]
            return F.mse_loss(out, y) + kept.square().mean()

    def script(criterion):
        def loss(model):
            out = model(X)
            kept = out[:, 0].detach() if how == "constant" else out[:, 0]
            if criterion is None:
                return F.mse_loss(out, Y) + kept.square().mean()
            held["kept"] = kept
            if how == "attribute":
                vars(criterion)["kept"] = kept
            return criterion(out, Y)

        return loss

    plain, clean = measured(model := mlp(), script(None))
    found, same = measured(model, script(Reads()))
    assert clean == same
    assert found.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    error = plain.latest["regularizer/R1_standard_error"]
    away = found.latest["regularizer/R1"] - plain.latest["regularizer/R1"]
    assert abs(away) < 5 * error < plain.latest["regularizer/R1"]


def test_a_loss_module_that_keeps_what_it_has_returned_is_followed():
    class Keeps(nn.Module):
        def forward(self, out, y):
            self.last = F.mse_loss(out, y)  # no copy of it can be made
            return self.last

    criterion = Keeps()
    analysis, clean = measured(mlp(), lambda model: criterion(model(X), Y))
    assert not analysis.absent
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)


def test_what_is_written_on_behind_the_back_of_autograd_is_not_followed():
    def script(model):
        each = (model(X) - Y).square()
        with torch.no_grad():
            each *= 2  # its gradient stays that of the half
        return each.mean()

    analysis, _ = measured(mlp(), script)
    assert "loss" in analysis.absent["regularizer"]


def test_metrics_that_are_written_on_are_no_part_of_the_loss():
    counts = torch.zeros(3, 3)

    def script(model):
        out = model(X)
        loss = F.cross_entropy(out, LABELS)
        counts[LABELS, out.argmax(1)] += 1
        chosen = out.detach().softmax(1)
        chosen[chosen < 0.5] = 0
        return loss

    analysis, clean = measured(mlp(), script)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert not analysis.notes["loss/R_S"]


def test_another_network_may_be_trained_before_the_loss_is_taken():
    """Clipping and optimizers write on lists of tensors."""
    other = mlp()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, foreach=True)

    def script(model):
        out = model(X)
        with torch.enable_grad():
            F.mse_loss(other(X), Y).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
        sgd.step()
        return F.mse_loss(out, Y)

    analysis, clean = measured(mlp(), script)
    assert not set(analysis.absent) - {traces.PARTS}
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def hidden(layer):
    """A graph from which its parameters cannot be reached."""
    given = torch.ones(8, 16, requires_grad=True)
    return checkpoint(layer, given, use_reentrant=True)


def blanked(outputs):
    outputs[:, 0].zero_()
    return F.cross_entropy(outputs, LABELS)


def logged(outputs):
    F.mse_loss(outputs.detach(), Y)
    return F.dropout(outputs, 0.5).square().mean()


ATTENTION = nn.MultiheadAttention(3, 1, dropout=0.5)
REFUSED = {
    "random": lambda m: F.dropout(m(X), 0.5).square().mean(),
    "random within": lambda m: F.gumbel_softmax(m(X))[:, 0].mean(),
    "attention": lambda m: ATTENTION(*[m(X)] * 3)[0].square().mean(),
    "beside a metric": lambda m: logged(m(X)),
    "writes by a view": lambda m: blanked(m(X)),
    "other ways": lambda m: (m(X) * m[0].weight.sum()).square().mean(),
    "a function of its own": lambda m: Doubled.apply(m(X)).square().mean(),
    "what hides its parameters": lambda m: (m(X) * hidden(m[3])).sum(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_said(name):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        REFUSED[name](model).backward()
        optimizer.step()
    assert "Pass `loss=`" in analysis.absent["regularizer"]
    assert "regularizer/R1" not in analysis.latest


def test_penalties_on_the_parameters_are_no_part_of_it():
    model = mlp()

    def script(model):
        decay = sum(p.square().sum() for p in model.parameters())
        return F.mse_loss(model(X), Y) + 0.1 * decay

    analysis, _ = measured(model, script)
    clean = F.mse_loss(model.eval()(X), Y).detach()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(clean), rel=1e-5)
    assert "penalties on parameters" in analysis.notes["loss/R_S"]


@pytest.mark.parametrize("kind", ["L1", "L3"])
def test_what_modified_losses_add_is_no_part_of_it(kind):
    model, modified = mlp(), tdi.regularizers.modified_loss

    def script(model):
        return modified(model, (X, Y), tdi.half_squared_error, kind=kind, lr=0.1)

    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        script(model).backward()
        sgd.step()
    with torch.no_grad():
        site = model[2], model[3].weight
        r1 = tdi.regularizers.last_layer(
            model[:2](X), site[1], site[0].p, loss=tdi.half_squared_error
        )
        clean = tdi.half_squared_error(model.eval()(X), Y)
    assert analysis.latest["loss/R_S"] == pytest.approx(float(clean), rel=1e-5)
    assert analysis.latest["regularizer/R1"] == pytest.approx(float(r1), rel=1e-5)
    assert "what `modified_loss` adds" in analysis.notes["loss/R_S"]


def test_a_penalty_on_the_gradient_in_the_inputs_is_no_part_of_it():
    """A derivative is in tensors of its own pass, and another pass has others."""

    def script(model):
        loss = F.cross_entropy(model(x := X.clone().requires_grad_()), LABELS)
        if not torch.is_grad_enabled():  # what R_S is held against
            return loss
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    analysis, clean = measured(mlp(), script)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert "regularizer/R1" in analysis.latest
    assert "not followed" in analysis.notes["loss/R_S"]


def test_a_loss_of_many_passes_is_said_to_be_known_in_part():
    def script(model):
        away = sum(F.mse_loss(model(k * X), Y) for k in range(8))
        return away + F.cross_entropy(model(X), LABELS)

    analysis, _ = measured(mlp(), script)
    assert "regularizer/R1" in analysis.latest
    assert "outputs of many passes" in analysis.notes["loss/R_S"]
    assert "outputs of many passes" in analysis.summary()


def test_a_pass_without_graph_is_a_constant_of_the_loss():
    aim = []

    def script(model):
        if model.training:
            with torch.no_grad():
                aim.append(model(-X).softmax(1))
        out = model(X)
        return F.mse_loss(out.softmax(1), aim[0]) + F.cross_entropy(out, LABELS)

    analysis, clean = measured(mlp(), script)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-6)


@pytest.mark.parametrize("at_once", [True, False])
def test_losses_of_passes_that_overlap_are_added_up(at_once):
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)

    def losses():
        one, two = model(X), model(-X)
        return [F.mse_loss(one, Y), 2 * F.cross_entropy(two, LABELS)]

    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer(num_masks=512)]
    ) as analysis:
        own = losses()
        for loss in [sum(own)] if at_once else own:
            loss.backward()
        sgd.step()
    with torch.no_grad():
        dropped = torch.tensor([float(sum(losses())) for _ in range(4000)])
        model.eval()
        clean = float(sum(losses()))
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-6)
    error = analysis.latest["regularizer/R1_standard_error"]
    error = math.hypot(error, float(dropped.std()) / 4000**0.5)
    away = analysis.latest["regularizer/R1"] - (float(dropped.mean()) - clean)
    assert abs(away) < 4 * error


def test_a_loss_that_was_given_keeps_its_meaning():
    """Its targets are what the script hands on beside the output itself."""
    twice = lambda outputs, targets: 2 * F.mse_loss(outputs, targets)  # noqa: E731
    analysis, clean = measured(mlp(), lambda m: F.mse_loss(m(X), Y), loss=twice)
    assert analysis.latest["loss/R_S"] == pytest.approx(2 * clean, rel=1e-5)
    data = X[:2], Y[:2]
    model = mlp()
    analysis, _ = measured(model, SCRIPTS["by hand"][1], loss=twice, data=data)
    clean = twice(model.eval()(data[0]), data[1]).detach()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(clean), rel=1e-5)


def found_again(model):
    with torch.no_grad():
        return float(F.mse_loss(model.eval()(X), Y))


def test_measured_by_hand_the_last_targets_count():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=10) as analysis:
        for _ in range(5):
            F.mse_loss(model(X), Y).backward()
            optimizer.step()
        found = analysis.measure()
        assert torch._C._len_torch_function_stack() == 0
    assert not analysis.absent
    assert found["loss/R_S"] == pytest.approx(found_again(model))
    seen = "batch of step 0, the last whose targets were seen"
    assert seen in analysis.notes["loss/modified"]
    assert analysis.notes["loss/R_S"] == f"of the {seen}"


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "around", [contextlib.nullcontext, Counting, lambda: torch.device("cpu")]
)
@pytest.mark.parametrize("default", [None, "cpu"])
def test_modes_of_the_script_stay_what_they_are(around, default):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.set_default_device(default)
    try:
        depth = torch._C._len_torch_function_stack()
        with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
            with around() as mode:
                out = model(X)  # entered around the pass, left before the loss
            assert torch._C._len_torch_function_stack() == depth + 1
            calls = mode.calls if isinstance(mode, Counting) else 0
            with around():
                loss = F.mse_loss(out, Y)
            loss.backward()
            optimizer.step()
            assert calls == (mode.calls if isinstance(mode, Counting) else 0)
            assert torch._C._len_torch_function_stack() == depth
    finally:
        torch.set_default_device(None)
    assert torch._C._len_torch_function_stack() == 0
    assert "regularizer/R1" in analysis.latest


def test_a_step_that_breaks_off_leaves_no_mode_behind():
    model = mlp()
    with tdi.attach_analysis(model, log_dir=False, every=1):
        with pytest.raises(ValueError, match="batch"):
            F.cross_entropy(model(X), LABELS[:2]).backward()
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_loss_runs_as_it_did(fullgraph):
    def train(attached):
        torch.manual_seed(1)
        torch.compiler.reset()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = torch.compile(
            lambda out, y: (out - y).square().mean() * 2,
            backend="aot_eager",
            fullgraph=fullgraph,
        )
        watch = contextlib.nullcontext()
        if attached:
            watch = tdi.attach_analysis(
                model, log_dir=False, every=2, measures=[Regularizer()]
            )
        with watch as analysis:
            for _ in range(3):
                optimizer.zero_grad()
                loss(model(X), Y).backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()], analysis

    bare, _ = train(False)
    watched, analysis = train(True)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    assert "Pass `loss=`" in analysis.absent["regularizer"]


def test_what_is_followed_lets_tensors_go():
    """Nothing of the script's pass is kept alive by looking on."""
    out = (model := mlp())(X)
    calls = LossCalls(out, Accumulation(), model)
    calls.enter()
    try:
        passing = out * 2
        assert calls.at(passing) is not None
        assert len(calls._known) == 2
        del passing
        assert len(calls._known) == 1
        F.mse_loss(out, Y).backward()
    finally:
        calls.leave()
    loss = FollowedLoss(calls.steps, calls.result, "loss", {}, [])
    assert calls.beside.targets[0] is Y
    calls = LossCalls(out := model(X), Accumulation(), model)
    calls.enter()
    try:
        F.mse_loss(out, HEAD(Y)).backward()
    finally:
        calls.leave()
    assert [x.grad_fn for x in calls.beside.constants] == [None]
    assert float(loss(torch.zeros(8, 3), Y)) == pytest.approx(float(Y.square().mean()))


def test_passes_of_which_only_predictions_are_kept_are_let_go_of():
    out = (model := mlp())(X)
    calls = LossCalls(out, Accumulation(), model)
    calls.enter()
    try:
        kept = out.argmax(1)
        assert calls.waits()
        del out
        assert calls.at(kept) is not None and not calls.waits()
    finally:
        calls.leave()


@pytest.mark.parametrize("known", [True, False])
def test_losses_that_are_differentiated_one_by_one_are_added_up(known):
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3))
    sgd, x, y = torch.optim.SGD(model.parameters(), lr=0.0), X, torch.randn(8, 3)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        outputs = model(x)
        F.mse_loss(outputs, y).backward(retain_graph=True)
        second = outputs.abs().mean() if known else Doubled.apply(outputs).mean()
        second.backward(None, True)
        (0.1 * outputs[:, 0].sum()).backward()
        sgd.step()
    assert torch._C._len_torch_function_stack() == 0
    if not known:  # a part of it would pass for the whole
        assert "loss is not known" in analysis.absent["regularizer"]
        return
    out = model.eval()(x).detach()
    whole = F.mse_loss(out, y) + out.abs().mean() + 0.1 * out[:, 0].sum()
    assert analysis.latest["loss/R_S"] == pytest.approx(float(whole), rel=1e-5)


def test_a_loss_module_may_take_more_than_targets():
    class Heard(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 6))

        def forward(self, x):
            return self.net(x).log_softmax(-1)

    model, criterion = Heard(), nn.CTCLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(12, 3, 5)
    rest = torch.randint(1, 6, (3, 4)), torch.full((3,), 12), torch.full((3,), 4)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        criterion(model(x), *rest).backward()
        sgd.step()
    clean = float(criterion(model.eval()(x), *rest).detach())
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert "regularizer/R1" in analysis.latest


def test_what_autocast_has_narrowed_is_read_in_the_parameters_precision():
    """The input comes of another model, and so does a key that the loss multiplies."""
    before, net, other = nn.Linear(6, 6), mlp(), nn.Linear(6, 3)
    optimizer = torch.optim.SGD([*before.parameters(), *net.parameters()], 0.1)
    measures = [Regularizer(num_masks=4)]
    with tdi.attach_analysis(net, log_dir=False, every=1, measures=measures) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            h, key = before(X), other(X)
            loss = F.cross_entropy(net(h) @ key.T, LABELS)
        loss.backward()
        clean = nn.Sequential(net[0], net[1], net[3])(h.float())
        expected = F.cross_entropy(clean @ key.float().T, LABELS)
        optimizer.step()
    assert h.dtype == key.dtype == torch.bfloat16
    assert seen.latest["loss/R_S"] == pytest.approx(expected.item(), rel=1e-6)
    assert not seen.absent


@pytest.mark.parametrize("criterion", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_a_loss_that_was_given_picks_among_several_outputs(criterion):
    twice = lambda outputs, y: 2 * F.cross_entropy(outputs["logits"], y)  # noqa: E731
    analysis, clean = measured(
        Pair(), lambda m: criterion(m(X)["logits"], LABELS), loss=twice
    )
    assert analysis.latest["loss/R_S"] == pytest.approx(2 * clean, rel=1e-5)


def by_its_outputs(model):
    """Times a tensor that is made of the outputs: no scaler's factor."""
    out = model(X)
    return F.mse_loss(out, Y) * out.detach().abs().mean()


def scaled(model):
    """Times a weight, and times the factor of a scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return scaler.scale(F.mse_loss(model(X), Y) * torch.tensor(3.0))


def as_long_as_it_says(model):
    """A length that is made of the outputs, in a slice."""
    out = model(X)
    length = (out > 0).sum() % 8 + 1
    return F.mse_loss(out[:length], Y[:length])


@pytest.mark.parametrize(
    ("script", "factor"), [(by_its_outputs, 1), (scaled, 1024), (as_long_as_it_says, 1)]
)
def test_of_factors_that_of_a_scaler_alone_is_taken_away(script, factor):
    torch.manual_seed(0)
    analysis, clean = measured(mlp(), script)
    assert analysis.latest["loss/R_S"] == pytest.approx(clean / factor, rel=1e-5)


def test_a_mean_over_passes_may_be_a_product():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        for _ in range(2):
            (F.mse_loss(model(X), Y) * 0.5).backward()
        sgd.step()
    clean = float(F.mse_loss(model.eval()(X), Y).detach())
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)


def test_a_loss_module_that_cannot_be_followed_is_still_the_whole_loss():
    class Twice(nn.Module):
        def forward(self, out, y):
            return Doubled.apply(F.mse_loss(out, y))

    criterion = Twice()
    analysis, clean = measured(mlp(), lambda model: criterion(model(X), Y))
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert not analysis.notes["loss/R_S"]


def test_a_way_back_that_is_not_seen_is_said():
    """As `torch.autograd.backward` of torch 2.10, which no mode sees."""
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        out = model(X)
        loss = F.mse_loss(out, Y) + out.abs().mean()
        with torch._C.DisableTorchFunction():
            loss.backward()
        sgd.step()
    assert "was not followed" in analysis.notes["loss/R_S"]


def test_passes_whose_loss_cannot_be_followed_are_counted():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        Doubled.apply(model(X)).mean().backward()
        F.mse_loss(model(X), Y).backward()
        sgd.step()
    assert "last of 2 passes" in analysis.notes["loss/R_S"]


def test_a_model_in_half_precision_is_given_what_autocast_has_made():
    model = mlp().bfloat16()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(X.bfloat16()), Y.bfloat16())
        loss.backward()
        sgd.step()
    assert not analysis.absent and analysis.latest["loss/R_S"] > 0


def test_where_the_whole_is_not_followed_the_first_loss_function_is_meant():
    def script(model):
        out = model(X)
        first, second = F.mse_loss(out, Y), F.cross_entropy(out, LABELS)
        return Doubled.apply(first + second)

    model = mlp()
    analysis, _ = measured(model, script)
    clean = float(F.mse_loss(model.eval()(X), Y).detach())
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert "first loss function" in analysis.notes["loss/R_S"]


def test_a_backward_pass_from_several_numbers_is_of_no_loss():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        each = (model(X) - Y).square()
        each.backward(torch.full_like(each, 1 / 24))
        sgd.step()
    assert "the loss is not known" in analysis.absent["regularizer"]


def by_view(out):
    out[:, 0] *= 2.0


def by_argument(out):
    with torch.no_grad():
        torch.mul(out, 2.0, out=out)


def by_list(out):
    torch._foreach_mul_([torch.ones(3), out], 2.0)


@pytest.mark.parametrize("write", [by_view, by_argument, by_list])
def test_outputs_are_not_the_models_where_writing_is_not_followed(write):
    def script(model):
        out = model(X)
        write(out)
        return F.mse_loss(out, Y)

    analysis, _ = measured(mlp(), script)
    assert "the loss is not known" in analysis.absent["regularizer"]


SQUARES = {
    "half a mean": lambda f: 0.5 * F.mse_loss(f, Y),
    "a mean": lambda f: ((f - Y) ** 2).mean(),
    "norms": lambda f: (Y - f).square().sum(1).mean(),
    "weights": lambda f: (X[:, :3].exp() * F.mse_loss(f, Y, reduction="none")).sum(),
    "one output": lambda f: (2 * f[:, 1] - Y[:, 0]).pow(2).mean() + f.mean(),
}
NO_SQUARES = {
    "weights of the outputs": lambda f: (f.detach().abs() * (f - Y) ** 2).mean(),
    "a constant of them": lambda f: F.mse_loss(f, Y) + f.detach().square().sum(),
    "hidden by a number": lambda f: (
        1e5 + f.square().mean() + f.detach().square().mean()
    ),
    "signs of the outputs": lambda f: torch.where(f > 0, (f - Y) ** 2, 0.0).mean(),
    "trimmed": lambda f: ((f - Y) ** 2).masked_fill(f.abs() > 9, 0.0).mean(),
    "norms": lambda f: (f - Y).square().sum(1).sqrt().mean(),
    "products": lambda f: (f.sum(1) - Y[:, 0]).square().mean(),
    "nearly": lambda f: (1e-3 * (f - Y)).sin().square().sum(),
    "of the size": lambda f: (f.abs() - Y).square().mean(),
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_formula_that_adds_squares_has_the_closed_form(name):
    torch.manual_seed(0)
    model = mlp().double()
    x, loss = X.double(), SQUARES[name]
    analysis, _ = measured(model, lambda m: loss(m(x)))
    with torch.no_grad():
        h, p = model[:2](x), model[2].p
        f, variances = model[3](h), p / (1 - p) * h**2 @ (model[3].weight ** 2).T
    hessian = torch.autograd.functional.hessian(loss, f).view(24, 24)
    expected = float((hessian.diagonal() * variances.view(24)).sum()) / 2
    assert analysis.latest["regularizer/R1"] == pytest.approx(expected, rel=1e-9)
    assert analysis.latest["regularizer/R1_standard_error"] == 0
    assert "exact" in analysis.notes["regularizer/R1"]


@pytest.mark.parametrize("name", NO_SQUARES)
def test_a_formula_that_does_not_is_averaged_over_masks(name):
    torch.manual_seed(0)
    analysis, _ = measured(mlp(), lambda m: NO_SQUARES[name](m(X)))
    assert "average over" in analysis.notes["regularizer/R1"]
    assert analysis.latest["regularizer/R1_standard_error"] > 0


def powers(out):
    return (out - Y).abs().pow(1.5).mean()


def decayed(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters())


def steep(model):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().mean()


def both(model):
    out = model(X)
    return F.mse_loss(out, Y) + 0.5 * F.cross_entropy(out, LABELS)


def added_in_place(model):
    loss = both(model)
    loss += decayed(model)
    return loss


# What a script goes back from, and what of it is measured.
IN_PART = {
    "formula": (lambda m: powers(m(X)) + decayed(m), lambda m: powers(m(X))),
    "taken off": (lambda m: decayed(m) - powers(m(X)), lambda m: -powers(m(X))),
    "in place": (added_in_place, both),
    "scaled": (lambda m: 2 * (both(m) + decayed(m)).mean() / 4, lambda m: both(m) / 2),
    "twice": (lambda m: both(m) - decayed(m) + decayed(m), both),
    "by name": (lambda m: torch.div(other=2, input=both(m) + decayed(m)),
                lambda m: both(m) / 2),
    "slope": (lambda m: m(X).mean() - m(-X).mean() + steep(m),
              lambda m: m(X).mean() - m(-X).mean()),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PART)
def test_a_loss_with_a_penalty_is_measured_without_it(name):
    """All terms but the penalty count, whatever they are made of."""
    script, part = IN_PART[name]
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer(num_masks=64)]
    ) as analysis:
        script(model).backward()
        sgd.step()
    with torch.no_grad():
        dropped = torch.stack([part(model) for _ in range(2000)])
        clean = float(part(model.eval()))
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)
    assert "of the terms that were followed" in analysis.notes["loss/R_S"]
    own = analysis.latest["regularizer/R1_standard_error"]
    error = math.hypot(float(dropped.std()) / 2000**0.5, own)
    off = analysis.latest["regularizer/R1"] - (float(dropped.mean()) - clean)
    assert abs(off) < 4.5 * error


def test_a_penalty_that_goes_back_after_the_loss_is_in_r_2_and_its_note_says_so():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        both(model).backward()
        alone = sum(p.grad.square().sum() for p in model.parameters())
        decayed(model).backward()
        received = sum(p.grad.square().sum() for p in model.parameters())
        sgd.step()
    expected = float(received) * 0.1 / 4
    assert analysis.latest["regularizer/R2"] == pytest.approx(expected, rel=1e-5)
    assert abs(received / alone - 1) > 0.01
    assert "penalties too" in analysis.notes["regularizer/R2"]


def test_a_penalty_that_goes_back_by_itself_is_said_to_lack():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, log_dir=False, every=1, measures=[Regularizer()]
    ) as analysis:
        loss = both(model)
        decayed(model).backward()
        loss.backward()
        sgd.step()
    assert "penalties on parameters" in analysis.notes["loss/R_S"]
    with torch.no_grad():
        clean = float(both(model.eval()))
    assert analysis.latest["loss/R_S"] == pytest.approx(clean, rel=1e-5)


@pytest.mark.parametrize("bend", [torch.exp, lambda x: 1 / x, lambda x: x * x])
def test_what_bends_a_loss_with_a_penalty_is_not_measured_without_it(bend):
    script = lambda m: bend(powers(m(X)) + decayed(m))  # noqa: E731
    analysis, _ = measured(mlp(), script)
    assert "loss" in analysis.absent["regularizer"]
    assert "loss/R_S" not in analysis.latest
