"""A convolutional network with stochastic depth

    python tutorials/beyond/convnet.py --data-root DIR
    python tutorials/beyond/convnet.py --quick

torchvision's ConvNeXt, small: two stages of two blocks with stochastic depth that grows
with depth, dropout before the last layer, AdamW with a cosine schedule and random
flips, on 500 images of CIFAR-10, with 1000 to test. `--paper` takes 10 000 images, a
wider network and more epochs.
"""

import torch
from study import Study, cifar
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

BATCH = 50


def build(width, p):
    """ConvNeXt of two stages, with dropout before its last layer."""
    stages = [CNBlockConfig(width, 2 * width, 2), CNBlockConfig(2 * width, None, 2)]
    net = ConvNeXt(stages, stochastic_depth_prob=p, layer_scale=1.0, num_classes=10)
    last = net.classifier[-1]
    net.classifier[-1] = nn.Sequential(nn.Dropout(p), last)
    return net


def main():
    study = Study(
        __doc__,
        "convnet",
        drops=((0.0, 0.3), (0.0, 0.2, 0.4), (0.0, 0.1, 0.2, 0.4)),
        decays=((0.01, 1.0), (0.01, 0.3, 1.0), (0.01, 0.1, 0.3, 1.0)),
    )
    exp = study.exp
    count, epochs = exp.pick(200, 500, 10000), exp.pick(2, 25, 60)
    width = exp.pick(16, 16, 64)
    (x, y), test = cifar(exp.options.data_root, train=count, test=1000)

    def network(p):
        return build(width, p)

    def batch():
        rows = torch.randint(len(x), (BATCH,))
        flip = torch.rand(BATCH, 1, 1, 1) < 0.5
        return torch.where(flip, x[rows].flip(3), x[rows]), y[rows]

    steps, size = epochs * len(x) // BATCH, exp.pick(100, 200, 1000)
    study.run(network, batch, steps, (x, y), test, size)


if __name__ == "__main__":
    main()
