"""The average head: fractions that add up, the right way round, and a grid that says where its voxels lie."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from simulation.atlas import HEAD_HEIGHT_MM, SLAB_CENTRE_MM, TISSUES, Grid, load_atlas


@pytest.fixture(scope="module")
def atlas():
    return load_atlas(2.0)


def fraction(atlas, tissue, z, y, x):
    points = np.array([z, y, x], dtype=float).reshape(3, 1)
    return atlas.at(points)[TISSUES.index(tissue), 0]


class TestAtlas:
    def test_tissues_and_air_share_every_voxel(self, atlas):
        """
        No tissue is negative, and together they fill at most the whole voxel.
        """
        assert atlas.tissues.min() >= 0
        assert atlas.tissues.sum(axis=0).max() <= 1 + 1e-6

    def test_inside_of_the_skull_is_full(self, atlas):
        """
        Within the brain nothing is left over for air.
        """
        grey, white = (atlas.tissues[TISSUES.index(name)] for name in ("grey_matter", "white_matter"))
        assert_allclose(atlas.tissues.sum(axis=0)[grey + white > 0.5], 1.0, atol=1e-5)

    @pytest.mark.parametrize(
        ("tissue", "z", "y", "x"),
        [
            ("white_matter", 24, 0, -26),  # centrum semiovale, patient's right
            ("white_matter", 24, 0, 26),  # and left
            ("csf", 10, -20, -8),  # frontal horn of the lateral ventricle: in front
            ("csf", 10, 40, 26),  # its atrium: at the back and further apart
            ("grey_matter", 8, 84, 8),  # occipital cortex, at the back
        ],
    )
    def test_landmarks_lie_where_anatomy_says(self, atlas, tissue, z, y, x):
        """
        Known places of the MNI space hold the tissue they are known for, in (z, y, x) with y to the back.
        """
        assert fraction(atlas, tissue, z, y, x) > 0.5

    def test_layers_follow_one_another_outwards(self, atlas):
        """
        Walking out of the head one meets brain, fluid, bone, scalp, then air.
        """
        x = np.arange(0.0, 110.0, 1.0)
        along = atlas.at(np.stack([np.full_like(x, 24.0), np.zeros_like(x), x]))
        surface = {name: x[along[TISSUES.index(name)] > 0.4].max() for name in ("grey_matter", "bone", "scalp")}
        assert surface["grey_matter"] < surface["bone"] < surface["scalp"] < 96
        assert along[:, -1].sum() == 0

    def test_atlas_is_shared_and_cannot_be_changed(self, atlas):
        """
        It is loaded once per process; writing to it would change every later patient.
        """
        assert load_atlas(2.0) is atlas
        with pytest.raises(ValueError, match="read-only"):
            atlas.tissues[0, 0, 0, 0] = 1

    def test_finer_than_the_template_is_refused(self):
        with pytest.raises(ValueError, match=r"resolution_mm=0\.5"):
            load_atlas(0.5)


class TestGrid:
    def test_slab_is_centred_on_the_ventricles(self):
        """
        Whatever the number of slices, their middle is the same height and the left half mirrors the right.
        """
        for n_slices in (3, 12):
            z, _, x = Grid.slab(n_slices, (4.0, 2.0, 2.0)).axes_mm()
            assert z.mean() == pytest.approx(SLAB_CENTRE_MM)
            assert_allclose(x, -x[::-1])

    def test_head_fits(self, atlas):
        """
        The whole scalp lies inside the field of view, with room for a larger patient.
        """
        grid = Grid.slab(12, (4.0, 2.0, 2.0))
        scalp = atlas.at(grid.points_mm())[TISSUES.index("scalp")]
        assert scalp[:, [0, 1, 2, -3, -2, -1], :].max() == scalp[:, :, [0, 1, 2, -3, -2, -1]].max() == 0

    def test_points_are_the_axes_spelled_out(self):
        grid = Grid(shape=(2, 3, 4), spacing_mm=(4.0, 2.0, 1.0), origin_mm=(10.0, -5.0, 0.5))
        assert_allclose(grid.points_mm()[:, 1, 2, 3], [14.0, -1.0, 3.5])

    def test_subslices_fill_the_same_slices(self):
        """
        Cutting slices in two keeps their outer faces and their centres.
        """
        grid = Grid.slab(3, (4.0, 2.0, 2.0))
        z, fine_z = grid.axes_mm()[0], grid.with_subslices(2).axes_mm()[0]
        assert_allclose(fine_z.reshape(3, 2).mean(axis=1), z)
        assert fine_z[0] - 1.0 == z[0] - 2.0

    def test_slab_taller_than_the_head_is_refused(self):
        with pytest.raises(ValueError, match=f"{HEAD_HEIGHT_MM:g} mm"):
            Grid.slab(46, (4.0, 2.0, 2.0))
