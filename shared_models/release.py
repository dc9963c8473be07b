"""A released model: what the operator signs, and what a hospital checks before it uses one.

A release is a folder. The manifest names every other file with its size and SHA-256 and is signed, so one signature
covers everything; it is the same document that the consortium service lists::

    manifest.json        signed: plan, run, and the files below
    model.safetensors    the weights
    card.json            the model card: where the model comes from and what is known of it
    card.md              the same card as a page to read

The weights' SHA-256 is the name of the release. Nothing here can be executed, neither the files nor what they say.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field

from shared_models.consortium import RUN, Document, Name, Sha256, SignedRelease
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.signing import fingerprint
from shared_models.wire import CHUNK_BYTES

if TYPE_CHECKING:  # torch is loaded only where a model is used
    from torch import nn

    from shared_models.weights import Weights

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
CARD = "card.json"
CARD_PAGE = "card.md"
FILES = (MODEL, CARD, CARD_PAGE)
"""What every release holds besides its manifest."""

MAX_MANIFEST_BYTES = 1 << 20
MAX_CARD_BYTES = 64 << 20
"""Longest manifest and longest card that are read [bytes]."""

PART = ".part-"
"""How the name of a folder begins that is no release yet."""


class ReleasedFile(Document):
    """One file of a release."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}(\.[a-z0-9]{1,12}){1,2}$")
    """A plain name: it can lead nowhere but into the release's own folder."""

    n_bytes: int = Field(ge=0)
    sha256: Sha256


class Manifest(Document):
    """What is signed of a release."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """The plan's."""

    plan_sha256: Sha256
    run: str = Field(pattern=f"^{RUN}$")
    version: str = Field(max_length=40)
    """Of the federad that wrote it."""

    files: tuple[ReleasedFile, ...] = Field(max_length=20)

    def file(self, name: str) -> ReleasedFile:
        """The entry of a file; M215 if there is none."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise _not_whole(f"the manifest does not name {name}")


class CardRound(Document):
    """One round of the run, means over its sites."""

    round: int
    sites: int
    """How many updates were added up."""

    training_loss: float | None = None
    validation: dict[str, float] | None = None


class SitePrivacy(Document):
    """What a run has cost a patient of one site, as the site reckons it."""

    unit: Literal["patient"] = "patient"
    """Whom ``epsilon`` protects: one patient with all images, whatever the plan's noise was made for."""

    epsilon: float
    delta: float
    declared_size: int
    """Public number of patients from whom training draws; of images where the plan's unit is one image."""

    image_epsilon: float | None = None
    """What an image-level plan is for one image: the smaller figure, which does not protect patients."""

    @classmethod
    def of(cls, spent: Mapping[str, float]) -> Self:
        """What a site said of the cost (:attr:`~shared_models.messages.Answer.cost`)."""
        return cls(
            epsilon=spent["epsilon"],
            delta=spent["delta"],
            declared_size=int(spent["declared_size"]),
            image_epsilon=spent.get("image_epsilon"),
        )


class CardSite(Document):
    """One hospital's part in the model."""

    name: Name
    rounds: int
    """In how many rounds, up to the released one, its update was added up."""

    validation: dict[str, float] | None = None
    """Means over its validation patients."""

    test: dict[str, float] | None = None
    """Means over its test patients, who were used for nothing else."""

    test_interval: dict[str, tuple[float, float]] | None = None
    """Where 95 % of the noise around each of these means lies; null where they are exact."""

    test_patients: int | None = None
    """How many they are; null under ``[privacy]``, where the number stays at the site."""

    privacy: SitePrivacy | None = None
    """What the whole run has cost its patients in privacy; null for a plan without ``[privacy]``."""


class Card(Document):
    """The model card, after Mitchell et al. 2019, arXiv:1810.03993."""

    name: str
    consortium: str
    run: str
    issued: str
    """When, as ISO 8601 in UTC."""

    plan_sha256: Sha256
    plan: dict[str, Any]
    """Every key of the plan."""

    model_sha256: Sha256
    """Of the file of weights."""

    weights_sha256: Sha256
    """Of names, shapes and values alone; it stands in the journal and in ``result.json``."""

    parameters: int
    intended_use: str
    limits: tuple[str, ...]
    metrics: dict[str, bool]
    """Name of each metric, and whether larger is better."""

    released_round: int
    rounds: tuple[CardRound, ...]
    test: dict[str, float] | None
    """Means over sites, weighted by their numbers of test patients, or under ``[privacy]`` by the sizes they declared."""

    test_interval: dict[str, tuple[float, float]] | None = None
    """Where 95 % of the noise around each of these means lies; null where they are exact."""

    sites: tuple[CardSite, ...]
    versions: dict[str, str]
    """Of federad and of the packages that trained the model."""


