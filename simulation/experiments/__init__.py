"""Every experiment by the name that ``federad-sim experiment`` takes."""

from simulation.experiments.chest_radiographs import CHEST_RADIOGRAPHS
from simulation.experiments.classification import CLASSIFICATION
from simulation.experiments.classification_real import CLASSIFICATION_REAL
from simulation.experiments.collapse import COLLAPSE
from simulation.experiments.confounded import CONFOUNDED
from simulation.experiments.federated_vs_central import FEDERATED_VS_CENTRAL
from simulation.experiments.new_scanner import NEW_SCANNER
from simulation.experiments.privacy_utility import PRIVACY_UTILITY
from simulation.experiments.private_adaptation import PRIVATE_ADAPTATION
from simulation.experiments.reconstruction import RECONSTRUCTION
from simulation.experiments.reconstruction_real import RECONSTRUCTION_REAL
from simulation.experiments.self_configuration import SELF_CONFIGURATION
from simulation.experiments.stability import STABILITY
from simulation.experiments.strategies import STRATEGIES_EXPERIMENT
from simulation.experiments.uncertainty import UNCERTAINTY
from simulation.experiments.unseen_camera import UNSEEN_CAMERA
from simulation.experiments.unseen_scanner import UNSEEN_SCANNER
from simulation.experiments.weak_labels import WEAK_LABELS

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        FEDERATED_VS_CENTRAL,
        PRIVACY_UTILITY,
        CLASSIFICATION,
        CLASSIFICATION_REAL,
        CHEST_RADIOGRAPHS,
        UNSEEN_CAMERA,
        RECONSTRUCTION,
        RECONSTRUCTION_REAL,
        SELF_CONFIGURATION,
        UNSEEN_SCANNER,
        NEW_SCANNER,
        PRIVATE_ADAPTATION,
        CONFOUNDED,
        COLLAPSE,
        WEAK_LABELS,
        STRATEGIES_EXPERIMENT,
        UNCERTAINTY,
        STABILITY,
    )
}
