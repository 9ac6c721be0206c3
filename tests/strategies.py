"""Small models for hypothesis."""

import torch
from hypothesis import strategies as st
from torch import nn

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.Identity)


@st.composite
def networks(draw, max_width=6, max_depth=3):
    """A float64 network with dropout straight before its last linear layer."""
    width = draw(st.integers(1, max_width))
    depth = draw(st.integers(1, max_depth))
    inputs = draw(st.integers(1, 4))
    outputs = draw(st.integers(1, 3))
    activation = draw(st.sampled_from(ACTIVATIONS))
    p = draw(st.floats(0.0, 0.95))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), activation()]
    layers += [nn.Dropout(p), nn.Linear(width, outputs)]
    net = nn.Sequential(*layers).double()
    samples = draw(st.integers(1, 5))
    batch = (
        torch.randn(samples, inputs, dtype=torch.float64),
        torch.randn(samples, outputs, dtype=torch.float64),
    )
    return net, batch, p, width
