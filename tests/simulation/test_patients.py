"""Emulated patients: the same three numbers give the same person, no head is folded, lesions lie in white matter."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

from simulation.atlas import TISSUES, Grid, load_atlas
from simulation.patients import (
    CONTROL_SPACING_MM,
    LARGEST_CONTROL_MM,
    TISSUES_WITH_LESION,
    EmulatedPatient,
    Lesion,
    Warp,
    deep_white_matter,
)

GRID = Grid.slab(12, (4.0, 2.0, 2.0))
LATTICE = (11, 11, 11)
WHITE = TISSUES.index("white_matter")


def jacobian_determinants(warp, grid):
    points = warp.points_mm(grid)
    gradients = [np.gradient(component, *grid.axes_mm()) for component in points]
    return np.linalg.det(np.moveaxis(np.array(gradients), (0, 1), (-2, -1)))


@pytest.fixture(scope="module")
def patients():
    return [EmulatedPatient(seed=100, site=1, index=index) for index in range(1, 9)]


@pytest.fixture(scope="module")
def anatomies(patients):
    return [patient.anatomy(GRID, study=1) for patient in patients]


class TestPatient:
    def test_same_numbers_give_the_same_patient(self, anatomies):
        again = EmulatedPatient(seed=100, site=1, index=2).anatomy(GRID, study=1)
        assert_array_equal(again.tissues, anatomies[1].tissues)
        assert_array_equal(again.lesion_mask, anatomies[1].lesion_mask)

    @pytest.mark.parametrize("other", [(101, 1, 1), (100, 2, 1), (100, 1, 2)], ids=["seed", "site", "index"])
    def test_any_other_number_gives_another_patient(self, anatomies, other):
        """
        Head and lesions both differ, not only the noise.
        """
        stranger = EmulatedPatient(*other).anatomy(GRID, study=1)
        assert np.abs(stranger.tissues[:-1] - anatomies[0].tissues[:-1]).mean() > 0.005
        assert (stranger.lesion_mask != anatomies[0].lesion_mask).any()

    def test_about_a_quarter_return_for_a_second_study(self):
        n_studies = [EmulatedPatient(100, 1, index).n_studies for index in range(1, 401)]
        assert set(n_studies) == {1, 2}
        assert 0.18 < np.mean(np.array(n_studies) == 2) < 0.32  # 0.25 +- 3 standard deviations

    def test_header_facts_are_possible(self, patients):
        assert {patient.sex for patient in patients} <= {"F", "M"}
        assert all(20 <= patient.age_years < 80 for patient in patients)
        assert len({patient.patient_id for patient in patients}) == len(patients)

    def test_later_study_shows_the_same_head_with_changed_lesions(self, patients, anatomies):
        """
        Away from lesions nothing moves; the lesions overlap with what they were but are not the same.
        """
        for patient, first in zip(patients[:4], anatomies, strict=False):
            later = patient.anatomy(GRID, study=2)
            healthy = (first.tissues[-1] == 0) & (later.tissues[-1] == 0)
            assert_array_equal(later.tissues[:, healthy], first.tissues[:, healthy])
            both = (first.lesion_mask & later.lesion_mask).sum()
            assert 0.5 < 2 * both / (first.lesion_mask.sum() + later.lesion_mask.sum()) < 1


class TestLesions:
    def test_mask_is_where_lesions_fill_half_the_voxel(self, patients, anatomies):
        """
        The outline of a faint lesion is as large as that of an obvious one: conspicuity only dilutes what is inside.
        """
        for patient, anatomy in zip(patients, anatomies, strict=True):
            lesion = anatomy.tissues[TISSUES_WITH_LESION.index("lesion")]
            assert_array_equal(anatomy.lesion_mask, lesion >= 0.5 * np.float32(patient.conspicuity))
            assert lesion.max() == pytest.approx(patient.conspicuity, rel=1e-5)

    def test_some_patients_lesions_are_obvious_and_some_are_faint(self):
        shares = [EmulatedPatient(100, 1, index).conspicuity for index in range(1, 401)]
        assert 0.4 <= min(shares) < 0.42
        assert 0.98 < max(shares) <= 1

    def test_every_patient_has_some_but_few(self, anatomies):
        """
        One to four lesions: never none, and overlapping ones may merge.
        """
        for anatomy in anatomies:
            _, n = ndimage.label(anatomy.lesion_mask, structure=np.ones((3, 3, 3)))
            assert 1 <= n <= 4
            assert anatomy.lesion_mask.sum() * 16 / 1000 < 40  # ml

    def test_lesions_lie_in_white_matter(self, patients, anatomies):
        """
        Every voxel of a mask was at least a quarter white matter before, in one half of its slice or the other.
        """
        for patient, anatomy in zip(patients, anatomies, strict=True):
            before = load_atlas(2.0).at(patient.warp.points_mm(GRID.with_subslices(2)))[WHITE]
            whitest = before.reshape(12, 2, *GRID.shape[1:]).max(axis=1)
            assert whitest[anatomy.lesion_mask > 0].min() >= 0.25 - 1e-6

    def test_lesion_and_tissue_share_the_voxel(self, anatomies):
        """
        A lesion takes the place of the tissue it is in: with air, the fractions still add up to one.
        """
        for anatomy in anatomies:
            total = anatomy.tissues.sum(axis=0)
            assert total.max() <= 1 + 1e-5
            assert total[anatomy.lesion_mask > 0].min() > 0.999

    def test_volume_of_a_smooth_lesion_is_that_of_an_ellipsoid(self):
        """
        Without lumps the occupied volume is 4/3 pi a b c.
        """
        grid = Grid(shape=(40, 40, 40), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0))
        no_lumps = np.array([[0, 0, 0, np.pi / 2]] * 3)
        lesion = Lesion(np.array([20.0, 19.5, 20.2]), np.array([8.0, 9.0, 10.0]), no_lumps)
        assert lesion.occupancy(grid.points_mm()).sum() == pytest.approx(4 / 3 * np.pi * 8 * 9 * 10, rel=0.02)

    def test_centres_are_deep(self):
        """
        A centre is at least 4 mm from the edge of white matter, so a lesion is not a crumb.
        """
        white = np.zeros((9, 9, 9), np.float32)
        white[1:8, 1:8, 1:8] = 1
        grid = Grid(shape=white.shape, spacing_mm=(1.0, 1.0, 1.0), origin_mm=(5.0, 6.0, 7.0))
        assert_array_equal(deep_white_matter(white, grid), [[9.0, 10.0, 11.0]])

    def test_slab_without_white_matter_has_no_lesions(self, patients):
        """
        Above the brain there is nothing to put them in, and that is no error.
        """
        above = Grid(shape=(2, 112, 96), spacing_mm=(4.0, 2.0, 2.0), origin_mm=(120.0, -95.0, -95.0))
        assert patients[0].anatomy(above, study=1).lesion_mask.sum() == 0


class TestWarp:
    @pytest.mark.parametrize("seed", range(5))
    def test_no_head_is_folded(self, seed):
        """
        The Jacobian determinant stays above zero, so every warp can be inverted.
        """
        warp = Warp.random(np.random.default_rng(seed))
        assert jacobian_determinants(warp, Grid.slab(40, (4.0, 4.0, 4.0))).min() > 0.1

    @pytest.mark.parametrize("seed", range(5))
    def test_bound_on_control_points_is_what_prevents_folding(self, seed):
        """
        Even with every control point pushed to the bound, in random directions, nothing folds.
        """
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(3, *LATTICE))
        warp = Warp(signs * LARGEST_CONTROL_MM, np.eye(3), np.zeros(3))
        assert jacobian_determinants(warp, Grid.slab(40, (4.0, 4.0, 4.0))).min() > 0

    def test_beyond_the_bound_heads_can_fold(self):
        """
        The check above can fail: opposing displacements of a whole control spacing do fold.
        """
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(3, *LATTICE))
        warp = Warp(signs * CONTROL_SPACING_MM, np.eye(3), np.zeros(3))
        assert jacobian_determinants(warp, Grid.slab(40, (4.0, 4.0, 4.0))).min() < 0

    def test_equal_displacements_are_a_shift(self):
        """
        B-spline weights add up to one, so moving all control points alike moves every point by that much.
        """
        control = np.ones((3, *LATTICE)) * np.array([1.0, -2.0, 3.0]).reshape(3, 1, 1, 1)
        grid = Grid.slab(4, (4.0, 8.0, 8.0))
        moved = Warp(control, np.eye(3), np.zeros(3)).points_mm(grid) - grid.points_mm()
        np.testing.assert_allclose(moved, np.broadcast_to(np.reshape([1.0, -2.0, 3.0], (3, 1, 1, 1)), moved.shape))

    def test_random_pose_is_a_rotation_times_a_scale(self):
        pose = Warp.random(np.random.default_rng(3)).pose
        scale = np.linalg.norm(pose, axis=0)
        np.testing.assert_allclose((pose / scale).T @ (pose / scale), np.eye(3), atol=1e-12)
        assert np.linalg.det(pose) > 0
