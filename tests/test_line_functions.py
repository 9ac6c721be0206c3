"""Along a line through what is taken as a whole: recurrent layers, own derivatives."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.line_functions import Applied, Straight
from tests.line_oracle import line_and_graph, linear_and_graph, noise_of
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import line_slabs
from torch_dropout_ir.regularizers.line_calls import NoRuleError
from torch_dropout_ir.regularizers.line_graphs import along
from torch_dropout_ir.regularizers.line_pass import curvature_along


class Layers(nn.Module):
    """A recurrent layer, from a state that moves, to its steps and its last state."""

    def __init__(self, layer, lengths=None):
        super().__init__()
        self.layer, self.lengths = layer, lengths

    def forward(self, x):
        if self.lengths is not None:
            x = pack_padded_sequence(x, self.lengths, self.layer.batch_first, False)
        out, last = self.layer(x)
        if isinstance(out, PackedSequence):
            out, _ = pad_packed_sequence(out, batch_first=self.layer.batch_first)
        last = last if isinstance(last, tuple) else (last,)
        return torch.cat([y.flatten() for y in (out, *last)])


class Started(nn.Module):
    """A recurrent layer from a state that moves alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.register_buffer("steps", torch.randn(4, 5, 3))

    def forward(self, x):
        state = x[:2, :, :2].contiguous()
        lstm = isinstance(self.layer, nn.LSTM)
        return self.layer(self.steps, (state, state.sin()) if lstm else state)[0]


RECURRENT = {
    "lstm": nn.LSTM(3, 2), "gru": nn.GRU(3, 2), "rnn": nn.RNN(3, 2),
    "relu": nn.RNN(3, 2, nonlinearity="relu", bias=False),
    "deep lstm": nn.LSTM(3, 2, 3, batch_first=True, dropout=0.4),
    "deep gru": nn.GRU(3, 2, 2, bias=False, bidirectional=True),
    "both": nn.LSTM(3, 2, 2, bidirectional=True, batch_first=True, bias=False),
    "projected": nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True),
}  # fmt: skip


@pytest.mark.parametrize("lengths", [None, [3, 1, 4, 4, 2]])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_along_a_line(monkeypatch, name, lengths):
    torch.manual_seed(0)
    first = RECURRENT[name].batch_first
    x = torch.randn(*((5, 4) if first else (4, 5)), 3).double()
    net = Layers(RECURRENT[name].double(), lengths)
    net.layer.dropout = 0.0  # off where R_S is measured
    found, expected = line_and_graph(net, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_state_that_moves(kind):
    torch.manual_seed(0)
    net, x = Started(kind(3, 2, 2)).double(), torch.randn(4, 5, 3).double()
    found, expected = line_and_graph(net, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6


class OwnWeights(nn.Module):
    """A recurrent layer whose weights move."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 3)

    def forward(self, x):
        own = {n: p * (1 + x.mean()) for n, p in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, own, (x,))[0]


@pytest.mark.parametrize(
    "layer", [nn.LSTMCell(3, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 3)]
)
def test_cells_along_a_line(layer):
    torch.manual_seed(0)

    class Cell(nn.Module):
        def forward(self, x):
            h = layer(x[0])
            h = h if isinstance(h, tuple) else (h, h)
            return torch.cat([h[0], layer(x[1], h if len(h) == 2 and isinstance(
                layer, nn.LSTMCell) else h[0])[0].view(-1, 3)])  # fmt: skip

    layer.double()
    found, expected = line_and_graph(Cell(), torch.randn(2, 4, 3).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_weights_that_move_go_through_torchs_own_steps():
    torch.manual_seed(0)
    net, x = OwnWeights().double(), torch.randn(4, 5, 3).double()
    found, expected = line_and_graph(net, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Same(torch.autograd.Function):
    """One that returns what it is given."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g


class Enabled(torch.autograd.Function):
    """One that calls for gradients of its own."""

    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, y):
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        return x * (scale * x).sigmoid() * y, x.argmax(), y[:2]

    @staticmethod
    def backward(ctx, g, _, part):
        x, y = ctx.saved_tensors
        s = (ctx.scale * x).sigmoid()
        rest = torch.cat([part, torch.zeros_like(y[2:])])
        return g * y * (s + x * ctx.scale * s * (1 - s)), None, g * x * s + rest


class Later(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g * ctx.saved_tensors[0].detach()  # as if of no curvature


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clone())
        return x.sin_()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class MarkedLater(torch.autograd.Function):
    """Writes on two of three, and returns them the other way round."""

    @staticmethod
    def forward(x, y, scale):
        before = x.clone(), y.clone()
        return y.sin_(), x.mul_(before[1]), x.sum() * scale, *before

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_dirty(*inputs[:2])
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*output[3:])
        ctx.scale = inputs[2]

    @staticmethod
    def backward(ctx, gy, gx, total, *_):
        x, y = ctx.saved_tensors
        gx = gx + total * ctx.scale
        return gx * y, gx * x + gy * y.cos(), None


