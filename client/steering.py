"""What acts on every step of a site's training besides its patients' gradients.

It is added to the gradient that the optimiser gets; under ``[privacy]`` that is the noised one, so nothing here touches a
patient's own gradient or what the noise has to hide.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared_models.weights import Weights


class Steering:
    """A pull towards weights, and a constant correction.

    Parameters
    ----------
    network
        Whose gradients are changed.
    towards, strength
        Each step's gradient gets ``strength * (parameter - towards)``: the proximal term of FedProx (Li et al. 2020,
        arXiv:1812.06127, eq. 2), and the pull of a personal model in Ditto (Li et al. 2021, arXiv:2012.04221, eq. 1).
    correction
        Each step's gradient gets this too, by parameter: SCAFFOLD's ``c - c_i`` (Karimireddy et al. 2020,
        arXiv:1910.06378, eq. 3). Empty for none.
    """

    def __init__(
        self, network: nn.Module, *, towards: Weights | None = None, strength: float = 0.0, correction: Weights
    ) -> None:
        self._parameters = list(network.parameters())
        names = [name for name, _ in network.named_parameters()]
        self._strength = strength
        self._anchors = self._tensors(towards, names) if towards is not None and strength else []
        self._correction = self._tensors(correction, names) if correction else []

    def act(self) -> None:
        """Add it all to the gradients that are there."""
        for parameter, anchor in zip(self._parameters, self._anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._strength)
        for parameter, correction in zip(self._parameters, self._correction, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(correction)

    def _tensors(self, weights: Weights, names: list[str]) -> list[Tensor]:
        """Copies, on the network's device: what arrived is read-only."""
        return [
            torch.tensor(weights[name], dtype=p.dtype, device=p.device)
            for name, p in zip(names, self._parameters, strict=True)
        ]
