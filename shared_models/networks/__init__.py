"""Networks by the name a plan uses: ``build(plan) -> torch.nn.Module``, over MONAI.

No network here has a layer in which one patient can influence another (no batch statistics): the contract test in
``tests/contracts.py`` finds such a layer by its behaviour.
"""

NETWORKS = {
    "unet": "shared_models.networks.unet:build",
    "resnet": "shared_models.networks.resnet:build",
    "scan-plane": "shared_models.networks.scan_plane:build",
}

NETWORKS_FOR = {"segmentation": ("unet",), "classification": ("resnet", "scan-plane")}
"""Networks that answer what a kind of task asks."""
