"""The registry: models that the consortium has released, each with its evidence and the operator's signature.

A folder with one folder for each release, named by the SHA-256 of its weights; ``shared_models.release`` says what lies
in it. A release appears whole or not at all, and is never changed afterwards.
"""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared_models.consortium import SHA256, SignedRelease, utc_now
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.release import (
    CARD,
    CARD_PAGE,
    MANIFEST,
    MODEL,
    Card,
    CardRound,
    CardSite,
    Manifest,
    Release,
    ReleasedFile,
    SitePrivacy,
    make_durable,
    new_release,
    verify_folder,
    write_durably,
)
from shared_models.signing import fingerprint
from shared_models.wire import CHUNK_BYTES

if TYPE_CHECKING:  # torch and Flower are loaded where a release is made, not where one is listed or handed out
    from server.rounds import Measured
    from shared_models.weights import Weights

log = logging.getLogger(__name__)

PACKAGES = ("federad", "torch", "monai", "numpy", "flwr")
"""Whose versions the card names."""

FOLDER = "releases"
"""Where an operator's releases lie in the operator's folder."""

FEW_PATIENTS = 30
"""Below so many test patients at all sites together the card warns of it."""


class Registry:
    """The releases in a folder.

    Parameters
    ----------
    folder
        Made when the first release is published.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def publish(
        self,
        plan: Plan,
        run: str,
        weights: Weights,
        records: Sequence[Mapping[str, Any]],
        sites: Measured,
        key: Ed25519PrivateKey,
        *,
        consortium: str,
        cost: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Release:
        """Release the weights of one of a run's rounds. Published twice, it is the same release.

        Parameters
        ----------
        records
            The run's rounds as the journal gives them; one of them names these weights.
        sites
            What the sites measured of these weights on their test patients.
        key
            The operator's, with which plans are signed, too.
        consortium
            Name of the consortium, which is signed with the rest.
        cost
            Under ``[privacy]``: what the run has cost a patient of each site (``Outcome.cost``).

        Promise
            Killed at any moment, it leaves the whole release or none; the next call finishes what was begun.

        Raises
        ------
        FederadError
            S202 if the folder cannot be written, S203 if these weights cannot be released, M212 to M215 if they are
            released already and that release is not whole any more.
        """
        from server.results import intervals
        from shared_models.task import task_for
        from shared_models.weights import encode, weights_sha256

        released = _record_of(plan, weights, records)
        data = encode(weights, json.dumps({"plan_sha256": plan.sha256, "run": run}, sort_keys=True))
        sha256, issued = fingerprint(data), utc_now()
        card = Card(
            name=plan.name,
            consortium=consortium,
            run=run,
            issued=issued,
            plan_sha256=plan.sha256,
            plan=json.loads(plan.canonical_json()),
            model_sha256=sha256,
            weights_sha256=weights_sha256(weights),
            parameters=sum(array.size for array in weights.values()),
            intended_use=_intended_use(plan),
            limits=_limits(plan, sites),
            metrics=dict(task_for(plan).metrics),
            released_round=int(released["round"]),
            rounds=tuple(_card_round(plan, record) for record in records),
            test=_known(plan, sites.mean),
            test_interval=intervals(plan, sites)[0] or None,
            sites=_card_sites(plan, released, records, sites, cost or {}),
            versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        )
        files = {
            MODEL: data,
            CARD: json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False).encode(),
            CARD_PAGE: page(card).encode(),
        }
        manifest = Manifest(
            name=plan.name,
            plan_sha256=plan.sha256,
            run=run,
            version=version("federad"),
            files=tuple(
                ReleasedFile(name=name, n_bytes=len(content), sha256=fingerprint(content))
                for name, content in files.items()
            ),
        )
        signed = SignedRelease(
            release=manifest.encode().decode("ascii"),
            sha256=sha256,
            n_bytes=len(data),
            consortium=consortium,
            issued=issued,
        ).signed(key)
        return self._write(signed, files, key)

    def list(self) -> list[Release]:
        """All releases, oldest first. One whose manifest cannot be read is left out, and the log names it."""
        found = []
        for folder in self._folder.glob("*"):
            if not re.fullmatch(SHA256, folder.name):
                continue
            try:
                found.append(Release.open(folder))
            except FederadError as error:
                log.warning("release %s is left out: %s", folder.name[:12], error.happened)
        return sorted(found, key=lambda release: (release.issued, release.sha256))

    def find(self, prefix: str) -> Release:
        """The one release of this plan or run, or whose SHA-256 begins so.

        Raises
        ------
        FederadError
            S200 if there is none, S201 if there are several.
        """
        releases = self.list()
        fitting = [r for r in releases if prefix and (r.sha256.startswith(prefix) or prefix in {r.name, r.run})]
        if not fitting:
            shown = ", ".join(f"{r.sha256[:12]} ({r.name})" for r in releases[-10:])
            raise FederadError(
                "S200",
                happened=f"There is no release {prefix[:80]!a}.",
                because=f"Released so far: {shown}." if shown else "Nothing has been released yet.",
                remedies=(
                    "see what there is: federad-server releases",
                    "name a release by the first digits of its SHA-256, by its run, or by its plan",
                ),
            )
        if len(fitting) > 1:
            shown = ", ".join(f"{r.sha256[:12]} of {r.issued}" for r in fitting[-10:])
            raise FederadError(
                "S201",
                happened=f"{len(fitting)} releases fit {prefix[:80]!a}: {shown}.",
                because="Taking one of them by guess could hand out the wrong model.",
                remedies=("give more digits of the SHA-256", "or name its run"),
            )
        return fitting[0]

    def path(self, sha256: str) -> Path:
        """The file with this SHA-256, of whichever release; S200 if none has it."""
        for release in self.list():
            for entry in release.manifest.files:
                if entry.sha256 == sha256:
                    return release.folder / entry.name
        raise FederadError(
            "S200",
            happened=f"No released file has the SHA-256 {sha256[:64]!a}.",
            because="Only what was released is handed out.",
            remedies=("see what there is: federad-server releases",),
        )

    def read(self, sha256: str) -> Iterator[bytes]:
        """A released file in pieces, as sites fetch it; S200 if there is none."""
        return _read(self.path(sha256))

    def _write(self, signed: SignedRelease, files: Mapping[str, bytes], key: Ed25519PrivateKey) -> Release:
        place = self._folder / signed.sha256
        try:
            with new_release(self._folder) as part:
                if place.exists():
                    return verify_folder(place, key.public_key(), signed.consortium)
                for name, content in files.items():
                    write_durably(part / name, content)
                write_durably(part / MANIFEST, signed.encode())
                make_durable(part, place)
        except OSError as error:
            raise FederadError(
                "S202",
                happened=f"The release cannot be written ({error.strerror or type(error).__name__}).",
                because="A release is whole on the disk, or it is none. Nothing of it was kept.",
                remedies=(
                    "make room on the disk of the operator's folder, or mend the permissions of releases/",
                    "then publish again: the run and its journal are untouched",
                ),
            ) from None
        return Release.open(place)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK_BYTES):
            yield piece


def _record_of(plan: Plan, weights: Weights, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The round these weights come from; S203 if they should not be released."""
    from shared_models.task import task_for
    from shared_models.weights import difference, weights_sha256

    network = task_for(plan).build_network()
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if mismatch := difference(weights, shapes):
        raise _unfit(f"the weights do not fit the plan's network: {mismatch}")
    if name := next((name for name, array in weights.items() if not np.isfinite(array).all()), ""):
        raise _unfit(f"{name} holds values that are not finite")
    digest = weights_sha256(weights)
    of_round = [record for record in records if digest in (record["weights_sha256"], record.get("average_sha256"))]
    if not of_round:
        raise _unfit(f"none of the {len(records)} committed rounds has these weights")
    return of_round[-1]


