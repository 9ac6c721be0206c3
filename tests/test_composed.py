"""Operations that torch differentiates once, and what is put in their place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.composed import composed
from torch_dropout_ir.regularizers import (
    gauss_newton,
    modified_loss,
    second_order,
)
from torch_dropout_ir.regularizers.masked import MaskedRows

LABELS = torch.tensor([[1, 2, -1, 0, 0], [3, -1, 1, 1, 1], [-1, 0, 0, 0, 0]])
INDEX = torch.tensor([[0, 3, 3, 1], [2, 0, 1, 1], [4, 4, 4, 4]])
BAGS = torch.tensor([0, 3, 3, 7])  # of which the second is empty
AT = torch.tensor([2, 0, 4])


def margin(**given):
    return F.multi_margin_loss, lambda x: (x[:3], AT), given


def bags(mode, **given):
    if "offsets" in given:
        return F.embedding_bag, lambda x: (INDEX.flatten(), x), {"mode": mode, **given}
    return F.embedding_bag, lambda x: (INDEX, x), {"mode": mode, **given}


def aligned(labels, lengths, **given):
    """Five steps of three texts, of five symbols."""

    def args(x):
        logs = (x.sin().repeat(3, 1).view(5, 3, 5) * 2).log_softmax(-1)
        return logs, labels, (5, 4, 5), lengths

    return F.ctc_loss, args, given


TEXTS = torch.tensor([[1, 1, 2], [3, 4, 4], [2, 1, 3]])
CALLS = {
    "hard sigmoid": (F.hardsigmoid, lambda x: (3 * x,), {}),
    "in place": (F.hardsigmoid, lambda x: (3 * x, True), {}),
    "margin": margin(),
    "squared margin": margin(p=2, margin=0.7, weight=torch.rand(5).double()),
    "margins": margin(reduction="none"),
    "margin of one": (F.multi_margin_loss, lambda x: (x[0], AT[0]), {}),
    "labels": (F.multilabel_margin_loss, lambda x: (x[:3], LABELS), {}),
    "labels by sample": (
        F.multilabel_margin_loss, lambda x: (x[:3], LABELS), {"reduction": "none"},
    ),
    "labels of one": (
        F.multilabel_margin_loss, lambda x: (x[0], LABELS[0]), {"reduction": "sum"},
    ),
    **{mode: bags(mode) for mode in ("sum", "mean", "max")},
    **{f"{mode}, by offsets": bags(mode, offsets=BAGS) for mode in ("mean", "max")},
    "last offset": bags("sum", offsets=torch.tensor([0, 5, 12]),
                        include_last_offset=True),
    **{f"{mode}, padded": bags(mode, padding_idx=-1) for mode in ("mean", "max")},
    "sum, padded": bags("sum", padding_idx=4),
    "weighed": bags("sum", per_sample_weights=torch.rand(3, 4).double()),
    "texts": aligned(TEXTS, (3, 2, 1)),
    "joined": aligned(torch.tensor([1, 1, 3, 2, 1, 3]), (2, 1, 3), reduction="sum"),
    "blank": aligned(TEXTS % 4, (2, 3, 0), blank=4, reduction="none"),
    "none": aligned(TEXTS, (3, 3, 3), zero_infinity=True),
    "padded texts": aligned(torch.tensor([[1, 2, -1], [3, -100, 99], [1, 2, 3]]),
                            (2, 1, 3)),
    "no labels": aligned(TEXTS[:, :0], (0, 0, 0), reduction="sum"),
    "none joined": aligned(TEXTS[0, :0], (0, 0, 0), reduction="none"),
    "one text": (
        F.ctc_loss,
        lambda x: (x[:, :].log_softmax(-1), torch.tensor([1, 2]), torch.tensor(5),
                   torch.tensor(2)), {},
    ),
}  # fmt: skip


def derivative(call, x):
    found = call(x)
    weights = torch.linspace(0.5, 1.5, found.numel()).double().view(found.shape)
    return found, torch.autograd.grad((found * weights).sum(), x)[0]


@pytest.mark.parametrize("name", CALLS)
def test_values_and_derivatives_are_torchs(name):
    function, args, given = CALLS[name]
    torch.manual_seed(1)
    x = torch.randn(5, 5).double().requires_grad_()

    def own(x):
        return composed(function, args(x), given)

    expected = derivative(lambda x: function(*args(x), **given), x)
    for a, b in zip(derivative(own, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)  # torch's 1 / 6
    assert torch.autograd.gradgradcheck(own, (x,))


def test_what_cannot_be_aligned_is_infinite():
    logs = torch.zeros(2, 1, 3).log_softmax(-1)
    given = (logs, torch.tensor([[1, 1]]), (2,), (2,))
    assert torch.isinf(composed(F.ctc_loss, given, {}))
    assert composed(F.ctc_loss, given, {"zero_infinity": True}) == 0


def test_of_no_steps_nothing_can_be_aligned_but_no_labels():
    logs = torch.zeros(2, 2, 3).log_softmax(-1)
    given = (logs, torch.ones(2, 1).long(), (0, 0), (0, 1))
    expected = F.ctc_loss(*given, reduction="none")
    torch.testing.assert_close(
        composed(F.ctc_loss, given, {"reduction": "none"}), expected
    )


WRONG = {
    "kind of sum": (F.embedding_bag, (INDEX, torch.rand(5, 2)), {"mode": "most"}),
    "offsets beside": (F.embedding_bag, (INDEX, torch.rand(5, 2), BAGS), {}),
    "offset beyond": (
        F.embedding_bag, (AT, torch.rand(5, 2), torch.tensor([0, 9])), {},
    ),
    "power": (F.multi_margin_loss, (torch.rand(3, 5), AT), {"p": 3}),
    "labels": (F.multi_margin_loss, (torch.rand(3, 5), AT[:2]), {}),
    "reduction": (
        F.multilabel_margin_loss, (torch.rand(3, 5), LABELS), {"reduction": "all"},
    ),
    "too long": (F.ctc_loss, (torch.rand(2, 3, 5), LABELS, (9, 2, 2), (1, 1, 1)), {}),
    "too few": (F.ctc_loss, (torch.rand(2, 3, 5), AT, (2, 2, 2), (2, 1, 1)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_as_torch_does(name):
    function, args, given = WRONG[name]
    with pytest.raises((RuntimeError, ValueError)) as expected:
        function(*args, **given)
    with pytest.raises(expected.type) as found:
        composed(function, args, given)
    assert str(found.value) == str(expected.value)


def test_what_has_been_given_up_on_is_left_to_torch():
    x = torch.randn(5, 5)
    with pytest.warns(UserWarning, match="deprecated"):
        assert (
            composed(F.multi_margin_loss, (x[:3], AT), {"size_average": True}) is None
        )
    assert composed(F.embedding_bag, (INDEX, x), {"max_norm": 1.0}) is None
    assert composed(F.relu, (x,), {}) is None


class Heard(nn.Module):
    """Five symbols at each of six steps."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 3), nn.Hardsigmoid(), nn.Dropout(0.3), nn.Linear(3, 5)
        )

    def forward(self, x):
        return self.net(x)


