"""Every experiment by the name that ``federad-sim experiment`` takes."""

from simulation.experiments.federated_vs_central import FEDERATED_VS_CENTRAL

EXPERIMENTS = {FEDERATED_VS_CENTRAL.name: FEDERATED_VS_CENTRAL}