@dataclass(frozen=True)
class Release:
    """A release in a folder. Whoever got it from elsewhere opens it with :func:`verify_folder`."""

    folder: Path
    signed: SignedRelease
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the manifest of a release; neither its signature nor the other files are looked at.

        Raises
        ------
        FederadError
            M211 if the manifest is damaged, M215 if it is missing.
        """
        try:
            with (folder / MANIFEST).open("rb") as stream:
                text = stream.read(MAX_MANIFEST_BYTES + 1)
        except OSError as error:
            raise _not_whole(f"{MANIFEST} cannot be read ({error.strerror})") from None
        signed = SignedRelease.decode(text[:MAX_MANIFEST_BYTES])
        return cls(folder, signed, Manifest.decode(signed.release))

    @property
    def sha256(self) -> str:
        """Its name: SHA-256 of the file of weights, 64 hex digits."""
        return self.signed.sha256

    @property
    def name(self) -> str:
        """Name of the plan."""
        return self.manifest.name

    @property
    def run(self) -> str:
        """federad's own id of the run it comes from."""
        return self.manifest.run

    @property
    def issued(self) -> str:
        """When it was signed, as ISO 8601 in UTC."""
        return self.signed.issued

    def card(self) -> Card:
        """The model card; M215 if it is not the one that was signed."""
        return Card.decode(self.read(CARD, MAX_CARD_BYTES))

    def plan(self) -> Plan:
        """The plan it was trained by; P102 to P104 if this version does not know all of it."""
        return Plan.from_tables(self.card().plan, name=f"the plan of release {self.sha256[:12]}")

    def weights(self) -> Weights:
        """The weights, checked in the same bytes that are read; M215 if they are not the ones that were signed."""
        from shared_models.weights import decode

        return decode(self.read(MODEL))[0]

    def network(self) -> nn.Module:
        """The network with its weights, ready to predict, without a discriminator that it was trained against.

        M210 if this version builds another one from the plan.
        """
        from shared_models.adaptation import without_discriminator
        from shared_models.task import task_for
        from shared_models.weights import load_weights

        network = task_for(self.plan()).build_network()
        load_weights(network, self.weights())
        predicting = without_discriminator(network)
        return predicting.eval()

    def verify(self, key: Ed25519PublicKey, consortium: str) -> None:
        """Make sure that the operator released exactly this: signature, consortium, and every file.

        Raises
        ------
        FederadError
            M212 forged or changed, M214 another consortium's, M215 a file is missing or is not the one that was signed.
        """
        verify_manifest(self.signed, key, consortium)
        for entry in self.manifest.files:
            check_file(self.folder / entry.name, entry)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """One of its files; M215 if it is not the one that was signed, or longer than ``limit`` bytes."""
        entry = self.manifest.file(name)
        if limit is not None and entry.n_bytes > limit:
            raise _not_whole(f"{name} is longer than is read")
        try:
            with (self.folder / name).open("rb") as stream:
                data = stream.read(entry.n_bytes + 1)
        except OSError as error:
            raise _not_whole(f"{name} cannot be read ({error.strerror})") from None
        if len(data) != entry.n_bytes or fingerprint(data) != entry.sha256:
            raise _not_whole(f"{name} is not the one that was signed")
        return data


def verify_manifest(signed: SignedRelease, key: Ed25519PublicKey, consortium: str) -> Manifest:
    """What an operator signed, if it was this one.

    Parameters
    ----------
    key
        The operator's key, as it was pinned at enrolment: never one that came with the release.
    consortium
        Name of the consortium that this site belongs to.

    Raises
    ------
    FederadError
        M211 unreadable, M212 forged or changed, M214 another consortium's, M215 it does not name what it must.
    """
    if signed.consortium != consortium:
        raise FederadError(
            "M214",
            happened=f"This release belongs to the consortium {signed.consortium[:80]!a}, not to {consortium!r}.",
            because="A model is trusted because its consortium is: who trained it, on whom, and who answers for it.",
            remedies=(
                f"fetch a release of {consortium!r}: federad-site status names the consortium of this site",
                "to use the other consortium's model, enrol there with a site folder of its own",
            ),
        )
    signed.verify(key)
    manifest = Manifest.decode(signed.release)
    names = [entry.name for entry in manifest.files]
    if len(set(names)) != len(names) or not set(FILES) <= set(names):
        raise _not_whole("the manifest does not name each file once")
    model = manifest.file(MODEL)
    if (model.sha256, model.n_bytes) != (signed.sha256, signed.n_bytes):
        raise _not_whole("the manifest names two models")
    return manifest


