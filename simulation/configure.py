"""A plan that configures itself at emulated hospitals, or at sites of real images: ask, merge, derive.

The same question, the same door and the same rules as in a deployment (``shared_models.fingerprint``,
``shared_models.self_configuration``): only the sites are here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

from server.journal import Journal
from shared_models.fingerprint import Fingerprint, fingerprint_plan
from shared_models.plan import Plan
from shared_models.self_configuration import MEMORY_GB, configured
from simulation.engine import run_rounds
from simulation.run import Request, Watcher, find_sites, prepare, use_folder


@dataclass(frozen=True)
class Configured:
    """What came out."""

    plan: Plan
    asked: Plan
    """With which the sites were asked."""

    fingerprint: Fingerprint


def configure(
    request: Request, watcher: Watcher, *, memory_gb: float = MEMORY_GB, noise: float | None = None
) -> Configured:
    """Ask the sites of a request for the fingerprint of their images, and derive its plan from what they say.

    Parameters
    ----------
    memory_gb
        What one training step may take at a site [10^9 bytes].
    noise
        See :func:`~shared_models.fingerprint.fingerprint_plan`.

    Raises
    ------
    FederadError
        P240 and P241 if nothing can be derived, and what :func:`~simulation.run.simulate` raises before the first round.
    """
    asking = replace(request, plan=fingerprint_plan(request.plan, noise), folder=request.folder / "fingerprint")
    folder = use_folder(asking.folder)
    sites = find_sites(replace(asking, plan=request.plan, sites_folder=request.shared), watcher)
    prepare(asking, sites, watcher)
    shutil.rmtree(folder / "journal", ignore_errors=True)
    watcher.stage("asking for the fingerprint", len(sites))
    outcome = run_rounds(
        asking.plan,
        [site.station for site in sites],
        Journal(folder / "journal"),
        seed=request.seed,
        execution=request.execution,
        on_progress=watcher.progress,
    )
    found = Fingerprint.of(asking.plan, outcome.last, len(outcome.records[-1].replied))
    return Configured(configured(request.plan, found, memory_gb), asking.plan, found)
