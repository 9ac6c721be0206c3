"""The measures that an analysis takes, and the protocol for one of the user's own.

A measure sees a :class:`Snapshot` and returns records by tag. It may draw from torch's
generators and run the model through :mod:`torch_dropout_ir.functional`; the analysis
gives back generators, and the model's modes and buffers are never moved by those.
"""

from __future__ import annotations

from torch_dropout_ir.analysis.measures.condensation import Condensation
from torch_dropout_ir.analysis.measures.masks import Masks
from torch_dropout_ir.analysis.measures.regularizer import (
    DropoutNoise,
    ReceivedGradient,
    Regularizer,
    received_r2,
)
from torch_dropout_ir.analysis.measures.sharpness import Sharpness
from torch_dropout_ir.analysis.snapshot import Measure

__all__ = [
    "Condensation",
    "DropoutNoise",
    "Masks",
    "ReceivedGradient",
    "Regularizer",
    "Sharpness",
    "default_measures",
    "received_r2",
]


def default_measures() -> list[Measure]:
    """Return one of each measure.

    Returns:
        What :func:`attach_analysis` takes where it is given no ``measures``.

    Example:
        >>> [measure.name for measure in default_measures()][:4]
        ['gradient', 'regularizer', 'dropout_noise', 'masks']
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> few = [Masks(), Regularizer(num_masks=16)]
        >>> with tdi.attach_analysis(net, measures=few, log_dir=False) as analysis:
        ...     nn.MSELoss()(net(torch.ones(5, 4)), torch.zeros(5, 2)).backward()
        ...     sgd.step()
        >>> "mask/keep_rate/1" in analysis.latest, "sharpness/trace" in analysis.latest
        (True, False)
    """
    return [
        ReceivedGradient(),
        Regularizer(),
        DropoutNoise(),
        Masks(),
        Condensation(),
        Sharpness(),
    ]
