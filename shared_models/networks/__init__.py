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
}

NETWORKS_FOR = {
    "segmentation": ("unet", "segresnet", "dynunet", "dual-path"),
    "classification": ("resnet", "scan-plane", "densenet", "efficientnet"),
}
"""Networks that answer what a kind of task asks."""

WITH_NORMS = frozenset({"unet", "segresnet", "dynunet", "dual-path", "densenet", "efficientnet"})
"""Networks with normalisation layers that learn, which a strategy may leave at the sites."""