class Centred(torch.autograd.Function):
    """Where rows meet."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square() - x.square().mean(0)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * (g - g.mean(0))


class Averaged(torch.autograd.Function):
    """Where its derivative alone tells how many rows there are, or meets others."""

    @staticmethod
    def forward(ctx, x, others):
        ctx.save_for_backward(x)
        ctx.others = others
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x + x.flip(0).sin() if ctx.others else x) / len(x), None


class Ordered(torch.autograd.Function):
    """Where what is no tensor tells how many rows there are."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(x)
        ctx.order = order
        return x.square()[order]

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * torch.zeros_like(x).index_put(
            (torch.tensor(ctx.order),), g
        ), None


class Sized(Later):
    """One that is made for so many rows."""

    @staticmethod
    def forward(x):
        assert len(x) == 4
        return x.exp()


by_name = Later.apply


def swish(x):
    found, place, part = Swish.apply(x, 1.5, x.cos())
    return found * (1 + place * 0) + part.mean()


def same(x):
    y = x.sin()
    return Same.apply(y) * y


def marked(x):
    y = x * 1.5
    part = y[:2]
    Marked.apply(part)
    return Marked.apply(y) * x + part.mean()


def marked_later(x):
    x, y = x * 1.5, x.cos()
    part = x[1:]
    sin, product, total, *_ = MarkedLater.apply(x, y, 2.0)
    return x * product + sin * y + total + part.mean()


def constant(x):
    with torch.no_grad():
        scale = by_name(x)
    return x.square() * scale


@torch.library.custom_op("line_test::scaled", mutates_args=())
def scaled(x: torch.Tensor, noise: float) -> torch.Tensor:
    return x.exp() * (1 + noise * torch.rand(()))


scaled.register_autograd(
    lambda ctx, g: (g * ctx.saved_tensors[0].exp(), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


OWN = {
    "straight": Straight.apply, "same": same, "enabled": Enabled.apply,
    "swish": swish, "later": lambda x: by_name(x.sin()) * x, "constant": constant,
    "twice": lambda x: by_name(Swish.apply(x, 0.5, x)[0]),
    "custom": lambda x: scaled(x, 0.0) * x,
    "written": lambda x: Enabled.apply(1.5 * x).mul_(x),
    "marked": marked, "marked later": marked_later, "centred": Centred.apply,
    "averaged": lambda x: Averaged.apply(x, False),
    "others": lambda x: Averaged.apply(x, True),
    "ordered": lambda x: Ordered.apply(x, [2, 0, 3, 1]), "sized": Sized.apply,
}  # fmt: skip


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_a_derivative_of_its_own_along_a_line(monkeypatch, name, parts):
    if parts:
        monkeypatch.setattr(line_slabs, "_PART", 5)
    torch.manual_seed(0)
    found, expected = line_and_graph(Applied(OWN[name]), torch.randn(4, 5).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6
    assert "__getattribute__" not in vars(torch.autograd.function.FunctionMeta)


def test_rows_go_apart_where_a_function_keeps_them_so(monkeypatch):
    monkeypatch.setattr(line_slabs, "_PART", 5)
    seen = []

    def look(*args):
        seen.append(found := taken(*args))
        return found

    taken = line_slabs._in_rows
    monkeypatch.setattr(line_slabs, "_in_rows", look)
    for name, own in (("later", True), ("marked", True), ("centred", False),
                      ("averaged", False), ("others", False)):  # fmt: skip
        seen.clear()
        line_and_graph(Applied(OWN[name]), torch.randn(4, 5).double())
        assert seen and all((x is not None) is own for x in seen)


LINEARIZED = {
    "recurrent": lambda x: RECURRENT["gru"](x)[0],
    "own": lambda x: Swish.apply(x, 1.5, x.cos())[0],
}


@pytest.mark.parametrize("name", LINEARIZED)
def test_a_layer_that_is_linearized(name):
    torch.manual_seed(0)
    RECURRENT["gru"].double()
    x = torch.randn(4, 5, 3).double()
    found, expected = linear_and_graph(Applied(LINEARIZED[name]), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.1, 0.1)


class Cut(torch.autograd.Function):
    """Its derivative is one number, whatever follows."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g.detach()


def noisy(x):
    return scaled(x, 0.1)


@pytest.mark.parametrize("function", [Clamped.apply, Cut.apply, noisy])
def test_what_has_no_line(function):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), Applied(lambda x: function(1.0 * x)))
    x = torch.randn(4, 5)
    uses, _, z = noise_of(net, x)
    loss = resolve_loss(lambda f, _: f.square().sum())
    with pytest.raises(RuntimeError):  # ours, and torch's
        curvature_along(net, (x, None), loss, uses, 0, z.clone)
    assert "__getattribute__" not in vars(torch.autograd.function.FunctionMeta)


def test_a_derivative_that_is_no_number_is_not_known():
    """That of the whole may be one: no distance of a row to itself."""
    x, u = torch.rand(2, 3, 2, dtype=torch.float64)
    with pytest.raises(NoRuleError, match="not linear"):
        along(lambda x: torch.cdist(x, x), [x], [(u, None)])
