r"""Floor 2: orientations of neurons, and how few of them there are.

Semantics:

* The input weight of neuron ``j`` is its row of incoming weights with its bias
  appended; its orientation is that vector over its norm.
* Two neurons are parallel when the cosine of their input weights exceeds a threshold,
  0.95 in the paper. The cosine is signed: opposite neurons are not condensed.
* A neuron of norm zero, below a stated share of the largest, or not finite is dead: it
  has no orientation, is counted apart and never as a cluster.
* In few dimensions the number of directions says little: weights in the plane (inputs
  of one dimension) cover the circle by about ten whatever they do.
"""

from torch_dropout_ir.condensation.compare import (
    Movement,
    closest,
    movement,
    orientation_angles,
    principal_plane,
    project_orientations,
)
from torch_dropout_ir.condensation.cover import (
    EffectiveNeurons,
    cluster_order,
    effective_neurons,
)
from torch_dropout_ir.condensation.graph import Outgoing, outgoing_weights
from torch_dropout_ir.condensation.layers import input_weights, named_input_weights
from torch_dropout_ir.condensation.merge import LayerMerge, Merged, merge_condensed
from torch_dropout_ir.condensation.orientation import (
    CosineStatistics,
    amplitudes,
    cosine_similarity,
    cosine_statistics,
    orientations,
)

__all__ = [
    "CosineStatistics",
    "EffectiveNeurons",
    "LayerMerge",
    "Merged",
    "Movement",
    "Outgoing",
    "amplitudes",
    "closest",
    "cluster_order",
    "cosine_similarity",
    "cosine_statistics",
    "effective_neurons",
    "input_weights",
    "merge_condensed",
    "movement",
    "named_input_weights",
    "orientation_angles",
    "orientations",
    "outgoing_weights",
    "principal_plane",
    "project_orientations",
]
