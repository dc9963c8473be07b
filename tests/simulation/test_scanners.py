"""Scanners: noise obeys its law, shading and contrast stay within what they promise, headers are DICOM's."""

from dataclasses import astuple, replace
from itertools import combinations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from simulation.patients import TISSUES_WITH_LESION
from simulation.scanners import SCANNERS, acquire, add_rician_noise, contrast, scanners_sha256, shading

SPACING_MM = (4.0, 2.0, 2.0)


@pytest.fixture
def random():
    return np.random.default_rng(7)


def only(tissue, shape=(2, 16, 16)):
    """Every voxel is filled by one tissue."""
    tissues = np.zeros((len(TISSUES_WITH_LESION), *shape), np.float32)
    tissues[TISSUES_WITH_LESION.index(tissue)] = 1
    return tissues


class TestNoise:
    @pytest.mark.parametrize("signal", [0.0, 0.05, 0.8])
    def test_moments_are_those_of_a_rice_distribution(self, random, signal):
        """
        Mean and standard deviation agree with scipy's Rice law, from pure noise to nearly Gaussian.
        """
        sigma, n = 0.03, 200_000
        noisy = add_rician_noise(np.full((1, 1, n), signal, np.float32), sigma, random)
        law = stats.rice(signal / sigma, scale=sigma)
        assert noisy.mean() == pytest.approx(law.mean(), abs=5 * law.std() / np.sqrt(n))
        assert noisy.std() == pytest.approx(law.std(), rel=0.01)

    def test_without_noise_nothing_changes(self, random):
        signal = random.random((2, 3, 4), dtype=np.float32)
        assert_array_equal(add_rician_noise(signal, 0.0, random), signal)


class TestShading:
    @pytest.mark.parametrize("amplitude", [0.0, 0.3])
    def test_field_stays_within_its_amplitude(self, random, amplitude):
        """
        However the coil lies, no point is brightened or darkened by more than the stated factor.
        """
        for _ in range(20):
            field = np.log(shading((4, 20, 20), amplitude, random))
            assert np.abs(field).max() <= amplitude + 1e-6

    def test_field_is_smooth(self, random):
        """
        Neighbouring pixels differ by far less than opposite ends of the image.
        """
        field = shading((4, 64, 64), 0.3, random)
        assert np.abs(np.diff(field, axis=1)).max() < 0.1 * np.ptp(field)


class TestContrast:
    @pytest.mark.parametrize("name", SCANNERS)
    @pytest.mark.parametrize("tissue", TISSUES_WITH_LESION)
    def test_every_tissue_has_its_own_intensity(self, name, tissue):
        """
        The order of the intensities is the order of the tissue axis: pure tissue shows that tissue's value.
        """
        scanner = SCANNERS[name]
        expected = getattr(scanner.intensities, tissue) ** scanner.gamma
        assert_allclose(contrast(scanner, only(tissue)), expected, rtol=1e-5)

    def test_acquisitions_differ_slightly_in_contrast(self, random):
        """
        Acquisitions of one tissue scatter by the scanner's variation, as they do between patients and calibrations.
        """
        scanner = SCANNERS["ge-t2-1.5t"]
        values = [contrast(scanner, only("csf", (1, 1, 1)), random).item() for _ in range(300)]
        assert np.std(np.log(values)) == pytest.approx(scanner.variation * scanner.gamma, rel=0.2)

    def test_point_spread_blurs_within_the_slice_only(self, random):
        """
        A bright line fades to the Gaussian of the stated width, and slices stay apart.
        """
        line = only("bone", (3, 41, 41)) * 0
        line[TISSUES_WITH_LESION.index("csf"), 1, :, 20] = 1
        quiet = replace(SCANNERS["ge-t2-1.5t"], noise=0.0, bias_amplitude=0.0, point_spread_mm=4.0, gamma=1.0)
        image = acquire(quiet, line, (4.0, 2.0, 2.0), random)
        profile = image[1, 20] / image[1, 20].sum()
        assert_allclose(profile, stats.norm.pdf((np.arange(41) - 20) * 2.0, scale=4.0) * 2.0, atol=1e-3)
        assert image[0].max() == image[2].max() == 0


class TestAcquire:
    def test_same_generator_gives_the_same_image(self):
        images = [
            acquire(SCANNERS["canon-pd-1.5t"], only("csf"), SPACING_MM, np.random.default_rng(seed))
            for seed in (1, 1, 2)
        ]
        assert_array_equal(images[0], images[1])
        assert (images[0] != images[2]).mean() > 0.9

    @pytest.mark.parametrize("name", SCANNERS)
    def test_image_is_a_magnitude_on_the_given_grid(self, name, random):
        image = acquire(SCANNERS[name], only("white_matter", (3, 20, 24)), SPACING_MM, random)
        assert image.shape == (3, 20, 24)
        assert image.dtype == np.float32
        assert image.min() >= 0

    @pytest.mark.parametrize("name", SCANNERS)
    def test_full_scale_fits_into_twelve_bits(self, name):
        """
        The brightest tissue under the strongest shading is still stored without clipping.
        """
        scanner = SCANNERS[name]
        brightest = max(astuple(scanner.intensities)) ** scanner.gamma
        assert brightest * np.exp(scanner.bias_amplitude) * scanner.gain < 4095


class TestCatalogue:
    def test_scanners_look_different(self):
        """
        Between any two, at least one brain tissue differs by a tenth of full scale, and so does the device.
        """
        for one, other in combinations(SCANNERS.values(), 2):
            apart = np.abs(np.subtract(astuple(one.intensities), astuple(other.intensities)))
            assert apart[2:5].max() >= 0.1
            assert (one.manufacturer, one.model) != (other.manufacturer, other.model)

    @pytest.mark.parametrize("name", SCANNERS)
    def test_header_words_fit_their_dicom_fields(self, name):
        """
        Sequence Name is a short string of at most 16 characters, code strings come from the standard's list.
        """
        scanner = SCANNERS[name]
        assert len(scanner.sequence_name) <= 16
        assert set(scanner.scanning_sequence) <= {"SE", "IR", "GR", "EP", "RM"}
        assert ("IR" in scanner.scanning_sequence) == (scanner.inversion_time_s is not None)
        assert 0 < scanner.echo_time_s < scanner.repetition_time_s

    def test_any_changed_value_changes_the_hash(self, monkeypatch):
        """
        A result made with other scanners cannot carry the same hash.
        """
        before = scanners_sha256()
        monkeypatch.setitem(SCANNERS, "ge-t2-1.5t", replace(SCANNERS["ge-t2-1.5t"], noise=0.031))
        assert scanners_sha256() != before
