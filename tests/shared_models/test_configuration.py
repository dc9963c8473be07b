"""How deep a network goes along each axis, by nnU-Net's published rules."""

from __future__ import annotations

import contracts
import pytest

from shared_models.configuration import depths_of, divisors
from shared_models.errors import FederadError
from shared_models.task import task_for


class TestDepths:
    def test_isotropic_images_are_halved_alike(self):
        """
        Where all axes are alike, so are strides and kernels.
        """
        depths = depths_of((64, 64, 64), (1.0, 1.0, 1.0), 4)

        assert [d.stride for d in depths] == [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)]
        assert {d.kernel for d in depths} == {(3, 3, 3)}

    def test_thick_slices_are_not_halved_before_the_plane_is_as_coarse(self):
        """
        Slices of 5 mm of pixels of 1 mm: two halvings in the plane come first, and kernels stay in it as long.
        """
        depths = depths_of((16, 64, 64), (5.0, 1.0, 1.0), 5)

        assert [d.stride for d in depths] == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
        assert [d.kernel for d in depths] == [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)]

    def test_at_least_four_voxels_are_left(self):
        """
        A short axis stops being halved and the others go on.
        """
        assert divisors((8, 64, 64), (1.0, 1.0, 1.0), 5) == (2, 16, 16)

    def test_patch_of_thick_slices_need_not_be_halved_as_often(self):
        """
        The dynamic U-Net takes a patch that no other network of its depth could, and gives back its size.
        """
        tables = {"task": {"channels": [4, 4, 4, 4]}, "data": {"patch": [12, 32, 32], "spacing_mm": [6.0, 1.0, 1.0]}}
        task = task_for(contracts.example_plan("segmentation", "dynunet", 3, **tables))
        image, _ = contracts.example_batch(task, 1)

        contracts.assert_output_fits_the_task(task, task.build_network(), image)
        with pytest.raises(FederadError, match="P103"):
            contracts.example_plan("segmentation", "unet", 3, **tables)
