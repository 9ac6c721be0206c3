"""Condensation and merging.

Question: how many neurons does my network really have?

    python tutorials/03_condensation.py

Draws 03_condensation.png. Every cell below also runs as it stands in a notebook.
"""

# %% 50 neurons fit 30 points of tanh(x_1 + ... + x_10), which a single one could do: on
# the loss alone, with dropout, and without it but with R_1 added (the paper's Fig. 7).
import matplotlib.pyplot as plt
import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation

generator = torch.Generator().manual_seed(0)
x = 0.5 * torch.randn(30, 10, generator=generator)
y = torch.tanh(x.sum(1, keepdim=True))
unseen = 0.5 * torch.randn(1000, 10, generator=generator)
P = 0.5


def train(kind, steps=4000):
    torch.manual_seed(0)
    layers = nn.Linear(10, 50), nn.Tanh(), nn.Dropout(P), nn.Linear(50, 1)
    model = tdi.convert_dropout_(nn.Sequential(*layers))
    if kind != "dropout":
        model.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, 2 * (1 - step / steps))
        features = model[:2](x)
        loss = tdi.half_squared_error(model[2:](features), y)
        if kind == "R_1":
            loss = loss + tdi.regularizers.last_layer(
                features, model[3].weight, P, loss=tdi.half_squared_error
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


models = {kind: train(kind) for kind in ("nothing", "dropout", "R_1")}

# %% A neuron's orientation is its input weight (its bias appended) over its norm. How
# many directions are there, at a cosine of 0.95? Neurons that hardly act, below a
# twentieth of the largest amplitude, have no say.
covers = {}
for kind, model in models.items():
    weights = condensation.input_weights(model[0]).detach()
    size = condensation.amplitudes(weights, model[3].weight.detach())
    covers[kind] = condensation.effective_neurons(weights, 0.95, 0.05, amplitude=size)
    print(f"with {kind:9}{covers[kind].count:4} directions of", end="")
    print(f"{50 - covers[kind].num_dead:4} neurons that act")

# %% Neurons of one direction can be made one. The report says what that changed, on the
# inputs given; the function between them is ours to look at.


@torch.no_grad()
def error(net):
    """Mean squared error where the network was not trained."""
    return float((net(unseen)[:, 0] - torch.tanh(unseen.sum(1))).square().mean())


merged = {
    kind: condensation.merge_condensed(model, x, 0.95, min_amplitude=0.05)
    for kind, model in models.items()
}
print("\nwith       neurons merged   outputs changed   error unseen   merged")
for kind, small in merged.items():
    size, change = small.layers["0"], 100 * small.relative_change
    before, after = error(models[kind]), error(small.model)
    print(f"{kind:8}{size.before:10}{size.after:7}{change:16.2g} %", end="")
    print(f"{before:15.2g}{after:9.2g}")

# %% Cosines between the neurons, those of one direction side by side.
figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
for panel, (kind, model) in zip(panels, models.items(), strict=True):
    weights = condensation.input_weights(model[0]).detach()
    weights = weights[condensation.cluster_order(weights)]
    cosines = condensation.cosine_similarity(weights).numpy()
    image = panel.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    after = merged[kind].layers["0"].after
    panel.set(title=f"with {kind}: 50 neurons to {after}", xlabel="neuron")
panels[0].set_ylabel("neuron")
figure.colorbar(image, ax=panels, label="cosine", shrink=0.8)
figure.savefig("03_condensation.png", dpi=110)

# %% What was shown: with dropout 50 neurons are a few, told many times; R_1 alone does
# it too; and the small network that they are can take their place.
assert covers["nothing"].count > 30
assert covers["dropout"].count <= 10 and covers["R_1"].count <= 10
for kind in ("dropout", "R_1"):
    assert merged[kind].relative_change < 0.1
    assert error(merged[kind].model) < error(models["nothing"]) / 3
