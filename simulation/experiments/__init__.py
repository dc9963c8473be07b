"""Every experiment by the name that ``federad-sim experiment`` takes."""

from simulation.experiments.classification_real import CLASSIFICATION_REAL
from simulation.experiments.federated_vs_central import FEDERATED_VS_CENTRAL

EXPERIMENTS = {experiment.name: experiment for experiment in (FEDERATED_VS_CENTRAL, CLASSIFICATION_REAL)}
