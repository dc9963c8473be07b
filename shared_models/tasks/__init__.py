"""Tasks by the name a plan uses. A task is one module here; nothing else in the house asks which task it is."""

TASKS = {"segmentation": "shared_models.tasks.segmentation:Segmentation"}
