"""Property-test the regularizer formula on a model of your own.

Question: is what dropout adds to *my* loss really the formula that I want to publish?

    python tutorials/06_property_testing.py

Every cell below also runs as it stands in a notebook (Jupytext, VS Code).
"""

# %% A model of your own. Small, so that every mask can be taken; float64, so that
# rounding hides nothing.
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_dropout_ir as tdi


class MyModel(nn.Module):
    """A residual block with dropout, and a head."""

    def __init__(self, width: int = 5, p: float = 0.2) -> None:
        super().__init__()
        self.inner = nn.Linear(3, width)
        self.outer = nn.Linear(width, width)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.head(self.drop(h + torch.tanh(self.outer(h))))


torch.manual_seed(0)
model = MyModel().double()
batch = torch.randn(6, 3).double(), torch.randn(6, 2).double()

# %% The truth: the loss averaged over all 2^5 masks, less the loss without dropout.
with_dropout = tdi.testing.expected_dropout_loss(model, batch, "mse")
without = nn.functional.mse_loss(model.eval()(batch[0]), batch[1]).detach()
model.train()
truth = float(with_dropout - without)
print(f"E[R_drop] = {with_dropout:.6f}, R_S = {without:.6f}, R_1 = {truth:.6f}\n")

# %% Which estimators tell it? One call asks all of them. "exact" must agree to
# rounding, "unbiased" within five standard errors; "second order" promises nothing.
report = tdi.testing.check_regularizer(model, batch, "mse", num_masks=500)
print(report)
report.assert_holds()
assert abs(report.truth - truth) < 1e-12

# %% Here dropout sits straight before the last linear layer and the loss is squared:
# Lemma 1 holds, and the closed form is R_1. With cross-entropy it no longer is:
labels = torch.tensor([0, 1, 1, 0, 1, 0])
other = tdi.testing.check_regularizer(
    model, (batch[0], labels), "cross_entropy", num_masks=500
)
print("\nthe same model under cross-entropy")
print(other)
other.assert_holds()
by_name = {finding.name: finding for finding in other.findings}
assert by_name["last_layer"].claim == "second order"

# %% One batch proves little. Hypothesis looks for a width, a p, a batch and a start
# that break the claim, and shrinks what it finds: a test to keep in your own suite.


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 5),
    tdi.testing.drop_probabilities(0.01, 0.9),
    st.integers(1, 4),
    st.integers(0, 2**16),
)
def test_lemma_1_holds_for_my_model(width, p, samples, seed):
    torch.manual_seed(seed)
    model = MyModel(width, p).double()
    batch = torch.randn(samples, 3).double(), torch.randn(samples, 2).double()
    report = tdi.testing.check_regularizer(model, batch, "mse", num_masks=50)
    report.assert_holds()
    assert "last_layer" in report.agreeing


test_lemma_1_holds_for_my_model()
print("\nLemma 1 holds on 20 models, batches and p")

# %% A model too large for all of its masks is held against masks at random, and the
# report carries the error of that.
large = MyModel(width=200)
batch = torch.randn(32, 3), torch.randn(32, 2)
report = tdi.testing.check_regularizer(large, batch, "mse", num_masks=500, rtol=1e-4)
print("\n200 units")
print(report)
report.assert_holds()

# %% Several inputs are a tuple (or a dict); of several outputs the loss takes what it
# needs. How a loss of your own is made is not known: no form is called "exact" then.


class Scaled(MyModel):
    """Two inputs, and two outputs."""

    def forward(self, x, scale):
        outputs = super().forward(scale * x)
        return outputs, outputs.norm()


inputs, targets = (torch.randn(6, 3), torch.rand(6, 1)), torch.randn(6, 2)
batch = tuple(x.double() for x in inputs), targets.double()
first = lambda outputs, y: nn.functional.mse_loss(outputs[0], y)  # noqa: E731
scaled = tdi.testing.check_regularizer(Scaled().double(), batch, first, num_masks=500)
print("\ntwo inputs, two outputs")
print(scaled)
scaled.assert_holds()

# %% What was shown: the closed form is what dropout adds, on this model and this loss,
# and it is not under another loss.
assert "last_layer" in report.agreeing and "last_layer" not in other.agreeing
