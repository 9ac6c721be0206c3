"""One line attached to the models that people train, and nothing of it left behind."""

import inspect
import random
import re
import sys
from typing import get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_dropout_ir as tdi
from tests import traces

models = pytest.importorskip("torchvision.models")
CNBlockConfig = models.convnext.CNBlockConfig
MBConvConfig = models.efficientnet.MBConvConfig
FusedMBConvConfig = models.efficientnet.FusedMBConvConfig


def picture(n=2, side=32):
    return torch.randn(n, 3, side, side), torch.randint(5, (n,))


def larger():
    """What a network takes that halves its pictures' sides often, or with pooling."""
    return picture(side=75)


def thin(make, times):
    """A network of torchvision's as it is, its layers so many times narrower."""
    with torch.device("meta"):
        model = make()
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if (new := thinner(layer, times)) is not None:
                setattr(parent, name, new)
    return model


def thinner(layer, times):
    if isinstance(layer, nn.Conv2d):
        into, out = layer.in_channels, layer.out_channels
        return nn.Conv2d(
            into if into == 3 else into // times,
            out if out == 5 else out // times,
            layer.kernel_size, layer.stride, layer.padding,
            groups=max(1, layer.groups // times), bias=layer.bias is not None,
        )  # fmt: skip
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(layer.num_features // times, layer.eps)
    if isinstance(layer, nn.Linear):
        out = layer.out_features
        return nn.Linear(layer.in_features // times, out if out == 5 else out // times)
    return None


def tokens(n=3, length=6):
    return torch.randint(11, (n, length)), torch.randint(5, (n,))


def sequences(n=3, length=6):
    return torch.randn(n, length, 8), torch.randint(5, (n,))


class Transformer(nn.Module):
    """An encoder and a decoder of torch's own, over tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Transformer(
            8, 2, 1, 1, dim_feedforward=16, dropout=0.2, batch_first=True
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.embed(x)
        return self.head(self.body(h, h).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(8, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(F.dropout(self.cell(x)[0][:, -1], 0.2, self.training))


class Scaled(nn.Module):
    """Causal attention as a function, residual dropout as a function."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = F.dropout(self.embed(x), 0.1, self.training)
        q, k, v = (
            y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(h).chunk(3, -1)
        )
        p = 0.2 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        y = y.transpose(1, 2).flatten(2)
        return self.head((h + F.dropout(self.out(y), 0.1, self.training)).mean(1))


class Noisy(nn.Module):
    """Noise that is nobody's dropout."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 5)

    def forward(self, x):
        h = self.body(x.mean(1))
        if self.training:
            h = h + 0.1 * torch.randn_like(h) + random.random() + np.random.rand()
        return self.head(self.drop(h))


# A class of torchvision's, and where its sizes differ in more than width, each.
ZOO = {
    "alexnet": (lambda: thin(lambda: models.alexnet(num_classes=5), 16), larger),
    "vgg": (lambda: thin(lambda: models.vgg11_bn(num_classes=5), 16), picture),
    "squeezenet": (
        lambda: thin(lambda: models.squeezenet1_1(num_classes=5), 8), picture,
    ),
    "googlenet": (
        lambda: thin(
            lambda: models.googlenet(num_classes=5, init_weights=False), 8
        ), picture,
    ),
    "inception": (
        lambda: thin(
            # Its second head wants pictures of 299; GoogLeNet has such heads too.
            lambda: models.Inception3(5, aux_logits=False, init_weights=False), 16
        ), larger,
    ),
    "mobilenet_v2": (
        lambda: models.MobileNetV2(
            5, 0.25, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]
        ), picture,
    ),
    "mobilenet_v3": (
        lambda: thin(lambda: models.mobilenet_v3_small(num_classes=5), 8), picture,
    ),
    "mnasnet": (lambda: models.MNASNet(0.1, num_classes=5), picture),
    "efficientnet": (
        lambda: models.EfficientNet(
            [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2)],
            dropout=0.2, stochastic_depth_prob=0.3, num_classes=5, last_channel=16,
        ), picture,
    ),
    "efficientnet_v2": (
        lambda: models.EfficientNet(
            [FusedMBConvConfig(1, 3, 1, 8, 8, 2), MBConvConfig(4, 3, 2, 8, 16, 1)],
            dropout=0.2, stochastic_depth_prob=0.3, num_classes=5, last_channel=16,
        ), picture,
    ),
    "maxvit": (
        lambda: models.MaxVit(
            (32, 32), 8, 4, [8], [2], 8, 0.3, attention_dropout=0.1, mlp_dropout=0.1,
            num_classes=5,
        ), picture,
    ),
    "densenet": (
        lambda: models.DenseNet(8, (2, 2), 8, drop_rate=0.2, num_classes=5), picture,
    ),
    "convnext": (
        lambda: models.ConvNeXt(
            [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)],
            stochastic_depth_prob=0.3, num_classes=5,
        ), picture,
    ),
    "swin": (
        lambda: models.SwinTransformer(
            [4, 4], 8, [2, 2], [2, 2], [4, 4], dropout=0.1, attention_dropout=0.1,
            stochastic_depth_prob=0.3, num_classes=5,
        ), picture,
    ),
    "swin_v2": (
        lambda: models.SwinTransformer(
            [4, 4], 8, [1, 1], [2, 2], [4, 4], dropout=0.1, attention_dropout=0.1,
            stochastic_depth_prob=0.3, num_classes=5,
            block=models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=models.swin_transformer.PatchMergingV2,
        ), picture,
    ),
    "vit": (
        lambda: models.VisionTransformer(
            32, 8, 2, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=5
        ), picture,
    ),
    "transformer": (Transformer, tokens),
    "scaled": (Scaled, tokens),
    "lstm": (lambda: Recurrent(nn.LSTM), sequences),
    "gru": (lambda: Recurrent(nn.GRU), sequences),
    "noisy": (Noisy, sequences),
}  # fmt: skip

# What the sites of a model are called, by a piece of their names, and what is not seen.
SITES = {
    "squeezenet": {"classifier.0"},
    "alexnet": {"classifier.0", "classifier.3"},
    "vgg": {"classifier.2", "classifier.5"},
    "googlenet": {"aux1.dropout", "aux2.dropout", "dropout"},
    "inception": {"dropout"},
    "efficientnet": {"classifier.0", "features.2.1.stochastic_depth"},
    "efficientnet_v2": {"classifier.0", "features.1.1.stochastic_depth"},
    "maxvit": {
        "blocks.0.layers.1.layers.MBconv.stochastic_depth",
        "blocks.0.layers.0.layers.grid_attention.attn_layer.2",
    },
    "swin_v2": {"features.3.0.stochastic_depth", "features.1.0.attn:dropout#1"},
    "transformer": {"body.encoder.layers.0.self_attn:scaled_dot_product_attention#0"},
    "scaled": {":dropout#0", ":scaled_dot_product_attention#0", ":dropout#1"},
    "lstm": {":dropout#0"},
    "swin": {"features.1.1.stochastic_depth", "features.1.1.attn:dropout#0"},
    "vit": {
        "encoder.layers.encoder_layer_0.self_attention:scaled_dot_product_attention#0"
    },
    "densenet": {"features.denseblock1.denselayer1:dropout#0"},
}


NOT_CALLED = "not called in the last pass looked at"


def train(name, attach):
    """A script of three steps; with the analysis or without it."""
    return traces.train(*script(name), attach)


def script(name):
    """What makes the model, and the loss of a model on a batch."""
    make, batch = ZOO[name]
    criterion = nn.CrossEntropyLoss()

    def loss_of(model):
        x, y = batch()
        found = model(x)
        if isinstance(found, tuple):  # with heads half way
            return sum(criterion(head, y) for head in found)
        return criterion(found, y)

    return make, loss_of


@pytest.mark.parametrize("name", ZOO)
def test_it_measures_and_leaves_no_trace(name):
    analysis = traces.compared(*script(name))
    traces.assert_measured(analysis, SITES.get(name, ()))


def test_the_zoo_has_every_class_of_torchvision_that_drops():
    """Names of one class differ in depth and width; its source says what it draws."""
    made = {type(make()).__name__ for make, _ in ZOO.values()}
    names = models.list_models(models)
    builders = [models.get_model_builder(name) for name in names]
    assert len(builders) > 70
    classes = {get_type_hints(builder)["return"] for builder in builders}
    drops = re.compile("dropout|stochastic", re.IGNORECASE)
    found = {
        kind.__name__
        for kind in classes
        if drops.search(inspect.getsource(sys.modules[kind.__module__]))
    }
    assert found <= made and "VGG" in found
    assert {kind.__name__ for kind in classes} - found == {
        "ResNet", "RegNet", "ShuffleNetV2",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_dropout_inside_a_recurrent_kernel_is_seen_but_not_in_r1(name):
    _, _, analysis = train(name, attach=True)
    inner = [s for s in analysis._view.statistics() if s.startswith("cell:")]
    assert inner == [f"cell:{name}#0"]
    assert abs(analysis.latest[f"mask/z_score/{inner[0]}"]) < 5
    hidden = {site.name: site.reason for site in analysis.sites if not site.observed}
    assert "between its own layers" in hidden["cell"]


def test_noise_that_is_no_dropout_is_told():
    _, _, analysis = train("noisy", attach=True)
    hidden = {site.name: site.reason for site in analysis.sites if not site.observed}
    assert list(hidden) == [":randn_like", ":random", ":numpy.random"]
    assert all("stay in R_S" in reason for reason in hidden.values())
    assert hidden[":randn_like"] in analysis.summary()


def test_a_layer_that_is_not_called_is_no_site_that_is_observed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.Linear(3, 2))
    model[0].spare = nn.Dropout(0.3)
    model[0].off = nn.Dropout(0.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        nn.MSELoss()(model(torch.randn(4, 3)), torch.zeros(4, 2)).backward()
        sgd.step()
    found = {site.name: (site.kind, site.p, site.reason) for site in analysis.sites}
    assert found["0.spare"] == ("Dropout", 0.3, NOT_CALLED)
    assert found["1"] == ("Dropout", 0.2, "") and not found["0.off"][2]


def test_masks_of_calls_are_those_that_the_script_saw():
    """The output of the script's own pass tells which elements were dropped."""
    seen = []

    class Tells(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            h = F.dropout(x + 10, 0.4, self.training)
            if not tdi_measuring():
                seen.append(h.detach() != 0)
            return self.last(h)

    from torch_dropout_ir.module_calls import measuring as tdi_measuring

    model = Tells()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
        for _ in range(3):
            nn.MSELoss()(model(torch.rand(8, 6)), torch.zeros(8, 2)).backward()
            sgd.step()
    kept = torch.cat(seen)
    assert kept.shape == (24, 6)
    assert torch.equal(analysis._view.statistics()[":dropout#0"].unit_kept, kept.sum(0))