def _unfit(why: str) -> FederadError:
    return FederadError(
        "S203",
        happened=f"These weights cannot be released: {why}.",
        because="A signature says that the model came out of its run and can be used.",
        remedies=(
            "look at the run's rounds and its last weights: federad-server status",
            "resume the run if it was interrupted, then publish again",
        ),
    )


def _known(plan: Plan, values: Mapping[str, float] | None) -> dict[str, float] | None:
    """Those of the values that the task defines: names come from sites and end up on a page."""
    from shared_models.task import task_for

    return {name: values[name] for name in task_for(plan).metrics if name in values} if values else None


def _card_round(plan: Plan, record: Mapping[str, Any]) -> CardRound:
    return CardRound(
        round=record["round"],
        sites=len(record["replied"]),
        training_loss=record["training_loss"],
        validation=_known(plan, record["validation"]),
    )


def _card_sites(
    plan: Plan,
    released: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    sites: Measured,
    cost: Mapping[str, Mapping[str, float]],
) -> tuple[CardSite, ...]:
    """Every site that took part in the released weights or measured them, by name."""
    from server.results import intervals

    around = intervals(plan, sites)[1]
    until = [record for record in records if record["round"] <= released["round"]]
    names = (
        {name for record in until for name in record["replied"]}
        | released["per_site"].keys()
        | sites.per_site.keys()
        | cost.keys()
    )
    return tuple(
        CardSite(
            name=name,
            rounds=sum(name in record["replied"] for record in until),
            validation=_known(plan, released["per_site"].get(name)),
            test=_known(plan, sites.per_site.get(name)),
            test_interval=around.get(name) or None,
            test_patients=sites.patients.get(name) if plan.privacy is None else None,
            privacy=SitePrivacy.of(cost[name]) if name in cost else None,
        )
        for name in sorted(names)
    )


