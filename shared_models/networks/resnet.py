"""A small residual network (He et al. 2016, arXiv:1512.03385) of MONAI's residual units, for classification.

The classifier comes before pooling over space and not after it, which leaves a map of where each label's evidence lies
(Zhou et al. 2016, arXiv:1512.04150). Nothing is normalised over space: where it is, a lesion moves the whole background a
little, the network reads it there, and the map shows the background (figures in ``docs/decisions/0014-class-maps.md``).
"""

from __future__ import annotations

from monai.networks.blocks import Convolution, ResidualUnit
from torch import nn

from shared_models.plan import Plan


def build(plan: Plan) -> nn.Module:
    """A freshly initialised residual network for ``plan``.

    It maps float32 ``(batch, input channel, [z,] y, x)`` to class maps ``(batch, label, [z,] y, x)``, coarser by
    ``2 ** (depths - 1)`` along each axis; the task pools them over space.
    """
    dimensions = plan.data.dimensions
    layers: list[nn.Module] = []
    n_in = len(plan.data.channels)
    for depth, n_out in enumerate(plan.task.channels):
        for unit in range(max(1, plan.task.residual_units)):
            stride = 2 if depth and not unit else 1
            dropout = plan.task.dropout
            layers.append(ResidualUnit(dimensions, n_in, n_out, strides=stride, act="RELU", norm=None, dropout=dropout))
            n_in = n_out
    head = Convolution(dimensions, n_in, len(plan.task.labels), kernel_size=1, conv_only=True)
    return nn.Sequential(*layers, head)