def heard(f, y):
    logs = f.transpose(0, 1).log_softmax(-1)
    return F.ctc_loss(logs, y, (6, 6), (2, 1))


class Texts(nn.Module):
    """The mean of the words of a text."""

    def __init__(self):
        super().__init__()
        self.bag, self.drop = nn.EmbeddingBag(5, 4), nn.Dropout(0.3)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.drop(self.bag(x)))


def curved(kind):
    torch.manual_seed(0)
    if kind == "ctc":
        return Heard().double(), (torch.randn(2, 6, 2).double(), TEXTS[:2, :2]), heard
    if kind == "bags":
        return Texts().double(), (INDEX, AT % 3), "cross_entropy"
    hard = kind == "hard sigmoid"
    first = [nn.Dropout(0.3), nn.Linear(3, 4), nn.Hardsigmoid() if hard else nn.Tanh()]
    net = nn.Sequential(*first, nn.Dropout(0.2), nn.Linear(4, 5)).double()
    loss = "cross_entropy" if hard else nn.MultiMarginLoss(p=2)
    return net, (torch.randn(3, 3).double(), AT), loss


KINDS = ("ctc", "bags", "hard sigmoid", "squared margin")


def values(net, batch, loss):
    """The loss at parameters, all in one vector, by operations of many derivatives."""
    names = [name for name, _ in net.named_parameters()]
    held = list(net.parameters())

    def of(flat):
        parts = flat.split([x.numel() for x in held])
        own = {n: p.view(x.shape) for n, p, x in zip(names, parts, held, strict=True)}
        net.eval()
        outputs = torch.func.functional_call(net, own, (batch[0],))
        return (
            F.cross_entropy(outputs, batch[1])
            if isinstance(loss, str)
            else loss(outputs, batch[1])
        )

    return of, torch.cat([x.detach().flatten() for x in held])


