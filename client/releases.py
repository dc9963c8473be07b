"""Released models at a hospital: what the consortium offers, fetched and checked before anybody uses it.

A release counts only with the signature of the operator whose key was pinned at enrolment (``shared_models.release``).
Nothing about this site leaves with the request but the hash of what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from client.folder import SiteFolder, cannot
from client.link import Link, Membership
from shared_models.consortium import SignedRelease
from shared_models.release import Manifest, Release, receive, verify_manifest


@dataclass(frozen=True)
class Offer:
    """A release that the consortium lists."""

    signed: SignedRelease
    manifest: Manifest
    is_here: bool
    """Whether it has been fetched."""

    @property
    def sha256(self) -> str:
        """Its name: SHA-256 of the file of weights, 64 hex digits."""
        return self.signed.sha256

    @property
    def n_bytes(self) -> int:
        """Size of all its files [bytes]."""
        return sum(entry.n_bytes for entry in self.manifest.files)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "release": self.sha256,
            "plan": self.manifest.name,
            "run": self.manifest.run,
            "issued": self.signed.issued,
            "n_bytes": self.n_bytes,
            "here": self.is_here,
        }


def listed(folder: SiteFolder) -> list[Offer]:
    """What the consortium has released, oldest first.

    Raises
    ------
    FederadError
        C150 if the site has not enrolled, C151 to C155 if the consortium cannot be reached, M212 and M214 if it lists
        what this site's operator did not sign.
    """
    with Link.open(folder.courier) as link:
        return _offers(folder, link, Membership.load(folder.courier))


def fetch(
    folder: SiteFolder, wanted: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Release:
    """Fetch a release into ``releases/``, all of it, checked, or nothing.

    Parameters
    ----------
    wanted
        The first digits of its SHA-256, or its run.
    on_progress
        Told (bytes fetched, in all).

    Raises
    ------
    FederadError
        As :func:`listed`; C163 if none or several fit or the disk is full, M215 if a file is not the one that was signed.
    """
    member = Membership.load(folder.courier)
    with Link.open(folder.courier) as link:
        offer = _chosen(_offers(folder, link, member), wanted)
        n_fetched = 0

        def counted(sha256: str) -> Iterator[bytes]:
            nonlocal n_fetched
            for part in link.get_release(sha256):
                n_fetched += len(part)
                on_progress(n_fetched, offer.n_bytes)
                yield part

        try:
            return receive(offer.signed, counted, folder.releases, member.plan_key, member.name)
        except OSError as error:
            raise cannot(
                f"{folder.releases} cannot be written ({error.strerror}).",
                "A model is here as a whole, or not at all. Nothing of it was kept.",
                "make room there, or mend its permissions, and fetch it again",
            ) from None


def _offers(folder: SiteFolder, link: Link, member: Membership) -> list[Offer]:
    offers = [
        Offer(signed, verify_manifest(signed, member.plan_key, member.name), (folder.releases / signed.sha256).is_dir())
        for signed in link.releases()
    ]
    return sorted(offers, key=lambda offer: (offer.signed.issued, offer.sha256))


def _chosen(offers: list[Offer], wanted: str) -> Offer:
    fitting = [one for one in offers if wanted and (one.sha256.startswith(wanted) or one.manifest.run == wanted)]
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(one.sha256[:12] for one in fitting or offers)
    raise cannot(
        f"{len(fitting) or 'No'} releases fit {wanted[:80]!a}. {'These' if fitting else 'Released'}: {shown or 'none'}.",
        "It must be clear which model is meant.",
        "federad-site releases lists them",
    )
