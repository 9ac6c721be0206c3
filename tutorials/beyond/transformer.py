"""A character-level transformer language model

    python tutorials/beyond/transformer.py
    python tutorials/beyond/transformer.py --quick

Two pre-norm blocks with dropout on embeddings, attention weights and both residual
branches, AdamW with a cosine schedule, on windows of 64 characters of the language
reference that Python carries (`pydoc_data.topics`): 6000 characters to learn from,
6000 of other topics to test. `--paper` takes 64 000, a wider network and more steps.
"""

import torch
from study import Study
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

CONTEXT, BATCH, HEADS, BLOCKS = 64, 16, 4, 2


def text(length):
    """Codes of characters of some topics and of others; the size of the alphabet."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[name] for name in sorted(topics))
    half = len(joined) // 2
    alphabet = sorted(set(joined))
    codes = {letter: k for k, letter in enumerate(alphabet)}
    parts = joined[:length], joined[half : half + length]
    return *(torch.tensor([codes[c] for c in part]) for part in parts), len(alphabet)


def windows(codes, starts):
    """Characters ``[n, 64]`` and the ones after each."""
    rows = starts[:, None] + torch.arange(CONTEXT)
    return codes[rows], codes[rows + 1]


class Block(nn.Module):
    """Attention and a two-layer network, each on a residual branch."""

    def __init__(self, width, p):
        super().__init__()
        self.p = p
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(p)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(p),
        )

    def forward(self, x):
        n, t, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(n, t, 3, HEADS, -1).transpose(1, 3)
        q, k, v = parts.unbind(2)
        p = self.drop.p if self.training else 0.0
        seen = scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.drop(self.out(seen.transpose(1, 2).reshape(n, t, width)))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Logits of the next character, ``[n, letters, 64]``."""

    def __init__(self, letters, width, p):
        super().__init__()
        self.letter = nn.Embedding(letters, width)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.drop = nn.Dropout(p)
        self.blocks = nn.Sequential(*(Block(width, p) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters)
        nn.init.normal_(self.letter.weight, std=0.02)

    def forward(self, x):
        x = self.blocks(self.drop(self.letter(x) + self.place))
        return self.head(self.norm(x)).transpose(1, 2)


def main():
    study = Study(
        __doc__,
        "transformer",
        drops=((0.0, 0.2), (0.0, 0.1, 0.2), (0.0, 0.1, 0.2, 0.3)),
        decays=((0.01, 1.0), (0.01, 0.3, 1.0), (0.01, 0.1, 0.3, 1.0)),
    )
    exp = study.exp
    length, steps = exp.pick(4000, 6000, 64000), exp.pick(40, 400, 2000)
    width = exp.pick(32, 32, 128)
    *codes, letters = text(length)
    every = torch.arange(0, length - CONTEXT, CONTEXT)
    train, test = (windows(one, every) for one in codes)

    def network(p):
        return Model(letters, width, p)

    def batch():
        return windows(codes[0], torch.randint(length - CONTEXT, (BATCH,)))

    study.run(network, batch, steps, train, test, exp.pick(16, 48, 250))


if __name__ == "__main__":
    main()