@pytest.mark.parametrize("kind", KINDS)
def test_curvature_is_that_of_differences_of_the_gradient(kind):
    net, batch, loss = curved(kind)
    of, at = values(net, batch, loss)

    def slope(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(of(x), x)[0]  # torch's own, once

    step = 1e-5
    columns = [
        (slope(at + step * e) - slope(at - step * e)) / (2 * step)
        for e in torch.eye(len(at)).double()
    ]
    dense = torch.stack(columns)
    op = tdi.sharpness.hessian(net, loss, [batch])
    torch.testing.assert_close(op.dense(), dense, rtol=1e-4, atol=1e-6)
    found = tdi.sharpness.trace(tdi.sharpness.hessian(net, loss, [batch]))
    assert float(found.value) == pytest.approx(float(dense.trace()), rel=1e-3)


def second_differences(net, batch, loss):
    """``p / (2 (1 - p)) sum h^2 d^2 R_S / dh^2``, by torch's own operations."""
    net.eval()
    total, step = 0.0, 1e-4
    for site in [m for m in net.modules() if isinstance(m, nn.Dropout)]:
        added, seen = [], []

        def hook(_, __, h, added=added, seen=seen):
            seen.append(h.detach())
            return h + added[0] if added else h

        handle = site.register_forward_hook(hook)
        of, at = values(net, batch, loss)
        middle = of(at)
        h, second = seen[0].clone(), torch.zeros_like(seen[0])
        for place in range(h.numel()):
            e = torch.zeros(h.numel()).double()
            e[place] = step
            added[:] = [e.view(h.shape)]
            above = of(at)
            added[:] = [-e.view(h.shape)]
            second.view(-1)[place] = (above + of(at) - 2 * middle) / step**2
        handle.remove()
        total += site.p / (2 * (1 - site.p)) * float((h**2 * second).sum())
    net.train()
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_forms_are_those_of_second_differences(kind):
    net, batch, loss = curved(kind)
    truth = second_differences(net, batch, loss)
    found = second_order(net, batch, loss, num_samples=None)
    assert float(found.value) == pytest.approx(truth, rel=1e-4)
    if kind in ("ctc", "bags"):  # nothing bends above the site
        linear = gauss_newton(net, batch, loss, num_samples=None)
        torch.testing.assert_close(linear.value, found.value)
        drawn = gauss_newton(net, batch, loss, num_samples=400)
        assert abs(drawn.value - found.value) < 5 * drawn.standard_error


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_can_be_trained_on(kind):
    """The gradient is that of differences of its value at the same signs."""
    net, batch, loss = curved(kind)

    def value():
        torch.manual_seed(3)
        return modified_loss(net, batch, loss, kind="L1", r1="second_order")

    value().backward()
    step = 1e-6
    for x in net.parameters():
        flat, own = x.data.view(-1), x.grad.flatten()[-1]
        flat[-1] += step
        above = float(value().detach())
        flat[-1] -= 2 * step
        assert (above - float(value().detach())) / (2 * step) == pytest.approx(
            float(own), rel=1e-4, abs=1e-7
        )
        flat[-1] += step


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_have_the_gradient_of_differences(kind):
    net, batch, loss = curved(kind)
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    of, at = values(net, batch, loss)

    def penalty(x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(of(x), x)
        return of(x.detach()) + 0.1 / 4 * g.square().sum()

    net.train()
    modified_loss(net, batch, loss, kind="L2", lr=0.1).backward()
    found = torch.cat([x.grad.flatten() for x in net.parameters()])
    step = 1e-5
    for i in range(0, len(at), 5):
        e = torch.zeros_like(at)
        e[i] = step
        expected = (penalty(at + e) - penalty(at - e)) / (2 * step)
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_a_piecewise_linear_margin_is_told():
    net, batch, _ = curved("squared margin")
    with pytest.raises(ValueError, match="piecewise linear"):
        gauss_newton(net, batch, nn.MultiMarginLoss())
    found = tdi.sharpness.trace(
        tdi.sharpness.hessian(net, nn.MultiMarginLoss(), [batch])
    )
    assert found.value.isfinite()  # the network bends


class Pooled(nn.Module):
    """Of whose derivative torch has none."""

    def forward(self, x):
        whole = torch.tensor([x.shape[1]]).expand(len(x), 1)
        return x * torch.segment_reduce(x, "mean", lengths=whole, axis=1)


@pytest.mark.parametrize("form", ["second_order", "L1", "L2", "trace", "top"])
def test_what_is_left_is_told(form):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Dropout(0.3), nn.Linear(3, 4), Pooled(), nn.Dropout(0.3), nn.Linear(4, 2)
    )
    batch = torch.randn(6, 3), torch.arange(6) % 2
    op = tdi.sharpness.hessian(net, "cross_entropy", [batch])
    run = {
        "second_order": lambda: second_order(net, batch, "cross_entropy"),
        "L1": lambda: modified_loss(
            net, batch, "cross_entropy", kind="L1", r1="second_order"
        ),
        "L2": lambda: modified_loss(net, batch, "cross_entropy", kind="L2", lr=0.1),
        "trace": lambda: tdi.sharpness.trace(op, num_matvecs=8),
        "top": lambda: tdi.sharpness.top_eigenvalues(op),
    }[form]
    with pytest.raises(NotImplementedError, match=r"twice, got an operat.*egment"):
        run()


def test_penalties_of_margins_go_by_rows(monkeypatch):
    """A loss by other operations is another one, but for rounding."""
    seen, own = [], MaskedRows.apart
    monkeypatch.setattr(
        MaskedRows, "apart", lambda *x: seen.append(own(*x)) or seen[-1]
    )
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 7)
    ).double()
    batch = torch.randn(40, 4).double(), torch.arange(40) % 7
    loss, found = nn.MultiMarginLoss(p=2, weight=torch.rand(7).double()), []
    for max_bytes in (0, None):
        torch.manual_seed(1)
        value = modified_loss(
            net, batch, loss, kind="regu", lr=0.1, max_bytes=max_bytes
        )
        found.append(torch.autograd.grad(value, net[0].weight)[0])
    assert seen == [True]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)