def _intended_use(plan: Plan) -> str:
    data, labels = plan.data, ", ".join(plan.task.named_labels)
    grid = "volumes" if data.dimensions == 3 else "planes"
    spacing = f" on a grid of {' x '.join(f'{mm:g}' for mm in data.spacing_mm)} mm" if data.spacing_mm else ""
    return (
        f"Research: {plan.task.kind} of {labels or 'k-space'} in {grid} of modality {data.modality}{spacing}, from "
        f"{', '.join(data.channels)}. Not a medical device; not for decisions about patients."
    )


def _limits(plan: Plan, sites: Measured) -> tuple[str, ...]:
    """What the evidence does not show, in words for the page."""
    n_patients, n_sites = sum(sites.patients.values()), len(sites.per_site)
    said = []
    if not n_sites:
        said.append("Nobody has tested it: no site of the run had test patients.")
    else:
        tested = _count(n_patients, "patient") if plan.privacy is None else "patients, whose number stays there,"
        said.append(
            f"It was tested on {tested} of {_count(n_sites, 'site')}, all of them from hospitals of this run. How it does "
            "on a scanner or at a hospital outside of it is not known."
        )
        if plan.privacy is None and n_patients < FEW_PATIENTS:
            said.append("So few test patients do not tell a good model from a lucky one.")
    said.append(_privacy_limit(plan))
    said.append(
        "Images must be prepared as the plan says: another orientation, spacing or normalisation gives other output."
    )
    return tuple(said)


def _privacy_limit(plan: Plan) -> str:
    if plan.privacy is None:
        return (
            "It was trained without differential privacy. Weights and metrics can reveal something about single patients, "
            "so hand it on only to those whom the hospitals' agreement names."
        )
    if plan.privacy.unit == "image":
        return (
            "Its noise was made to hide single images, not patients: for a patient the larger epsilon below holds, which "
            "may be no protection at all."
        )
    return (
        "Its privacy holds for one patient of one site. For a person known to several sites the epsilons below add up. "
        "Metrics have noise, too: small differences between sites may be noise alone."
    )


