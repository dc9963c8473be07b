"""Brain images of three real scanners from a quarter of their k-space: together, pooled, and each on its own.

Two of the sites are one volunteer each, and the third does not say whose its slices are, so training and test patients may
be the same people: what is compared here are ways to train, and nothing follows for people or scanners that were not there.
Two sites have magnitudes alone, whose phase is made up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import Plan
from simulation.experiments.classification import less
from simulation.experiments.harness import Experiment, Results, claim, row

SITES = ("philips_elition_t1", "siemens_trio_siat", "uih_umr770_t1")

EVERYBODY = "all sites' test slices"


def arms(*, quick: bool) -> dict[str, Plan]:
    """The example plan alone; ``quick`` takes a quarter of its rounds."""
    plan = Plan.load(Path(simulation.__path__[0]) / "plans" / "reconstruction-real.toml")
    return {"": plan.model_copy(update={"rounds": plan.rounds // 4}) if quick else plan}


def means_of(described: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over sites of the headline by method."""
    return {one["method"]: one["mean"] for one in described}


def evaluate(results: Results) -> dict[str, Any]:
    """PSNR of the ways to train and of methods that learn nothing, gains at each site, and the claims."""
    of_seed = results[""]
    rows = [means_of(result["comparison"]["rows"]) for result in of_seed]
    classical = [means_of(result["classical"]) for result in of_seed]
    federated, central = ([each[way] for each in rows] for way in ("federated", "central"))
    own = [result["comparison"]["local_own"] for result in of_seed]
    elsewhere = [result["comparison"]["local_elsewhere"] for result in of_seed]
    per_site = [result["test"]["per_site"] for result in of_seed]
    worst = [min(metrics["gain_db"] for metrics in sites.values()) for sites in per_site]
    return {
        "rows": [
            *(row(name, "psnr", EVERYBODY, [each[name] for each in classical]) for name in classical[0]),
            row("federated", "psnr", EVERYBODY, federated),
            row("central", "psnr", EVERYBODY, central),
            row("local", "psnr", "own test slices", own),
            row("local", "psnr", "other sites' test slices", elsewhere),
            *(
                row("federated", "gain_db", site, [sites[site]["gain_db"] for sites in per_site])
                for site in per_site[0]
            ),
            row("federated", "ssim", EVERYBODY, [result["test"]["ssim"] for result in of_seed]),
            row("zero-filled", "ssim", EVERYBODY, [result["test"]["zero_filled_ssim"] for result in of_seed]),
        ],
        "claims": [
            claim("gain_4x_db", "PSNR over zero-filled at the site with the least gain [dB]", worst, at_least=4.0),
            claim("below_central_db", "central PSNR - federated PSNR [dB]", less(central, federated), at_most=0.7),
            claim(
                "over_other_sites_db",
                "federated PSNR - local models' PSNR on other sites' slices [dB]",
                less(federated, elsewhere),
                at_least=0.5,
            ),
        ],
    }


RECONSTRUCTION_REAL = Experiment(
    name="reconstruction-real",
    title="Brain images of three scanners from a quarter of their k-space",
    seeds=(0, 1, 2),
    n_sites=3,
    arms=arms,
    evaluate=evaluate,
    data="mri_recon, a folder with one folder of k-space for each site",
    sites=SITES,
)
