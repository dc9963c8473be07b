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
    "segresnet": "shared_models.networks.segresnet:build",
    "dynunet": "shared_models.networks.dynunet:build",
    "dual-path": "shared_models.networks.dual_path:build",
    "resnet": "shared_models.networks.resnet:build",
    "scan-plane": "shared_models.networks.scan_plane:build",
    "densenet": "shared_models.networks.densenet:build",
    "efficientnet": "shared_models.networks.efficientnet:build",
    "cascade": "shared_models.networks.cascade:build",
    "varnet": "shared_models.networks.varnet:build",
    "image-unet": "shared_models.networks.image_unet:build",
}

NETWORKS_FOR = {
    "segmentation": ("unet", "segresnet", "dynunet", "dual-path"),
    "classification": ("resnet", "scan-plane", "densenet", "efficientnet"),
    "quantification": ("resnet", "scan-plane", "densenet", "efficientnet"),
    "reconstruction": ("cascade", "varnet", "image-unet"),
}
"""Networks that answer what a kind of task asks."""

NETWORKS_FOR_ANY_SIZE = ("cascade", "varnet", "image-unet")
"""Networks that take images of any size; for the others sides must be multiples of what their depths divide by."""

WITH_NORMS = frozenset(
    {"unet", "segresnet", "dynunet", "dual-path", "densenet", "efficientnet", "varnet", "image-unet"}
)
"""Networks with normalisation layers that learn, which a strategy may leave at the sites."""

NOT_BY_IMAGE = frozenset({"segresnet", "dynunet"})
"""Networks that add in place what Opacus has hooked, so it cannot take their gradient apart into images."""


def build(plan: Plan) -> nn.Module:
    """The network that a plan names, freshly initialised, with a discriminator where the sites train one.

    The network's own parameters are the same with and without.
    """
    network: nn.Module = look_up(NETWORKS, plan.task.network)(plan)
    if not plan.has_discriminator:
        return network
    from shared_models.adaptation import Adapted

    return Adapted(network, plan)
