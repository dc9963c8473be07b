"""Claims of reconstruction: the worst site counts, and differences are formed seed by seed."""

from __future__ import annotations

import pytest

from simulation.experiments import reconstruction, reconstruction_real, stability

NAMES = {"zero_filled": "zero-filled", "wavelet_compressed_sensing": "wavelet compressed sensing"}


def described(**means):
    return [{"method": NAMES.get(name, name), "mean": mean} for name, mean in means.items()]


def real_result(federated, central, elsewhere, gains):
    return {
        "comparison": {
            "rows": described(federated=federated, central=central), "local_own": 30.0, "local_elsewhere": elsewhere
        },
        "classical": described(zero_filled=26.0, wavelet_compressed_sensing=30.0),
        "test": {
            "ssim": 0.9, "zero_filled_ssim": 0.7,
            "per_site": {f"site-{k}": {"gain_db": gain} for k, gain in enumerate(gains)},
        },
    }  # fmt: skip


def emulated_result(psnr, gain, sparse=29.0):
    return {
        "classical": described(zero_filled=psnr - gain, wavelet_compressed_sensing=sparse),
        "test": {"psnr": psnr, "gain_db": gain, "ssim": 0.9},
    }


def test_every_site_must_gain():
    """
    The site with the least gain is the claim; one that gains less than 4 dB breaks it.
    """
    results = {"": [real_result(31.0, 31.5, 30.0, (6.0, 4.5)), real_result(32.0, 32.5, 31.0, (3.0, 6.0))]}
    claims = {claim["id"]: claim for claim in reconstruction_real.evaluate(results)["claims"]}

    assert claims["gain_4x_db"]["value"] == pytest.approx(3.75)
    assert claims["below_central_db"]["value"] == pytest.approx(0.5)
    assert claims["over_other_sites_db"]["value"] == pytest.approx(1.0)
    assert [claim["holds"] for claim in claims.values()] == [False, True, True]


def test_arms_are_compared_on_the_same_patients():
    """
    With consistency against without, and against wavelets, at acceleration 4; gains at both.
    """
    results = {
        "4x": [emulated_result(33.0, 6.0)],
        "4x-inconsistent": [emulated_result(31.0, 4.0)],
        "8x": [emulated_result(28.0, 2.5)],
    }
    claims = {claim["id"]: claim for claim in reconstruction.evaluate(results)["claims"]}

    assert claims["gain_4x_db"]["value"] == 6.0
    assert claims["gain_8x_db"]["holds"] is False
    assert claims["interleaved_gain_db"]["value"] == pytest.approx(2.0)
    assert claims["over_cs_db"]["value"] == pytest.approx(4.0)


def test_arms_change_one_thing_each():
    """
    Acceleration, or consistency; quick takes fewer rounds of the same.
    """
    full, quick = (reconstruction.arms(quick=quick) for quick in (False, True))

    assert full["8x"].task == full["4x"].task.model_copy(update={"acceleration": 8.0})
    assert full["4x-inconsistent"].task == full["4x"].task.model_copy(update={"consistency": "none"})
    assert all(quick[arm].rounds < full[arm].rounds for arm in full)
    assert reconstruction_real.arms(quick=True)[""].rounds < reconstruction_real.arms(quick=False)[""].rounds


def carded_result(amplification, structure):
    card = {"amplification": amplification, "structure": structure, "structure_zero_filled": 0.5}
    return {
        "stability": {"site-1": card, "site-2": card | {"amplification": amplification + 2}},
        "test": {"psnr": 30.0},
    }


def test_steadiness_is_compared_seed_by_seed():
    """
    The worst change of the cascade over that of the U-Net, each the mean over sites; the disc that comes back is the
    cascade's.
    """
    results = {
        "cascade": [carded_result(1.0, 0.9), carded_result(3.0, 0.8)],
        "image-unet": [carded_result(3.0, 0.4), carded_result(3.0, 0.4)],
    }
    found = stability.evaluate(results)
    claims = {claim["id"]: claim for claim in found["claims"]}

    assert claims["amplification_ratio"]["values"] == pytest.approx([0.5, 1.0])
    assert claims["structure_recovered"]["value"] == pytest.approx(0.85)
    assert [claim["holds"] for claim in claims.values()] == [True, True]
    assert {arm: plan.task.network for arm, plan in stability.arms(quick=False).items()} == {
        "cascade": "cascade",
        "image-unet": "image-unet",
    }
