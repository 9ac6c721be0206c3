"""Models whose forward pass writes on parameters, measured by hand."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from tests.passes import take_in_parts
from torch_dropout_ir.regularizers import (
    gauss_newton,
    gradient_norm,
    modified_loss,
    monte_carlo,
    second_order,
)
from torch_dropout_ir.testing import check_regularizer, expected_dropout_loss


def by_data(m):
    m.slow.data.mul_(0.9)


def by_another_tensor(m):
    m.slow.data = 0.9 * m.slow.data


@torch.no_grad()
def in_place(m):
    m.slow.mul_(0.9)


@torch.no_grad()
def by_a_view(m):
    m.slow[:2] *= 0.9
    m.slow.detach()[2:].sub_(0.1)


@torch.no_grad()
def of_several(m):
    torch._foreach_mul_([m.slow, m.slow], 0.9)


@torch.no_grad()
def by_out(m):
    torch.mul(m.slow, 0.9, out=m.slow)


@torch.no_grad()
def by_index(m):
    m.slow[0] = 0.9 * m.slow[0]


def trained(m):
    m.one.weight.data = 0.9 * F.normalize(m.one.weight.data)
    m.two.bias.data.mul_(0.9)


def momentum(m):
    """As a key encoder follows."""
    for key, query in zip(m.key.parameters(), m.one.parameters(), strict=True):
        key.data = 0.9 * key.data + 0.1 * query.data


WRITES = (
    by_data, by_another_tensor, in_place, by_a_view, of_several, by_out, by_index,
    trained, momentum,
)  # fmt: skip

COUNTED = in_place, by_a_view, of_several, by_out, by_index


class Writes(nn.Module):
    """Its passes write on parameters, until it has been told not to."""

    def __init__(self, write):
        super().__init__()
        self.one, self.key = nn.Linear(3, 5), nn.Linear(3, 5).requires_grad_(False)
        self.drop, self.two = nn.Dropout(0.3), nn.Linear(5, 3)
        self.slow = nn.Parameter(torch.ones(3), requires_grad=False)
        self.write = write

    def forward(self, x):
        if self.write is not None:
            self.write(self)
        return self.two(self.drop((self.one(x) + self.key(x)).tanh())) * self.slow


def written(model, x):
    """A copy that has run once, and writes no more."""
    twin = copy.deepcopy(model)
    twin(x)
    twin.write = None
    return twin


def made(write):
    torch.manual_seed(0)
    model = Writes(write).double()
    return model, (torch.randn(300, 3).double(), torch.randint(3, (300,)))


def values(found):
    return [x for x in vars(found).values() if isinstance(x, torch.Tensor)]


FORMS = {
    "gauss_newton": gauss_newton,
    "exact": functools.partial(gauss_newton, num_samples=None),
    "second_order": functools.partial(second_order, num_samples=3),
    "monte_carlo": functools.partial(monte_carlo, num_masks=8),
    "rtol": functools.partial(monte_carlo, num_masks=200, rtol=0.3),
    "gradient_norm": functools.partial(gradient_norm, lr=0.1, num_masks=4),
}


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request, monkeypatch):
    """Whether passes are taken to hold memory that matters: then there are more."""
    if request.param:
        take_in_parts(monkeypatch)
    return request.param


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FORMS)
def test_each_pass_begins_with_the_parameters_as_they_were(name, write, large):
    model, batch = made(write)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    held = [(x, x.data_ptr()) for x in model.parameters()]
    torch.manual_seed(1)
    found = FORMS[name](model, batch, "cross_entropy")
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    assert [(x, x.data_ptr()) for x in model.parameters()] == held
    assert not model._forward_pre_hooks and not model._forward_hooks
    twin = written(model, batch[0])
    torch.manual_seed(1)
    expected = FORMS[name](twin, batch, "cross_entropy")
    torch.testing.assert_close(values(found), values(expected), equal_nan=True)
    if name == "gradient_norm":  # two batches are a pair
        pair = [batch, batch]
        found, expected = (FORMS[name](m, pair, "cross_entropy") for m in (model, twin))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["L1", "L2", "L3", "L4", "regu"])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_modified_loss_writes_once_a_step(write, kind, large):
    takes_r1 = ("gauss_newton", "second_order", "monte_carlo")
    for r1 in takes_r1 if kind in ("L1", "L4") else ("last_layer",):
        model, batch = made(write)
        twin = written(model, batch[0])
        ended = []
        for net in (model, twin):
            torch.manual_seed(1)
            value = modified_loss(net, batch, "cross_entropy", kind=kind, lr=0.1, r1=r1)
            if kind == "L4" and net is model and write in COUNTED:
                with pytest.raises(RuntimeError, match="modified by an inplace"):
                    value.backward()  # of two passes that torch has seen write
                return
            value.backward()
            ended.append([value.detach(), *(x.detach() for x in net.parameters())])
            ended[-1] += [x.grad for x in net.parameters() if x.requires_grad]
        torch.testing.assert_close(*ended)


def mean_of_the_batch(m):
    m.slow.data.lerp_(m.seen.mean(0), 0.5)


@pytest.mark.parametrize("kind", ["L1", "L2", "L3", "L4", "regu"])
def test_what_stays_is_of_the_whole_batch(kind):
    model, (x, y) = made(mean_of_the_batch)
    model.register_forward_pre_hook(lambda m, args: vars(m).update(seen=args[0]))
    twin = written(model, x)
    value = modified_loss(
        model, (x, y), "cross_entropy", kind=kind, lr=0.1, r1="gauss_newton",
        max_bytes=0,
    )  # fmt: skip
    assert torch.equal(model.slow, twin.slow) and value.isfinite()


def test_a_failure_gives_back_what_was_written():
    model, (x, y) = made(momentum)
    before = [p.clone() for p in model.parameters()]

    def fails(f, t):
        raise ZeroDivisionError

    for form in FORMS.values():
        with pytest.raises(ZeroDivisionError):
            form(model, (x, y), fails)
        with pytest.raises(RuntimeError):  # in the pass itself
            form(model, (x[:, :2], y), "cross_entropy")
    kept = zip(model.parameters(), before, strict=True)
    assert all(torch.equal(p, was) for p, was in kept)
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_truth_is_of_the_parameters_after_one_pass():
    model, (x, y) = made(momentum)
    batch = x[:2], y[:2]
    before = [p.clone() for p in model.parameters()]
    twin = written(model, batch[0])
    found, expected = (
        expected_dropout_loss(m, batch, "cross_entropy") for m in (model, twin)
    )
    torch.testing.assert_close(found, expected)
    reports = [
        check_regularizer(m, batch, "cross_entropy", num_masks=64, num_samples=16)
        for m in (model, twin)
    ]
    reports[0].assert_holds()
    assert str(reports[0]) == str(reports[1])
    kept = zip(model.parameters(), before, strict=True)
    assert all(torch.equal(p, was) for p, was in kept)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_renormalizes_is_given_back(kind):
    model = nn.Sequential(kind(7, 4, max_norm=0.1), nn.Dropout(0.3), nn.Linear(4, 2))
    before = model[0].weight.clone()
    batch = torch.randint(7, (6, 3)), torch.randn(6, 3, 2)
    if kind is nn.EmbeddingBag:
        batch = batch[0], batch[1][:, 0]
    gauss_newton(model, batch, "mse")
    assert torch.equal(model[0].weight, before)
    model(batch[0])
    assert not torch.equal(model[0].weight, before)


def test_a_hook_that_writes_is_part_of_the_pass():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2))

    def hook(module, _):
        module[0].weight.data.mul_(0.9)

    model.register_forward_pre_hook(hook)
    before, batch = model[0].weight.clone(), (torch.randn(5, 3), torch.randn(5, 2))
    found = gauss_newton(model, batch, "mse", num_samples=None)
    assert torch.equal(model[0].weight, before)
    twin = copy.deepcopy(model)
    twin._forward_pre_hooks.clear()
    twin[0].weight.data.mul_(0.9)
    expected = gauss_newton(twin, batch, "mse", num_samples=None)
    torch.testing.assert_close(found.value, expected.value)


def test_parameters_that_the_first_pass_makes_stay_made():
    model = nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.3), nn.LazyLinear(2))
    twin, batch = copy.deepcopy(model), (torch.randn(5, 3), torch.randn(5, 2))
    torch.manual_seed(0)
    gauss_newton(model, batch, "mse")
    torch.manual_seed(0)
    twin[0](batch[0])
    assert torch.equal(model[0].weight, twin[0].weight)
    assert torch.equal(model[0].bias, twin[0].bias)


def test_what_is_only_read_is_not_copied():
    class Reads(Writes):
        def forward(self, x):
            weight = self.one.weight.detach() + self.one.weight.data
            return super().forward(x + 0 * weight.sum()).relu_()

    model, batch = Reads(None), (torch.randn(4, 3), torch.randn(4, 3))
    from torch_dropout_ir import written_parameters as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Kept, "add", None)
        gauss_newton(model, batch, "mse")
    assert tdi.regularizers.monte_carlo(model, batch, "mse").value.isfinite()
