"""Networks by the name a plan uses: ``build(plan) -> torch.nn.Module``, over MONAI.

No network here has a layer in which one patient can influence another (no batch statistics): the contract test in
``tests/contracts.py`` finds such a layer by its behaviour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared_models.registry import look_up

if TYPE_CHECKING:
    from torch import nn

    from shared_models.plan import Plan

NETWORKS = {
    "unet": "shared_models.networks.unet:build",
    "resnet": "shared_models.networks.resnet:build",
    "scan-plane": "shared_models.networks.scan_plane:build",
}

NETWORKS_FOR = {"segmentation": ("unet",), "classification": ("resnet", "scan-plane")}
"""Networks that answer what a kind of task asks."""


def build(plan: Plan) -> nn.Module:
    """The network that a plan names, freshly initialised, with a discriminator where the plan asks for an adversary.

    The network's own parameters are the same with and without.
    """
    network: nn.Module = look_up(NETWORKS, plan.task.network)(plan)
    if not plan.is_adversarial:
        return network
    from shared_models.adaptation import Adapted

    return Adapted(network, plan)