def page(card: Card) -> str:
    """The model card as Markdown."""
    names = list(card.metrics)
    parts = [
        f"# {card.name}",
        card.intended_use,
        _table(
            ("", ""),
            [
                ("consortium", card.consortium),
                ("released", card.issued),
                ("run", card.run),
                ("plan", f"{card.name}, SHA-256 `{card.plan_sha256}`"),
                ("model.safetensors", f"SHA-256 `{card.model_sha256}`, {card.parameters:,} parameters"),
                ("round", f"{card.released_round} of {len(card.rounds)}"),
                ("made with", ", ".join(f"{name} {number}" for name, number in card.versions.items())),
            ],
        ),
        "## What it does not show",
        "\n".join(f"- {limit}" for limit in card.limits),
        "## Test patients",
        f"Of each site's test patients. {_directions(card.metrics)}"
        + (" In brackets: where 95 % of the noise around a figure lies." if card.test_interval else ""),
        _table(
            ("site", "patients", "rounds", *names),
            [
                (s.name, _shown(s.test_patients), str(s.rounds), *_values(s.test, names, s.test_interval))
                for s in card.sites
            ]
            + [("all", _shown(_all_tested(card)), "", *_values(card.test, names, card.test_interval))],
        ),
        "## Validation patients",
        _how_chosen(card),
        _table(("site", *names), [(s.name, *_values(s.validation, names)) for s in card.sites]),
        "## Privacy",
        *_privacy_part(card),
        "## Rounds",
        _table(
            ("round", "sites", "training loss", *names),
            [(str(r.round), str(r.sites), _shown(r.training_loss), *_values(r.validation, names)) for r in card.rounds],
        ),
        "## Plan",
        f"```json\n{json.dumps(card.plan, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


_PRICE = ("epsilon", "delta", "image_epsilon", "declared_size")


def _privacy_part(card: Card) -> list[str]:
    if card.plan.get("privacy") is None:
        return [
            "No differential privacy: the plan has no table `[privacy]`. What that means stands among the limits above."
        ]
    spent = {site.name: site.privacy.model_dump() if site.privacy else {} for site in card.sites}
    rows = [(site, *(_shown(of.get(key)) for key in _PRICE)) for site, of in spent.items()]
    return [
        "What the whole run, metrics included, has cost one patient of each site, as the site reckons it: adding or "
        "removing that patient changes the odds of anything the site released in this run by at most this much.",
        _table(("site", "epsilon of a patient", "delta", "epsilon of an image", "declared number"), rows),
    ]


def _how_chosen(card: Card) -> str:
    chosen = card.plan["strategy"].get("release", "best")
    if card.plan["strategy"].get("name") == "fedbn":
        return (
            "Each site measured the last round's model with normalisation layers of its own, which stayed there. This file "
            "has those of the start: for everybody but those sites it is another model."
        )
    if chosen == "averaged":
        return "The plan releases the average over its rounds; these figures are of the last round's own weights."
    if chosen == "last":
        return "The plan releases its last round, whatever these figures are."
    return "They chose the round that was released, so these figures are a little too good."


def _directions(metrics: Mapping[str, bool]) -> str:
    return "; ".join(f"{name}: {'larger' if larger else 'smaller'} is better" for name, larger in metrics.items()) + "."


def _all_tested(card: Card) -> int | None:
    """How many test patients there are; None where sites keep their number."""
    counted = [site.test_patients for site in card.sites if site.test_patients is not None]
    return sum(counted) if counted or card.plan.get("privacy") is None else None


def _values(
    values: Mapping[str, float] | None,
    names: Sequence[str],
    around: Mapping[str, tuple[float, float]] | None = None,
) -> list[str]:
    """Figures, each with the interval of its noise where it has some."""
    shown = [_shown((values or {}).get(name)) for name in names]
    ends = [(around or {}).get(name) for name in names]
    return [f"{text} ({end[0]:.4g} to {end[1]:.4g})" if end else text for text, end in zip(shown, ends, strict=True)]


def _shown(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
