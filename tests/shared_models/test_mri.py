"""The laws of MR physics that reconstruction rests on: adjoints, masks, coils, data consistency."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared_models import mri
from shared_models.errors import FederadError

KINDS = ("variable-density", "equispaced", "radial")


def noise(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.complex(*(torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)))


def inner(a, b):
    return (a.conj() * b).sum()


def a_mask(kind="variable-density", shape=(64, 48), acceleration=4.0, fraction=0.08, seed=0):
    return mri.sampling_mask(kind, shape, acceleration, fraction, np.random.default_rng(seed))


class TestFourier:
    @pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 1, 7, 9)])
    def test_adjoint_is_the_adjoint_and_the_inverse(self, shape):
        """
        <F x, y> = <x, F* y>, and F* takes F back, for even and odd sides.
        """
        x, y = noise(*shape), noise(*shape, seed=1)

        torch.testing.assert_close(inner(mri.fourier(x), y), inner(x, mri.inverse_fourier(y)))
        torch.testing.assert_close(mri.inverse_fourier(mri.fourier(x)), x)

    def test_agrees_with_the_sum_that_defines_it(self):
        """
        The centre of k-space is the sum over the image by the root of its size, and a shift of one pixel turns phases.
        """
        x = noise(1, 1, 4, 6)
        kspace = mri.fourier(x)[0, 0]
        rows, columns = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (4, 6))
        waves = torch.exp(-2j * np.pi * (rows[:, None] * 1 / 4 + columns * -2 / 6))

        torch.testing.assert_close(kspace[2, 3], x.sum() / 24**0.5)
        torch.testing.assert_close(kspace[3, 1], (x[0, 0] * waves).sum() / 24**0.5)

    def test_channels_go_and_come_back(self):
        """
        Real and imaginary part of each coil lie next to each other, and nothing is lost on the way.
        """
        coils = noise(2, 3, 4, 5).to(torch.complex64)
        channels = mri.to_channels(coils)

        assert torch.equal(channels[:, 2], coils[:, 1].real)
        assert torch.equal(channels[:, 3], coils[:, 1].imag)
        assert torch.equal(mri.to_complex(channels), coils)


class TestCoils:
    @pytest.mark.parametrize("n_coils", [1, 4, 8])
    def test_combining_is_the_adjoint_of_expanding_and_takes_it_back(self, n_coils):
        """
        <S x, y> = <x, S* y>, and S* S x = x, since the squares of the sensitivities add up to 1.
        """
        maps = torch.from_numpy(mri.ring_of_coils(n_coils, (12, 10), np.random.default_rng(0)))[None]
        x, y = noise(1, 1, 12, 10).to(torch.complex64), noise(1, n_coils, 12, 10).to(torch.complex64)

        torch.testing.assert_close(inner(mri.expand(x, maps), y), inner(x, mri.combine(y, maps)))
        torch.testing.assert_close(mri.combine(mri.expand(x, maps), maps), x)

    def test_sensitivities_are_found_in_the_centre_of_kspace(self):
        """
        A smooth object seen by a ring of coils gives their maps back, up to the phase of the object.
        """
        rng = np.random.default_rng(0)
        maps = torch.from_numpy(mri.ring_of_coils(4, (64, 64), rng))[None]
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
        disc = torch.exp(-((y**2 + x**2) / 0.3)).to(torch.complex64)[None, None]
        found = mri.low_resolution_sensitivities(mri.fourier(disc * maps), 0.15)
        inside = (disc.abs() > 0.3)[0, 0]

        assert torch.allclose(found.abs().square().sum(1), torch.ones(1, 64, 64), atol=1e-3)
        assert (found - maps)[0][:, inside].abs().max() < 0.1

    def test_a_single_coil_sees_everything_alike(self):
        """
        Nobody can tell the phase of one coil from the image's.
        """
        assert torch.equal(
            mri.low_resolution_sensitivities(noise(1, 1, 8, 8), 0.25), torch.ones(1, 1, 8, 8, dtype=torch.complex128)
        )


class TestMasks:
    @pytest.mark.parametrize("kind", KINDS[:2])
    @pytest.mark.parametrize("acceleration", [4.0, 6.0, 8.0, 11.0])
    def test_lines_are_as_many_as_the_acceleration_says(self, kind, acceleration):
        """
        Exactly round(n / acceleration) whole lines, the centre's among them.
        """
        for seed in range(20):
            mask = a_mask(kind, (256, 6), acceleration, 0.06, seed)
            lines = mask.all(axis=1)

            assert np.array_equal(lines, mask.any(axis=1))
            assert lines.sum() == round(256 / acceleration)
            assert lines[128 - 7 : 128 + 7].all()

    @pytest.mark.parametrize("acceleration", [4.0, 8.0])
    def test_spokes_meet_the_share_of_samples_that_is_asked_for(self, acceleration):
        """
        A radial mask has 1 / acceleration of all samples and at most a spoke more.
        """
        mask = a_mask("radial", (96, 80), acceleration, 0.06)

        assert 0 <= mask.sum() - mask.size / acceleration <= 96
        assert mask[47:50, 39:42].all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_chance_alone_decides_and_the_same_chance_decides_alike(self, kind):
        """
        One seed gives one mask, another seed another.
        """
        assert np.array_equal(a_mask(kind, seed=3), a_mask(kind, seed=3))
        assert not np.array_equal(a_mask(kind, seed=3), a_mask(kind, seed=4))

    def test_lines_at_equal_distances_have_equal_distances(self):
        """
        Beyond the centre no gap is more than one line wider than another.
        """
        lines = np.flatnonzero(a_mask("equispaced", (256, 4), 4.0, 0.08)[:, 0])
        gaps = np.diff(lines[lines > 140])

        assert gaps.max() - gaps.min() <= 1

    def test_density_falls_towards_the_edge(self):
        """
        Near the centre more lines are measured than at the edge.
        """
        share = np.mean([a_mask(seed=seed)[:, 0] for seed in range(200)], axis=0)

        assert share[20:28].mean() > 2 * share[:8].mean() > 0

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("shape", "acceleration", "fraction"), [((8, 8), 8.0, 0.2), ((64, 64), 4.0, 0.001)])
    def test_acceleration_that_leaves_no_centre_is_p105(self, kind, shape, acceleration, fraction):
        """
        A centre that is empty, or is all there is, is refused with what to change.
        """
        with pytest.raises(FederadError, match="P105") as refused:
            a_mask(kind, shape, acceleration, fraction)

        assert "centre_fraction" in str(refused.value)


class TestConsistency:
    def test_full_mask_returns_what_was_measured(self):
        """
        With everything measured, whatever a network says is replaced.
        """
        believed, measured = noise(1, 2, 6, 6), noise(1, 2, 6, 6, seed=1)

        assert torch.equal(mri.consistent(believed, measured, torch.ones(1, 1, 6, 6)), measured)

    def test_measured_samples_stay_and_the_others_are_believed(self):
        """
        Bit for bit on either side of the mask.
        """
        mask = torch.from_numpy(a_mask(shape=(64, 6)))[None, None].float()
        believed, measured = noise(1, 2, 64, 6), noise(1, 2, 64, 6, seed=1) * mask
        made = mri.consistent(believed, measured, mask)

        assert torch.equal(made[mask.expand_as(made) > 0], measured[mask.expand_as(made) > 0])
        assert torch.equal(made[mask.expand_as(made) == 0], believed[mask.expand_as(made) == 0])

    def test_noisy_samples_are_weighed(self):
        """
        Weight 3 takes three parts of the measurement and one of what is believed.
        """
        believed, measured, mask = noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1), torch.ones(1, 1, 4, 4)

        torch.testing.assert_close(
            mri.consistent(believed, measured, mask, torch.tensor(3.0)), (believed + 3 * measured) / 4
        )
