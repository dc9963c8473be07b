"""Networks by the name a plan uses: ``build(plan) -> torch.nn.Module``, over MONAI.

No network here has a layer in which one patient can influence another (no batch statistics): the contract test in
``tests/contracts.py`` finds such a layer by its behaviour.
"""

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
    "reconstruction": ("cascade", "varnet", "image-unet"),
}
"""Networks that answer what a kind of task asks."""

NETWORKS_FOR_ANY_SIZE = ("cascade", "varnet", "image-unet")
"""Networks that take images of any size; for the others sides must be multiples of what their depths divide by."""

WITH_NORMS = frozenset(
    {"unet", "segresnet", "dynunet", "dual-path", "densenet", "efficientnet", "varnet", "image-unet"}
)
"""Networks with normalisation layers that learn, which a strategy may leave at the sites."""
