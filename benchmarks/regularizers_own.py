"""What R_1 costs of models that return their own loss, and losses by alignments."""

import torch
import torch.nn.functional as F
from regularizers_models import in_turns, step
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers import gauss_newton
from torch_dropout_ir.regularizers.online import online

WORDS, LENGTH, SAMPLES, WIDTH, LAYERS = 2000, 64, 8, 128, 4


class Language(nn.Module):
    """A small language model, which makes its loss where it is given the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop = nn.Embedding(WORDS, WIDTH), nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(LENGTH)
        )

    def forward(self, x, labels=None):
        """Return the logits, or a dictionary with the loss of the next words."""
        h = self.drop(self.words(x))
        logits = self.head(self.body(h, mask=self.mask, is_causal=True))
        if labels is None:
            return logits
        return {"loss": following(logits, labels), "logits": logits}


def following(logits, words):
    """Cross-entropy of the words that follow."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def heard(f, y):
    """The loss of texts that are somewhere in the steps."""
    lengths = torch.full((2, len(f)), f.shape[1])
    lengths[1] = y.shape[1]
    return F.ctc_loss(f.transpose(0, 1).log_softmax(-1), y, *lengths)


def own_costs(turns: int) -> None:
    """Print what R_1 takes in training, in steps, where a model has its own loss."""
    torch.manual_seed(0)
    net, x = Language(), torch.randint(WORDS, (SAMPLES, LENGTH))
    inner = resolve_loss(lambda out, _: out["loss"])
    outer = resolve_loss(following)
    found = in_turns(
        {
            "step": step(net, (x, x), following),
            "outside": lambda: online(net, (x, x), outer),
            "its own": lambda: online(net, ((x, x), (x, x)), inner),
        },
        turns,
    )
    said(f"R_1 of a language model, {LAYERS} layers, {SAMPLES} x {LENGTH}", found)
    texts = torch.randn(8, 500, 40), torch.randint(1, 30, (8, 40))
    net = nn.Sequential(
        nn.Linear(40, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 30)
    )
    product = tdi.sharpness.hessian(net, heard, [texts])
    v = torch.randn(product.shape[0])
    found = in_turns(
        {
            "step": step(net, texts, heard),
            "gauss_newton": lambda: gauss_newton(net, texts, heard),
            "a product": lambda: product @ v,
        },
        turns,
    )
    said("CTC, 8 texts of 500 steps", found)


def said(what: str, found: dict[str, float]) -> None:
    """Print times in steps."""
    base = found.pop("step")
    costs = "".join(f"{own / base:>8.2f} {name}" for name, own in found.items())
    print(f"\n{what}: a step {1e3 * base:.1f} ms\n {costs}")
