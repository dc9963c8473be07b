"""Every network and every task keeps the contracts, and each contract finds the one that does not."""

from __future__ import annotations

import contracts
import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import nn


@pytest.fixture(params=contracts.every_case(), ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}d")
def task(request):
    """One task with one network, as a plan would name them."""
    torch.manual_seed(0)
    return contracts.task_of(request.param)


@pytest.fixture
def segmentation():
    """A task to plant violations in."""
    torch.manual_seed(0)
    return contracts.task_of(("segmentation", "unet", 2))


class TestEveryNetwork:
    def test_patient_is_treated_alike_whoever_shares_the_batch(self, task):
        """
        While training, other patients do not change what a patient gets; else a gradient is not its own.
        """
        contracts.assert_company_changes_no_output(task.build_network(), contracts.example_batch(task))

    def test_gradient_of_a_patient_is_its_own(self, task):
        """
        The gradient of one patient's loss is the same in any company.
        """
        contracts.assert_company_changes_no_gradient(task.build_network(), task, contracts.example_batch(task))

    def test_gradient_of_a_batch_is_the_mean_of_its_patients(self, task):
        """
        Training on several patients at once does what training on each alone would do on average.
        """
        contracts.assert_batch_gradient_is_mean_of_patients(task.build_network(), task, contracts.example_batch(task))

    def test_training_changes_no_buffer(self, task):
        """
        Nothing but parameters remembers a patient.
        """
        contracts.assert_training_changes_no_buffer(task.build_network(), task, contracts.example_batch(task))

    def test_parameters_are_all_that_travels_and_all_that_is_needed(self, task):
        """
        A network rebuilt from the exchanged weights answers exactly as the one that was trained.
        """
        contracts.assert_parameters_are_all_there_is(task.build_network, task, contracts.example_batch(task))

    def test_output_is_what_the_task_asks_for(self, task):
        """
        Every voxel that goes in gets an answer, or every study a map for each label, for one patient or several.
        """
        image, _ = contracts.example_batch(task)
        contracts.assert_output_fits_the_task(task, task.build_network(), image)
        contracts.assert_output_fits_the_task(task, task.build_network(), image[:1])

    def test_seed_alone_decides_the_first_weights(self, task):
        """
        Every engine starts a run from the same weights.
        """
        contracts.assert_seed_decides_the_weights(task.build_network)


class TestEveryTask:
    def test_loss_of_a_batch_is_the_mean_of_its_samples(self, task):
        """
        No sample's loss depends on the others.
        """
        image, target = contracts.example_batch(task)
        contracts.assert_loss_is_mean_of_samples(task, 3 * task.build_network()(image), target)

    def test_whole_volumes_get_every_metric(self, task):
        """
        A volume that is no multiple of the patch is predicted and measured by every metric that the task names.
        """
        contracts.assert_measures_what_it_names(task)

    def test_what_is_noised_is_a_mean_over_patients(self, task):
        """
        No patient moves a noised metric by more than its range over the number of patients.
        """
        contracts.assert_ranges_are_of_means(task)


class TestContractsFindWhatTheyLookFor:
    @pytest.fixture
    def mixing(self):
        """A U-Net with a forgotten BatchNorm."""
        torch.manual_seed(0)
        return UNet(2, 1, 3, channels=(4, 8), strides=(2,), num_res_units=1, norm="BATCH")

    def test_batch_norm_lets_company_change_the_output(self, segmentation, mixing):
        """
        With BatchNorm a patient's output depends on who else is there.
        """
        with pytest.raises(AssertionError):
            contracts.assert_company_changes_no_output(mixing, contracts.example_batch(segmentation))

    def test_batch_norm_lets_company_change_the_gradient(self, segmentation, mixing):
        """
        With BatchNorm a patient's gradient depends on who else is there.
        """
        with pytest.raises(AssertionError):
            contracts.assert_company_changes_no_gradient(mixing, segmentation, contracts.example_batch(segmentation))

    def test_batch_norm_makes_a_batch_more_than_its_patients(self, segmentation, mixing):
        """
        With BatchNorm the gradient of a batch is not the mean of its patients' gradients.
        """
        with pytest.raises(AssertionError):
            contracts.assert_batch_gradient_is_mean_of_patients(
                mixing, segmentation, contracts.example_batch(segmentation)
            )

    def test_batch_norm_remembers_patients_in_buffers(self, segmentation, mixing):
        """
        With BatchNorm a training step changes running statistics.
        """
        with pytest.raises(AssertionError, match="running_mean"):
            contracts.assert_training_changes_no_buffer(mixing, segmentation, contracts.example_batch(segmentation))

    def test_running_statistics_are_missed_by_the_receiver(self, segmentation, mixing):
        """
        With BatchNorm the parameters alone do not give the trained network again.
        """

        def build():
            torch.manual_seed(0)
            return UNet(2, 1, 3, channels=(4, 8), strides=(2,), num_res_units=1, norm="BATCH")

        with pytest.raises(AssertionError):
            contracts.assert_parameters_are_all_there_is(build, segmentation, contracts.example_batch(segmentation))

    def test_a_smaller_grid_is_noticed(self, segmentation):
        """
        A network that returns every second voxel does not keep the grid.
        """
        with pytest.raises(AssertionError):
            contracts.assert_output_keeps_the_grid(nn.Conv2d(1, 3, 3, 2, 1), contracts.example_batch(segmentation)[0])

    def test_randomness_from_elsewhere_is_noticed(self):
        """
        A network initialised from NumPy's own randomness is another one each time.
        """

        def build():
            network = nn.Linear(2, 2)
            nn.init.constant_(network.weight, float(np.random.default_rng().normal()))
            return network

        with pytest.raises(AssertionError):
            contracts.assert_seed_decides_the_weights(build)

    def test_loss_over_the_whole_batch_is_noticed(self, segmentation):
        """
        Dice of all samples together is not the mean of their Dice.
        """
        segmentation._loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
        image, target = contracts.example_batch(segmentation)

        with pytest.raises(AssertionError):
            contracts.assert_loss_is_mean_of_samples(segmentation, 3 * segmentation.build_network()(image), target)
