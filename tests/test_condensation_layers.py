"""Input weights against what the layers compute with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_dropout_ir import condensation as cd

CONVOLUTIONS = [
    (kind, transposed)
    for kind in (1, 2, 3)
    for transposed in (False, True)
]  # fmt: skip


def with_one(*pieces):
    """Inputs side by side with the constant that a bias multiplies."""
    return torch.cat((*pieces, torch.ones(len(pieces[0]), 1)), 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dims", "transposed"), CONVOLUTIONS)
def test_views_of_convolutions(dims, transposed, groups, bias):
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    conv = getattr(nn, name)(4, 6, 2, groups=groups, bias=bias)
    positions = 2**dims
    reads, feeds = 4 // groups, 6 // groups
    filters = cd.input_weights(conv)
    kernels = cd.input_weights(conv, "kernel").unflatten(0, (6, reads))
    channels = cd.input_weights(conv, "input_channel")
    assert filters.shape == (6, reads * positions + bias)
    assert channels.shape == (4, feeds * positions)
    function = getattr(F, name.lower().replace("transpose", "_transpose"))
    for channel in range(4):
        # An impulse reads out the kernels: mirrored by a convolution.
        side = 2 if transposed else 3
        impulse = torch.zeros(1, 4, *(side,) * dims)
        impulse[(0, channel, *(0 if transposed else 1,) * dims)] = 1.0
        image = function(impulse, conv.weight, groups=groups)[0]
        corner = image[(slice(None), *(slice(0, 2),) * dims)].flatten(1)
        seen = corner if transposed else corner.flip(1)
        group, place = divmod(channel, reads)
        mine = seen[group * feeds : (group + 1) * feeds]
        torch.testing.assert_close(channels[channel], mine.flatten())
        for output in range(feeds):
            row = group * feeds + output
            torch.testing.assert_close(kernels[row, place], mine[output])
            at = slice(place * positions, (place + 1) * positions)
            torch.testing.assert_close(filters[row, at], mine[output])
    if bias:
        assert torch.equal(filters[:, -1], conv.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_attention_by_hand(separate, bias):
    dims = {"kdim": 5, "vdim": 3} if separate else {}
    module = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **dims)
    if bias:
        nn.init.normal_(module.in_proj_bias)
    q, k, v = (torch.randn(1, 4, dims.get(n, 8)) for n in ("embed", "kdim", "vdim"))
    heads = []
    for head in range(2):
        rows = [
            cd.input_weights(module, view, head=head)
            for view in ("query", "key", "value")
        ]
        query, key, value = (
            (with_one(x[0]) if bias else x[0]) @ w.T
            for x, w in zip((q, k, v), rows, strict=True)
        )
        heads.append((query @ key.T / 2).softmax(1) @ value)
    expected = module.out_proj(torch.cat(heads, 1))
    torch.testing.assert_close(module(q, k, v)[0][0], expected)
    if separate:
        with pytest.raises(ValueError, match="query"):
            cd.input_weights(module)
    else:
        assert cd.input_weights(module).shape == (24, 8 + bias)
        whole = cd.input_weights(module, "filter", head=1)
        assert torch.equal(whole, torch.cat(rows))


def test_fused_and_separate_projections_by_head():
    linear = nn.Linear(8, 24)
    query = cd.input_weights(linear, "query", num_heads=4, head=2)
    assert torch.equal(query, cd.input_weights(linear)[4:6])
    value = cd.input_weights(linear, "value", num_heads=4, head=3)
    assert torch.equal(value, cd.input_weights(linear)[22:])
    alone = cd.input_weights(nn.Linear(8, 12), num_heads=4, head=0)
    assert alone.shape == (3, 9)
    for arguments in (
        {"head": 0},
        {"head": 0, "num_heads": 5},
        {"num_heads": 0, "head": 0},
    ):
        with pytest.raises(ValueError, match="num_heads"):
            cd.input_weights(linear, **arguments)
    with pytest.raises(ValueError, match="`head`"):
        cd.input_weights(linear, num_heads=2, head=2)
    with pytest.raises(ValueError, match="view"):
        cd.input_weights(nn.Linear(8, 10), "key")


def lstm_step(gates, x, h, c):
    i, f, g, o = (with_one(x, h) @ gates[n].T for n in
                  ("input", "forget", "cell", "output"))  # fmt: skip
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(gates, x, h):
    ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
    full = torch.cat((x, h, ones, ones), 1)
    r, z = (torch.sigmoid(full @ gates[n].T) for n in ("reset", "update"))
    new = gates["new"]
    no_x, no_h = torch.zeros_like(x), torch.zeros_like(h)
    from_x = torch.cat((x, no_h, ones, zeros), 1) @ new.T
    from_h = torch.cat((no_x, h, zeros, ones), 1) @ new.T
    return (1 - z) * torch.tanh(from_x + r * from_h) + z * h


@pytest.mark.parametrize("cell", [True, False])
def test_gates_by_hand(cell):
    x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    for kind, names in (
        ("LSTM", ("input", "forget", "cell", "output")),
        ("GRU", ("reset", "update", "new")),
        ("RNN", ("unit",)),
    ):
        module = getattr(nn, kind + "Cell" * cell)(3, 4)
        gates = {name: cd.input_weights(module, name) for name in names}
        stacked = torch.cat(list(gates.values()))
        assert torch.equal(cd.input_weights(module), stacked)
        state = (h, c) if kind == "LSTM" else h
        if cell:
            got = module(x, state)
        else:
            wrap = (h[None], c[None]) if kind == "LSTM" else h[None]
            got = module(x[None], wrap)[0][0]
        if kind == "LSTM":
            expected = lstm_step(gates, x, h, c)[0]
            got = got[0] if cell else got
        elif kind == "GRU":
            expected = gru_step(gates, x, h)
        else:
            expected = torch.tanh(with_one(x, h) @ gates["unit"].T)
        torch.testing.assert_close(got, expected)


def test_only_a_grus_new_gate_tells_its_two_biases_apart():
    """Where they act as their sum, what one gives the other changes nothing."""
    module = nn.GRU(3, 4)
    names = ("reset", "update", "new")
    before = {name: cd.input_weights(module, name).clone() for name in names}
    with torch.no_grad():
        module.bias_ih_l0.add_(1.0)
        module.bias_hh_l0.sub_(1.0)
    for name, rows in before.items():
        alike = torch.allclose(cd.input_weights(module, name), rows)
        assert alike == (name != "new")


def test_layers_directions_and_projections_of_recurrent_layers():
    module = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2, bias=False)
    rows = cd.input_weights(module, "l1_reverse.forget")
    assert torch.equal(rows[:, :4], module.weight_ih_l1_reverse[4:8])
    assert torch.equal(rows[:, 4:], module.weight_hh_l1_reverse[4:8])
    projection = cd.input_weights(module, "projection")
    assert torch.equal(projection, module.weight_hr_l0)
    with pytest.raises(ValueError, match="l0_reverse"):
        cd.input_weights(module)


def test_embedding():
    module = nn.Embedding(5, 3, padding_idx=0)
    assert torch.equal(cd.input_weights(module), module.weight)
    assert torch.equal(cd.input_weights(module, "feature"), module.weight.T)


class LowRank(nn.Module):
    """A low-rank update as a parametrization."""

    def __init__(self, rows, columns):
        super().__init__()
        self.up = nn.Parameter(torch.randn(rows, 1))
        self.down = nn.Parameter(torch.randn(1, columns))

    def forward(self, weight):
        return weight + self.up @ self.down


class LowRankLinear(nn.Linear):
    """A low-rank update as a subclass."""

    def __init__(self, columns, rows, bias=True):
        super().__init__(columns, rows, bias)
        self.down = nn.Linear(columns, 1, bias=False)
        self.up = nn.Linear(1, rows, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(self.drop(x)))


def weight_norm(module):
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        weight_norm,
        torch.nn.utils.spectral_norm,
        lambda m: parametrize.register_parametrization(m, "weight", LowRank(4, 3)),
        lambda m: prune.random_unstructured(m, "weight", 0.4),
        lambda m: LowRankLinear(3, 4),
        lambda m: LowRankLinear(3, 4, bias=False),
    ],
)
def test_parametrized_weights_as_they_act(change):
    module = change(nn.Linear(3, 4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)  # as an optimizer step would
    before = copy.deepcopy(module.state_dict())
    rows = cd.input_weights(module)
    assert module.training and all(m.training for m in module.modules())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    x = torch.randn(5, 3)
    expected = module.eval()(x)
    full = with_one(x) if rows.shape[1] == 4 else x
    torch.testing.assert_close(full @ rows.T, expected)
    assert rows.requires_grad


class Squares(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Modulated(nn.Linear):
    def forward(self, x, style):
        return super().forward(x) * style


@pytest.mark.parametrize(("kind", "said"), [(Squares, "affine"), (Modulated, "style")])
def test_a_linear_subclass_that_is_not_affine_is_refused(kind, said):
    with pytest.raises(NotImplementedError, match=said):
        cd.input_weights(kind(3, 4))
    net = nn.Sequential(kind(3, 4), nn.Linear(4, 2))
    assert [name for name, _ in cd.named_input_weights(net)] == ["1"]
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), kind(3, 4))
    found = cd.outgoing_weights(net)["0"]
    assert not found.consumers and "`2` reads it by no affine map" in found.reason


@pytest.mark.parametrize("parent", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_gates_of_a_subclass_are_those_of_its_parent(parent):
    module, own = parent(3, 4), type("Own", (parent,), {})(3, 4)
    own.load_state_dict(module.state_dict())
    for view in dict(cd.layers.layer_parts(module)):
        assert torch.equal(cd.input_weights(own, view), cd.input_weights(module, view))


def test_the_walk_names_parts_and_gives_tied_weights_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.mix = nn.GRU(4, 4)
            self.again = nn.Linear(4, 4)
            self.twin = nn.Linear(4, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.lazy = nn.LazyLinear(3)
            self.head.weight = self.embed.weight
            self.twin.weight = self.again.weight

    names = [name for name, _ in cd.named_input_weights(Model())]
    assert names == [
        "embed",
        "attention:query", "attention:key", "attention:value", "attention.out_proj",
        "mix:reset", "mix:update", "mix:new",
        "again",
    ]  # fmt: skip
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, shared, parametrizations.weight_norm(nn.Linear(3, 2)))
    assert [name for name, _ in cd.named_input_weights(net)] == ["0", "2"]


def test_the_linear_layer_of_gpt2_is_one_with_its_weight_turned():
    turned = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    same = nn.Linear(4, 6)
    same.weight.data.copy_(turned.weight.T)
    nn.init.normal_(turned.bias)
    same.bias.data.copy_(turned.bias)
    for view in ("filter", "query", "key", "value"):
        assert torch.equal(cd.input_weights(turned, view), cd.input_weights(same, view))
    ((name, rows),) = cd.named_input_weights(nn.Sequential(turned))
    assert name == "0" and torch.equal(rows, cd.input_weights(same))


def test_unknown_layers_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="Supported: Linear"):
        cd.input_weights(nn.BatchNorm1d(3))
    with pytest.raises(NotImplementedError, match="before its first call"):
        cd.input_weights(nn.LazyLinear(3))


def test_a_weight_in_the_place_of_its_layer_is_told():
    with pytest.raises(TypeError, match=r"expected `module` .* got Parameter"):
        cd.input_weights(nn.Linear(2, 2).weight)


class Linear(nn.Module):
    """As that of PyTorch Geometric."""

    def __init__(self, ins, outs):
        super().__init__()
        self.in_channels, self.out_channels = ins, outs
        self.weight = nn.Parameter(torch.randn(outs, ins))
        self.bias = nn.Parameter(torch.randn(outs))


def test_the_linear_layer_of_graph_networks():
    layer = Linear(4, 5)
    expected = torch.cat((layer.weight, layer.bias[:, None]), 1)
    torch.testing.assert_close(cd.input_weights(layer), expected)
    assert [name for name, _ in cd.named_input_weights(nn.Sequential(layer))] == ["0"]
