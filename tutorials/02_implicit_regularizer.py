"""R_1 and R_2 of your own model.

Question: what does dropout add to my loss, and is that all that it does for me?

    python tutorials/02_implicit_regularizer.py

Draws 02_implicit_regularizer.png. Every cell also runs as it stands in a notebook.
"""

# %% A model, its data and its loss: digits, fitted by least squares as in the paper.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from torch_dropout_ir import half_squared_error, regularizers

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:200], order[200:]
batch = x[train], nn.functional.one_hot(y[train]).float()


def fit(p, kind=None, std=0.1, steps=300, lr=0.06):
    """Gradient descent from one start: with dropout, or on R_S + R_1 without a mask."""
    torch.manual_seed(1)
    layers = nn.Linear(64, 300), nn.ReLU(), nn.Dropout(p), nn.Linear(300, 10)
    model = nn.Sequential(*layers)
    for one in model.parameters():
        nn.init.normal_(one, std=std)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        if kind is None:
            loss = half_squared_error(model(batch[0]), batch[1])
        else:
            loss = regularizers.modified_loss(
                model, batch, half_squared_error, kind=kind
            )
        loss.backward()
        optimizer.step()
    return model


model = fit(0.5)

# %% R_1 is the mean over masks of the loss with dropout, less the loss without. Sampled
# masks tell it of any model, with the error of that. Here dropout sits straight before
# the last layer and the loss is squared: then a formula gives it without a mask.
sampled = regularizers.monte_carlo(model, batch, half_squared_error, num_masks=400)
print(f"monte_carlo   {sampled.value:.5f} +- {sampled.standard_error:.5f}")
exact = regularizers.gauss_newton(model, batch, half_squared_error, num_samples=None)
print(f"gauss_newton  {exact.value:.5f}, exact: {exact.exact}")
features = torch.relu(model[0](batch[0]))
r1 = regularizers.last_layer(features, model[3].weight, 0.5, loss=half_squared_error)
print(f"last_layer    {r1:.5f}")
assert exact.exact and abs(r1 - sampled.value) < 4 * sampled.standard_error

# %% Another loss, another R_1: the formulas know the loss's curvature, and of one that
# is not squared they are the second order. An estimate says which of the two it is.
truth = regularizers.monte_carlo(model, (x[train], y[train]), "cross_entropy")
second = regularizers.gauss_newton(
    model, (x[train], y[train]), "cross_entropy", num_samples=None
)
print(f"under cross-entropy {truth.value:.5f} +- {truth.standard_error:.5f} by masks,")
print(f"{second.value:.5f} by gauss_newton, exact: {second.exact}")
assert not second.exact

# %% R_2 is what a finite step adds: a quarter of the learning rate times the squared
# gradient. A part of it is the gradient of R_S + R_1, the rest the noise of the masks.
r2 = regularizers.gradient_norm(model, batch, half_squared_error, lr=0.06, num_masks=64)
print(f"R_2 {r2.value:.6f} +- {r2.standard_error:.6f}, of which")
print(f"    {r2.mean_gradient:.6f} mean gradient, {r2.dropout_noise:.6f} masks")
torch.testing.assert_close(r2.value, r2.mean_gradient + r2.dropout_noise)

# %% Is R_1 all that dropout does for the model? Train again without a single mask, R_1
# added to the loss by formula, and once without either.


@torch.no_grad()
def found(model, p):
    """R_1 at ``p`` and percent of the test images found."""
    h = torch.relu(model[0](batch[0]))
    value = regularizers.last_layer(h, model[3].weight, p, loss=half_squared_error)
    right = model.eval()(x[test]).argmax(1) == y[test]
    return float(value), 100 * float(right.float().mean())


drops = (0.1, 0.4, 0.7)
plain = fit(0.0)
rows = {
    "dropout": torch.tensor([found(fit(p), p) for p in drops]),
    "R_S + R_1": torch.tensor([found(fit(p, "L1"), p) for p in drops]),
    "R_S alone": torch.tensor([found(plain, p) for p in drops]),
}
print("\ntrained with    R_1 at p =" + "".join(f"{p:9.1f}" for p in drops))
for name, values in rows.items():
    print(f"{name:26}" + "".join(f"{value:9.4f}" for value in values[:, 0]))

# %% Drawn, with what came of it on images not seen. After so short a training dropout
# costs accuracy here; the formula costs the same.
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, values), style in zip(rows.items(), ("bo-", "rs--", "k^:"), strict=True):
    for panel, column in zip(panels, values.T, strict=True):
        panel.plot(drops, column.numpy(), style, label=name)
panels[0].set(title="R_1 at p, after training", xlabel="p", yscale="log")
panels[1].set(title="test accuracy (%)", xlabel="p", ylim=(85, 95))
panels[0].legend(frameon=False)
figure.savefig("02_implicit_regularizer.png", dpi=110)

# %% What was shown: without a mask, from its formula alone, R_1 makes the model that
# dropout makes: as small an R_1, which training without either does not reach, and the
# same accuracy.
dropout, formula, without = rows.values()
assert torch.allclose(dropout[:, 0], formula[:, 0], rtol=0.1)
assert (without[:, 0] > 3 * dropout[:, 0]).all()
assert (dropout[:, 1] - formula[:, 1]).abs().max() < 2
