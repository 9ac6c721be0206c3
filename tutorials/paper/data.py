"""The data sets of the paper as tensors."""

import sys
from pathlib import Path

import numpy as np
import torch


def mnist(root, train=None, test=None):
    """The first images of MNIST: ``(x [n, 784], y [n]), (test_x, test_y)``.

    x is in [0, 1]. ``train`` and ``test`` are numbers of images; None takes all.
    """
    from torchvision.datasets import MNIST

    halves = _halves(MNIST, root)
    return tuple(
        (half.data[:n].flatten(1).float() / 255, half.targets[:n])
        for half, n in zip(halves, (train, test), strict=True)
    )


def cifar(root, classes=10, train=None, test=None):
    """The first images of CIFAR: ``(x [n, 3, 32, 32], y [n]), (test_x, test_y)``.

    Each channel has mean 0 and variance 1 over the training images taken. Where
    ``root`` has the lossless subset ``cifar<classes>_subset.npz`` (10 000 + 5000 images
    in an order of its own) it is read, else torchvision's data set.
    """
    subset = Path(root) / f"cifar{classes}_subset.npz"
    if subset.is_file():
        with np.load(subset) as held:
            pairs = [
                (held[f"x_{half}"], held[f"y_{half}"]) for half in ("train", "test")
            ]
    else:
        from torchvision import datasets

        halves = _halves(getattr(datasets, f"CIFAR{classes}"), root)
        pairs = [(half.data, np.array(half.targets)) for half in halves]
    (x, y), (test_x, test_y) = (
        (torch.from_numpy(images[:n]).permute(0, 3, 1, 2).float() / 255,
         torch.from_numpy(np.asarray(labels[:n])).long())
        for (images, labels), n in zip(pairs, (train, test), strict=True)
    )  # fmt: skip
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    return ((x - mean) / std, y), ((test_x - mean) / std, test_y)


def _halves(dataset, root):
    """To train on and to test; where there are none the script ends with a sentence."""
    try:
        return [dataset(str(root), train=t, download=True) for t in (True, False)]
    except (RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        sys.exit(f"--data-root: found no {dataset.__name__} under {root}. {said}")


def accuracy(model, x, y, batch=1000):
    """Percent of ``y`` that ``model``, evaluated, finds; without targets of -100.

    The model's output is ``[n, classes]`` or ``[n, classes, words]``.
    """
    was = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x[k : k + batch]).argmax(1) == y[k : k + batch]).sum())
            for k in range(0, len(x), batch)
        )
    model.train(was)
    return 100 * right / int((y != -100).sum())