def verify_folder(folder: Path, key: Ed25519PublicKey, consortium: str) -> Release:
    """A release whose every file is what the operator signed; errors as :meth:`Release.open` and :meth:`Release.verify`."""
    release = Release.open(folder)
    release.verify(key, consortium)
    return release


def verify_model(file: Path, signed: SignedRelease, key: Ed25519PublicKey, consortium: str) -> Manifest:
    """What the operator signed of the model in ``file``, which may lie and be called as it likes; errors as in a folder."""
    manifest = verify_manifest(signed, key, consortium)
    check_file(file, manifest.file(MODEL))
    return manifest


def check_file(path: Path, entry: ReleasedFile) -> None:
    """Raise M215 unless ``path`` holds exactly the bytes of a manifest's entry; memory holds one chunk of it."""
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != entry.n_bytes:
                raise _not_whole(f"{path.name} has another length than was signed")
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _not_whole(f"{path.name} cannot be read ({error.strerror})") from None
    if digest != entry.sha256:
        raise _not_whole(f"{path.name} is not the one that was signed")


def receive(
    signed: SignedRelease,
    fetch: Callable[[str], Iterable[bytes]],
    folder: Path,
    key: Ed25519PublicKey,
    consortium: str,
) -> Release:
    """Fetch a release into ``folder/<its SHA-256>``: all of it, checked, or nothing.

    The signature is checked before anything is fetched. A release that is there already is checked and not fetched again.

    Parameters
    ----------
    fetch
        The bytes of a released file by its SHA-256, in pieces; no more are taken than the manifest says.

    Raises
    ------
    FederadError
        As :meth:`Release.verify`, and what ``fetch`` raises.
    OSError
        If the folder cannot be written.
    """
    manifest = verify_manifest(signed, key, consortium)
    place = folder / signed.sha256
    with new_release(folder) as part:
        if place.exists():
            return verify_folder(place, key, consortium)
        for entry in manifest.files:
            _store(part / entry.name, fetch(entry.sha256), entry)
        write_durably(part / MANIFEST, signed.encode())
        verify_folder(part, key, consortium)
        make_durable(part, place)
    return Release.open(place)


@contextmanager
def new_release(folder: Path) -> Iterator[Path]:
    """A folder to fill, which :func:`make_durable` then gives its name; without that, nothing of it stays.

    One process at a time: others wait here. What a killed one left behind goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part = folder / f"{PART}{uuid4().hex}"
        try:
            for left_behind in folder.glob(f"{PART}*"):
                shutil.rmtree(left_behind)
            part.mkdir()
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile has the file open, too


def _store(path: Path, parts: Iterable[bytes], entry: ReleasedFile) -> None:
    left = entry.n_bytes
    with path.open("xb") as stream:
        for part in parts:
            left -= len(part)
            if left < 0:
                raise _not_whole(f"{entry.name} is longer than was signed")
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())


def write_durably(path: Path, data: bytes) -> None:
    """A new file that is on the disk when this returns."""
    view = memoryview(data)
    with path.open("xb") as stream:
        for start in range(0, len(view), CHUNK_BYTES):
            stream.write(view[start : start + CHUNK_BYTES])
        stream.flush()
        os.fsync(stream.fileno())


def make_durable(part: Path, place: Path) -> None:
    """Give a finished folder its name, at once and for good."""
    _sync(part)
    part.rename(place)
    _sync(place.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_whole(why: str) -> FederadError:
    return FederadError(
        "M215",
        happened=f"The release cannot be used: {why}.",
        because="A model of which a part is missing or was changed is not the one that was tested and signed.",
        remedies=(
            "remove its folder and fetch it again",
            "tell the operator if that does not help: the copy there may be damaged, too",
        ),
    )
