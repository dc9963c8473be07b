"""Networks by the name a plan uses: ``build(plan) -> torch.nn.Module``, over MONAI.

No network here has a layer in which one patient can influence another (no batch statistics): the contract test in
``tests/contracts.py`` finds such a layer by its behaviour.
"""

NETWORKS = {
    "unet": "shared_models.networks.unet:build",
    "resnet": "shared_models.networks.resnet:build",
    "scan-plane": "shared_models.networks.scan_plane:build",
    "cascade": "shared_models.networks.cascade:build",
    "varnet": "shared_models.networks.varnet:build",
    "image-unet": "shared_models.networks.image_unet:build",
}

NETWORKS_FOR = {
    "segmentation": ("unet",),
    "classification": ("resnet", "scan-plane"),
    "reconstruction": ("cascade", "varnet", "image-unet"),
}
"""Networks that answer what a kind of task asks."""

NETWORKS_FOR_ANY_SIZE = ("cascade", "varnet", "image-unet")
"""Networks that take images of any size; for the others sides must be multiples of what their depths divide by."""
