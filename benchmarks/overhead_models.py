"""The models whose training `overhead.py` measures, each with a batch of practice."""

import functools
import time

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


class GPT(nn.Module):
    """Four blocks of width 192, 128 tokens, dropout 0.1 on what each branch adds."""

    def __init__(self, vocabulary: int = 96, width: int = 192, tokens: int = 128):
        super().__init__()
        self.symbols = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(tokens, width) / 50)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x):
        """Logits of the next symbols, ``[batch, vocabulary, tokens]``."""
        h = self.drop(self.symbols(x) + self.places)
        for block in self.blocks:
            h = block(h)
        return self.head(h).transpose(1, 2)


class Block(nn.Module):
    """Attention and a feed-forward net, each beside a residual path."""

    def __init__(self, width: int, heads: int = 6):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(2))

    def forward(self, x):
        """The residual stream after this block."""
        parts = self.mix(self.norms[0](x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drops[0](self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drops[1](self.narrow(F.gelu(self.wide(self.norms[1](x)))))


def mlp():
    """A model and a batch of 128."""
    model = nn.Sequential(
        nn.Linear(784, 1000), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(1000, 1000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1000, 10),
    )  # fmt: skip
    return model, torch.randn(128, 784), torch.randint(10, (128,))


def resnet18():
    """A model and a batch of 32: a CPU's share of the usual 128."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1), nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    return model, torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


def gpt():
    """A model and a batch of 8 texts of 128 symbols."""
    return GPT(), torch.randint(96, (8, 128)), torch.randint(96, (8, 128))


def tiny():
    """A model whose step is little but calls."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    return model, torch.randn(4, 8), torch.randint(4, (4,))


# Samples of the batch where a step's own time does not matter.
FEW = {"mlp": 16, "resnet18": 2, "gpt": 1, "tiny": 4}
MODELS = {"mlp": mlp, "resnet18": resnet18, "gpt": gpt, "tiny": tiny}
TITLES = {"mlp": "MLP", "resnet18": "ResNet-18", "gpt": "small GPT"}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.01),
    "momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-3),
}


class Script:
    """A training loop, watched or not."""

    def __init__(
        self, name: str, optimizer: str = "sgd", batch: int | None = None, **options
    ):
        torch.manual_seed(0)
        self.model, *pair = MODELS[name]()
        self.inputs, self.targets = (x[:batch] for x in pair)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.criterion = nn.CrossEntropyLoss()
        self.analysis = None
        if options:
            import torch_dropout_ir as tdi  # a bare script does without

            self.analysis = tdi.attach_analysis(
                self.model, optimizer=self.optimizer, log_dir=False, **options
            )

    def run(self, steps: int) -> float:
        """Train; return the seconds that it took."""
        if self.analysis is not None:
            # It has stood still while the other script ran: that earns it nothing.
            self.analysis._clock = time.perf_counter()
        started = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.criterion(self.model(self.inputs), self.targets).backward()
            self.optimizer.step()
        return time.perf_counter() - started
