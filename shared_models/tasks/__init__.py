"""Tasks by the name a plan uses. A task is one module here; nothing else in the house asks which task it is."""

TASKS = {
    "segmentation": "shared_models.tasks.segmentation:Segmentation",
    "classification": "shared_models.tasks.multi_label:classification",
    "quantification": "shared_models.tasks.quantification:Quantification",
    "reconstruction": "shared_models.tasks.reconstruction:Reconstruction",
}

OF_WHOLE_STUDIES = frozenset({"classification", "quantification"})
"""Tasks whose reference is one label or number for a study; that of the others is a label for every voxel, or none."""

WITH_NUMBERS = frozenset({"quantification"})
"""Tasks whose reference is a number, or an interval in which it lies."""

WITH_BACKGROUND = frozenset({"segmentation", "quantification"})
"""Tasks whose first label is "background": what is not drawn, or not counted."""

OF_KSPACE = frozenset({"reconstruction"})
"""Tasks that begin before there is an image: their volumes hold coil images, real and imaginary part in turn, and nothing
is labelled."""


def confused(truth: str, predicted: str) -> str:
    """Name of the metric that says which share of patients has one label and got another, or the same."""
    return f"{truth} as {predicted}"
