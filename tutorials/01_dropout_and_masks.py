"""Dropout and its masks.

Question: which units did dropout drop, and is that the dropout that I asked for?

    python tutorials/01_dropout_and_masks.py

Draws 01_dropout_and_masks.png. Every cell below also runs as it stands in a notebook.
"""

# %% A model of torch's own dropout. One line turns its layers into ours, in place: what
# held them still does, and `state_dict` stays as it was.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_dropout_ir as tdi

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
)
layer = model[2]
names = list(model.state_dict())
tdi.convert_dropout_(model)
assert type(layer) is tdi.Dropout and list(model.state_dict()) == names

# %% A forward pass leaves its mask: True where a unit was kept. What is kept is scaled
# by 1 / (1 - p), so that the mean over masks is the input.
features = torch.relu(model[0](x[:5]))
dropped = layer(features)
kept = layer.last_mask
print(f"mask {list(kept.shape)}, kept {kept.float().mean():.3f}, asked for 0.700")
torch.testing.assert_close(dropped, torch.where(kept, features / 0.7, 0.0))

# %% Train, and let the layer count. The z-score says how many standard deviations the
# number of kept elements is off its mean under the binomial law. Within +-3 it is
# chance; of 128 units, which have one each, a largest of 3 is too, and of 5 is not.
layer.reset_statistics()
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
for _ in range(200):
    rows = torch.randint(len(x), (32,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()
seen = layer.statistics
print(f"{seen.num_calls} masks, {seen.num_elements} elements")
print(f"kept {seen.keep_rate:.4f}, z = {seen.z_score:+.2f}")
worst = seen.unit_z_scores.abs().max()
print(f"units: largest |z| of {len(seen.unit_kept)} is {worst:.2f}")
assert abs(seen.z_score) < 5 and worst < 5

# %% A dropout of one's own with a fault that no loss curve shows: it draws one row and
# repeats it for the whole batch. The share kept looks right; the z-scores do not.
faulty = tdi.MaskStatistics()
for _ in range(200):
    mask = (torch.rand(128) > 0.3).expand(32, 128)
    faulty = faulty + tdi.MaskStatistics.of_mask(mask, 0.3)
worst = faulty.unit_z_scores.abs().max()
print(
    f"faulty: kept {faulty.keep_rate:.4f}, z = {faulty.z_score:+.2f}, worst {worst:.1f}"
)
assert abs(faulty.keep_rate - 0.7) < 0.02 and worst > 8

# %% Does activation checkpointing drop the same units when it runs the model again? A
# fingerprint is a hash of the mask: equal masks have equal ones. Where the generator is
# not given back, the gradient is that of another mask.
prints = []
layer.register_forward_hook(lambda *_: prints.append(layer.fingerprint))
checkpoint(model, x, use_reentrant=False).sum().backward()
checkpoint(model, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
for name, two in (("as it should be", prints[:2]), ("generator lost", prints[2:])):
    print(f"{name}: forward {two[0]:016x}, recomputed {two[1]:016x}")
assert prints[0] == prints[1] and prints[2] != prints[3]

# %% Some measurements need one network, not a new one each pass: freeze the masks.
model.train()
with tdi.frozen_masks(model, seed=7):
    first, second = model(x), model(x)
assert torch.equal(first, second) and not torch.equal(model(x), model(x))

# %% What was kept in one step, and how often each unit was kept in two hundred.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.imshow(kept.numpy(), cmap="gray_r", aspect="auto", interpolation="nearest")
left.set(title="mask of one step (black: kept)", xlabel="unit", ylabel="sample")
bins = torch.linspace(-24, 24, 97).tolist()
for counted, colour, label in (
    (faulty, "#b2182b", "one row a batch"),
    (seen, "#2166ac", "tdi.Dropout"),
):
    right.hist(counted.unit_z_scores, bins, color=colour, alpha=0.7, label=label)
grid = torch.linspace(-5, 5, 101)
law = torch.exp(-grid.square() / 2) / (2 * torch.pi) ** 0.5 * 128 / 2
right.plot(grid.numpy(), law.numpy(), color="black", lw=1, label="binomial law")
right.set(title="z-scores of 128 units over 200 steps", xlabel="z", ylabel="units")
right.legend(frameon=False, loc="upper left")
figure.savefig("01_dropout_and_masks.png", dpi=110)

# %% What was shown: this dropout is the one asked for, unit by unit; the faulty one is
# not, though it keeps as much.
assert seen.unit_z_scores.abs().max() < 5 < faulty.unit_z_scores.abs().max()
