"""German to English on Multi30k: the pairs as numbers, and a small Transformer.

A batch is ``x [n, 2, L]``, the German words and the English ones from :data:`START` on,
and ``y [n, L]``, the English words up to :data:`END`, so that ``y[:, t]`` is the word
after ``x[:, 1, t]``. Rows are filled up with :data:`PAD`, in ``y`` with -100, which
torch's cross-entropy leaves out.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

PAD, START, END, UNKNOWN = range(4)
NO_TARGET = -100


# %% The pairs
def words(sentence):
    """Lower-case words and punctuation marks of a sentence."""
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


def vocabulary(sentences, least=2):
    """Numbers of the words that occur at least twice, the most frequent first."""
    counts = Counter(word for sentence in sentences for word in sentence)
    often = [word for word, count in counts.most_common() if count >= least]
    return {word: k for k, word in enumerate(often, UNKNOWN + 1)}


def numbers(sentences, known):
    """Rows of numbers, ``[n, longest]``."""
    rows = [torch.tensor([known.get(w, UNKNOWN) for w in one]) for one in sentences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def batch(german, english):
    """``x`` and ``y`` of rows of numbers that are filled up with :data:`PAD`."""
    n, longest = len(german), max(german.shape[1], english.shape[1] + 1)
    x = torch.full((n, 2, longest), PAD)
    x[:, 0, : german.shape[1]] = german
    x[:, 1, 0] = START
    x[:, 1, 1 : 1 + english.shape[1]] = english
    y = torch.full((n, longest), NO_TARGET)
    y[:, :-1] = torch.where(x[:, 1, 1:] == PAD, NO_TARGET, x[:, 1, 1:])
    y[torch.arange(n), (x[:, 1] != PAD).sum(1) - 1] = END
    return x, y


def trim(x, y):
    """The same batch without the columns that no row fills."""
    longest = int((x != PAD).sum(2).max())
    return x[:, :, :longest], y[:, :longest]


def of_one_length(x, n):
    """Random rows for a batch of n, of similar lengths: there is little to fill up."""
    rows = torch.randint(len(x), (8 * n,))
    rows = rows[(x[rows] != PAD).sum(2).amax(1).argsort(stable=True)]
    return rows[n * torch.randint(8, (1,)) + torch.arange(n)]


def multi30k(root, train, test=None):
    """The first pairs as two batches, and the sizes of the two vocabularies.

    Args:
        root: Folder with ``multi30k/train.de`` and so on, one sentence a line.
        train: Number of training pairs; the vocabularies are theirs.
        test: Number of pairs of the test of 2016; None takes all.

    Returns:
        ``(x, y), (test_x, test_y), (German words, English words)``.

    Raises:
        SystemExit: If a file is not there.
    """
    folder = Path(root) / "multi30k"
    held = {}
    for half, n in (("train", train), ("test_2016_flickr", test)):
        for language in ("de", "en"):
            path = folder / f"{half}.{language}"
            if not path.is_file():
                sys.exit(
                    f"--data-root: expected {path}, one sentence a line, and there is "
                    "none: put task 1 of Multi30k there (github.com/multi30k/dataset)"
                )
            lines = path.read_text(encoding="utf-8").splitlines()[:n]
            held[half, language] = [words(line) for line in lines]
    known = [vocabulary(held["train", language]) for language in ("de", "en")]
    halves = [
        batch(numbers(held[half, "de"], known[0]), numbers(held[half, "en"], known[1]))
        for half in ("train", "test_2016_flickr")
    ]
    return *halves, tuple(UNKNOWN + 1 + len(one) for one in known)


# %% The network
class Attention(nn.Module):
    """Heads of their own sizes d_k and d_v, which need not make up d_model."""

    def __init__(self, d_model, heads, d_k, d_v):
        super().__init__()
        self.heads = heads
        self.q, self.k = (nn.Linear(d_model, heads * d_k) for _ in range(2))
        self.v = nn.Linear(d_model, heads * d_v)
        self.out = nn.Linear(heads * d_v, d_model)

    def forward(self, x, seen, mask):
        """What ``x [n, t, d]`` finds in ``seen [n, s, d]`` where ``mask`` is True."""
        q, k, v = (
            to(one).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for to, one in ((self.q, x), (self.k, seen), (self.v, seen))
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.out(found.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention to itself, in a decoder to the source too, and two linear layers."""

    def __init__(self, sizes, p, decoder):
        super().__init__()
        d_model, heads, d_k, d_v, d_ff, _ = sizes
        self.attentions = nn.ModuleList(
            Attention(d_model, heads, d_k, d_v) for _ in range(1 + decoder)
        )
        self.linear = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2 + decoder))
        self.drop = nn.Dropout(p)

    def forward(self, x, mask, source=None, source_mask=None):
        """``x [n, t, d]`` after each part is added and normalized."""
        x = self.norms[0](x + self.drop(self.attentions[0](x, x, mask)))
        if source is not None:
            found = self.attentions[1](x, source, source_mask)
            x = self.norms[1](x + self.drop(found))
        return self.norms[-1](x + self.drop(self.linear(x)))


class Transformer(nn.Module):
    """Logits of the next English word, ``[n, words, L]``, from ``x [n, 2, L]``.

    Args:
        vocabularies: Sizes of the German and the English one.
        sizes: d_model, heads, d_k, d_v, d_ff, layers.
        p: Probability of dropout, of the embedded words and the output of each part.
    """

    def __init__(self, vocabularies, sizes, p):
        super().__init__()
        d_model, layers = sizes[0], sizes[-1]
        self.embeddings = nn.ModuleList(nn.Embedding(n, d_model) for n in vocabularies)
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(sizes, p, decoder) for _ in range(layers))
            for decoder in (False, True)
        )
        self.head, self.drop = nn.Linear(d_model, vocabularies[1]), nn.Dropout(p)
        for one in self.parameters():
            if one.ndim > 1:
                nn.init.xavier_uniform_(one)

    def forward(self, x):
        longest = x.shape[2]
        place = positions(longest, self.head.in_features, x.device)
        source, target = (
            self.drop(embedding(one) * place.shape[1] ** 0.5 + place)
            for embedding, one in zip(self.embeddings, x.unbind(1), strict=True)
        )
        # PAD comes last: no English word before it can look at it.
        filled = (x[:, 0] != PAD)[:, None, None]
        past = torch.ones(longest, longest, dtype=torch.bool, device=x.device).tril()
        for layer in self.encoder:
            source = layer(source, filled)
        for layer in self.decoder:
            target = layer(target, past, source, filled)
        return self.head(target).transpose(1, 2)


def positions(length, width, device=None):
    """Sines and cosines of a position, ``[length, width]``, of falling frequency."""
    place = torch.arange(length, device=device)[:, None]
    angles = place * 1e4 ** (-torch.arange(0, width, 2, device=device) / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def warmed(step, d_model, warm_up):
    """Learning rate: rising for ``warm_up`` steps, then as one over a square root."""
    step += 1
    return d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)
