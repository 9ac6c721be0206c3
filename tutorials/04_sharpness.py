"""Sharpness under dropout.

Question: is the minimum that dropout finds flatter, and how sure is that number?

    python tutorials/04_sharpness.py

Draws 04_sharpness.png. Every cell below also runs as it stands in a notebook.
"""

# %% Two networks from one start, on digits: without dropout, and with it.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import sharpness

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = nn.functional.one_hot(torch.tensor(digits.target)).float()
batch = x[:200], y[:200]
loss = tdi.half_squared_error


def train(p, steps=400):
    torch.manual_seed(0)
    layers = nn.Linear(64, 100), nn.ReLU(), tdi.Dropout(p), nn.Linear(100, 10)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model


models = {"without dropout": train(0.0), "with dropout": train(0.5)}

# %% Curvature is that of R_S, the loss with dropout off. The largest eigenvalue comes
# with a residual: an eigenvalue lies within it. The trace of a ReLU network is exact;
# where it is not, it has a standard error.
operators = {
    name: sharpness.hessian(model, loss, batch) for name, model in models.items()
}
traces = {name: sharpness.trace(op) for name, op in operators.items()}
tops = {name: sharpness.top_eigenvalues(op) for name, op in operators.items()}
for name in models:
    print(f"{name:16} trace {traces[name].value:8.3f}, method {traces[name].method}")
    print(f"{'':16} top   {tops[name].values[0]:8.3f} +- {tops[name].residuals[0]:.0e}")

# %% Is the exact trace right? Probes at random tell the same, with their error.
torch.manual_seed(0)
probed = sharpness.trace(operators["with dropout"], 200, method="hutchinson")
print(f"200 products: {probed.value:.3f} +- {probed.standard_error:.3f}")
assert abs(probed.value - traces["with dropout"].value) < 4 * probed.standard_error

# %% A trap. With dropout *on*, each product would see another Hessian, and what an
# eigenvalue solver then finds is nobody's. Frozen at a seed it is one symmetric matrix,
# and over several seeds it has a spread.
frozen = [
    float(
        sharpness.top_eigenvalues(
            sharpness.hessian(models["with dropout"], loss, batch, masks=seed)
        ).values[0]
    )
    for seed in range(5)
]
print("top eigenvalue under five frozen masks:", *(f"{value:.3f}" for value in frozen))

# %% The whole spectrum, and the loss along one random direction, of the length of the
# weights (filter by filter), the same random numbers for both networks.
alphas = torch.linspace(-1, 1, 41)
slices, densities = {}, {}
for name, model in models.items():
    torch.manual_seed(3)
    direction = sharpness.filter_normalized_direction(model)
    slices[name] = sharpness.loss_slice(model, loss, batch, alphas, direction)
    densities[name] = sharpness.spectral_density(operators[name], 30, num_probes=4)
    # The level is twice the loss, at least twice `floor`: the same for both here. The
    # width is a distance in the parameters; a step of the slice, one length of them.
    found = sharpness.interval_flatness(model, loss, batch, direction, floor=0.05)
    print(f"{name:16} valley {found.width:.3f} wide at a loss of {found.level:.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, colour in (("without dropout", "#4d4d4d"), ("with dropout", "#2166ac")):
    left.plot(alphas.numpy(), slices[name].numpy(), color=colour, label=name)
    found = densities[name]
    right.plot(found.grid.numpy(), found.density.numpy(), color=colour, label=name)
left.set(title="loss along a random direction", xlabel="step, in lengths of weights")
left.set(ylabel="R_S", yscale="log")
right.set(title="density of the Hessian's eigenvalues", xlabel="eigenvalue")
highest = max(float(found.density.max()) for found in densities.values())
right.set(ylabel="density", yscale="log", ylim=(1e-5, 2 * highest))
left.legend(frameon=False)
figure.savefig("04_sharpness.png", dpi=110)

# %% What was shown: where dropout ends is flatter, by an exact trace and by an
# eigenvalue known within its residual. It is also higher: dropout minimizes R_S + R_1,
# not the R_S that is drawn here.
plain, flat = (tops[name] for name in models)
assert traces["with dropout"].value < 0.8 * traces["without dropout"].value
assert flat.values[0] + flat.residuals[0] < plain.values[0] - plain.residuals[0]
