"""Twin stations: two hospitals that differ by one hostile patient, asked the same by the same server.

Both have the same coins and no noise, and the second is given the outcome of each of the first one's noised sums in place
of its own. What the Gaussian mechanism hides is thereby the same at both: everything that leaves has to be the same to the
last byte, and each sum that goes into the mechanism may differ by the clip at most. That is the promise (``PRIVACY_RULES``,
rules 1 to 10) without its probabilities.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from deployed import Operator
from privately import ask_of, private, with_discriminator
from test_private_training import Scripted

from client import training
from client.audit import FILE, AuditLog
from client.data.cohort import IMAGE, LABEL
from client.data.keys import key_of, split_of
from client.data.sealed import Seal, SealedArray, write
from client.policy import Policy
from client.privacy import Mechanism, PatientSum
from client.site import SiteConfig
from client.station import Station
from client.training import resident_trainer
from shared_models.messages import Ask, encode_ask
from shared_models.plan import Plan

DECLARED = 20

SCANNERS = ("SIEMENS 3 T", "GE 1.5 T")
"""What the hospitals declare: their only scanner and one more."""

CHANGES = {"time", "previous", "hash"}
"""What differs between the lines of two audits by construction: the clock, and the chain over it."""

VARIANTS = {
    "fedavg": {},
    "fedprox": {"strategy": {"name": "fedprox", "proximal_mu": 0.5}},
    "automatic clipping": {"privacy": {"clipping": "automatic", "clip_gamma": 0.01}},
    "mixed precision": {"training": {"precision": "bfloat16"}},
    "adam with views and decay": {
        "training": {"optimizer": "adamw", "weight_decay": 0.1},
        "privacy": {"views": 2},
    },
    "moments": {"adaptation": {"adversarial": "moments", "moments_noise": 4.0, "moments_clip": 0.5, "warm_up": 0.0}},
}


def plan_of(smoke: Plan, variant: str = "fedavg") -> Plan:
    """A small private plan over the emulated hospitals' data."""
    privacy = {
        "noise_multiplier": 1.5,
        "clip": 0.01,
        "patients_per_step": 4,
        "steps_per_round": 3,
        "metrics_every": 2,
        "metrics_noise": 8.0,
    }
    tables = VARIANTS[variant]
    training = {"optimizer": "sgd", "learning_rate": 0.5, "samples_per_patient": 2} | tables.get("training", {})
    return private(
        smoke,
        privacy | tables.get("privacy", {}),
        data={"patch": [32, 32]},
        task={"channels": [4, 8]},
        training=training,
        strategy=tables.get("strategy", {}),
        **{name: table for name, table in tables.items() if name == "adaptation"},
    )


def asks(plan: Plan) -> list[bytes]:
    """What a server may ask in a run: rounds with and without metrics, the end, and things that are refused."""
    second = ask_of(plan, 2, seed=1)
    good: list[Ask] = [
        ask_of(plan, 1),
        with_discriminator(second) if plan.asks_for_moments else second,
        ask_of(plan, 2, "validate", seed=1),
        ask_of(plan, 3, "test", seed=2),
    ]
    bad = [ask_of(plan, 1, seed=3), ask_of(plan, 9), ask_of(plan.model_copy(update={"name": "another"}))]
    return [*map(encode_ask, [*good, good[0], *bad]), b"nonsense"]


class Sums:
    """Takes the place of the mechanism's noise: records what goes in, and gives out what another run's gave."""

    def __init__(self, outcomes: list[torch.Tensor] | None = None) -> None:
        self.mechanisms: list[Mechanism] = []
        self.integers: list[torch.Tensor] = []
        self.outcomes: list[torch.Tensor] = []
        self._given = outcomes

    def noised(self) -> Callable[[PatientSum, object], torch.Tensor]:
        real = PatientSum.noised

        def noised(total: PatientSum, randomness: object) -> torch.Tensor:
            self.mechanisms.append(total.mechanism)
            self.integers.append(total.integers.clone())
            own = real(total, randomness)  # type: ignore[arg-type]
            self.outcomes.append(own if self._given is None else self._given[len(self.outcomes)].clone())
            return self.outcomes[-1]

        return noised


def seen_from_outside(station: Station, questions: list[bytes]) -> dict[str, object]:
    """Everything that a server, and whoever reads the audit, gets to see of a station that is asked all this."""
    answers = [station.answer(question) for question in questions]
    audit = [
        {key: value for key, value in line.items() if key not in CHANGES}
        for line in AuditLog(station.folder / FILE).entries()
    ]
    charges = [(c.n, c.question, c.events, c.order) for c in station.ledger().spent().charges]
    return {"answers": answers, "notices": station.outbox(), "audit": audit, "charges": charges}


def asked(folder: Path, plan: Plan, outcomes: list[torch.Tensor] | None = None) -> tuple[dict[str, object], Sums]:
    """What is seen of a station from outside, and the sums inside."""
    sums = Sums(outcomes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "SystemRandomness", Scripted)
        patched.setattr(PatientSum, "noised", sums.noised())
        resident_trainer.cache_clear()
        seen = seen_from_outside(Station(folder), asks(plan))
        resident_trainer.cache_clear()
    return seen, sums


def compare(one_and_sums: tuple[dict[str, object], Sums], along: Path, plan: Plan) -> list[int]:
    """Hold two stations to the promise; the squared norms by which their sums differ."""
    one, its_sums = one_and_sums
    other, our_sums = asked(along, plan, its_sums.outcomes)

    assert other == one
    assert our_sums.mechanisms == its_sums.mechanisms
    squares = [int((a - b).square().sum()) for a, b in zip(our_sums.integers, its_sums.integers, strict=True)]
    limits = [mechanism.largest_square for mechanism in our_sums.mechanisms]
    assert all(square <= limit for square, limit in zip(squares, limits, strict=True))
    return squares


class Town:
    """Two hospitals, of which one has a patient more, with one secret and one operator."""

    def __init__(self, plans: list[Plan], data: Path, folder: Path) -> None:
        self.folder, self._data, self._operator = folder, data, Operator()
        self.plans = plans
        self._seen: dict[tuple[str, int], tuple[dict[str, object], Sums]] = {}
        patients = sorted(path.name for path in data.iterdir() if path.is_dir())
        for number in range(256):
            self._secret = bytes([number]) * 32
            places = {p: split_of(self._secret, key_of(self._secret, p), plans[0].data.split) for p in patients}
            n_in = {split: list(places.values()).count(split) for split in ("train", "validation", "test")}
            if n_in["train"] >= 3 and min(n_in.values()) >= 1:
                break
        self.patient = {split: next(p for p in patients if places[p] == split) for split in n_in}

    def station(
        self, name: str, number: int = 0, *, without: str | None = None, spoil: Callable[[Path], None] | None = None
    ) -> Path:
        """The folder of a station that has approved a plan, before any question; a copy each time.

        Parameters
        ----------
        number
            Of the plan.
        without
            The split from which a patient is taken away.
        spoil
            Changes the images of that patient of the training split before they are catalogued.
        """
        made, data = self.folder / f"{name}-{number}", self.folder / f"data of {name}"
        if not data.exists():
            shutil.copytree(self._data, data)
            if without:
                shutil.rmtree(data / self.patient[without])
            if spoil:
                spoil(data / self.patient["train"])
        if not made.exists():
            policy = Policy(lifetime_epsilon=1e6, run_epsilon=1e6, minimum_patients=1)
            config = SiteConfig(name="site-1", data=str(data), device="cpu", policy=policy, scanners=SCANNERS)
            station = Station.create(made, config, secret=self._secret)
            station.trust(self._operator.name, self._operator.public_pem)
            station.approve(self.plans[number], declared_size=DECLARED)
        n = len(list(self.folder.glob("copy-*")))
        return shutil.copytree(made, self.folder / f"copy-{n}")

    def without(self, split: str, number: int = 0) -> tuple[dict[str, object], Sums]:
        """What is seen of the hospital that lacks the patient, under one of the plans; asked once."""
        if (split, number) not in self._seen:
            station = self.station(f"without-{split}", number, without=split)
            self._seen[split, number] = asked(station, self.plans[number])
        return self._seen[split, number]

    def entry(self, station: Path, split: str) -> tuple[Path, Seal]:
        """Where the prepared volume of the patient in question lies, and the key it is sealed with."""
        cohort = Station(station).cohort(self.plans[0])
        (patient,) = (p for p in cohort.patients(split) if p.key == key_of(self._secret, self.patient[split]))
        return cohort._folder / "volumes" / cohort._prepared[patient.studies[0]].entry, cohort._seal


@pytest.fixture(scope="module")
def town(smoke_plan, hospitals, tmp_path_factory):
    return Town(
        [plan_of(smoke_plan, variant) for variant in VARIANTS], hospitals[0].folder, tmp_path_factory.mktemp("twins")
    )


def spoilt(entry: Path, seal: Seal, kind: str) -> None:
    """Make trouble of a prepared volume, as somebody could who has the key."""
    image, label = (np.asarray(SealedArray(entry / name, seal)) for name in (IMAGE, LABEL))

    def put(name: str, values: np.ndarray) -> None:
        write(entry / name, values, values.shape, seal)

    match kind:
        case "NaN pixels":
            put(IMAGE, np.full_like(image, np.nan))
        case "1000 times as bright":
            put(IMAGE, 1000 * image)
        case "unseen class":
            put(LABEL, np.full_like(label, 77))
        case "no label":
            (entry / LABEL).unlink()
        case "truncated file":
            whole = (entry / IMAGE).read_bytes()
            (entry / IMAGE).write_bytes(whole[: len(whole) // 2])
        case "changed by somebody without the key":
            whole = (entry / IMAGE).read_bytes()
            start = 8 + int.from_bytes(whole[4:8], "big")
            (entry / IMAGE).write_bytes(whole[:start] + bytes(byte ^ 1 for byte in whole[start:]))
        case "oversize":
            larger = np.zeros((1, 9, 200, 210), np.float32)
            put(IMAGE, larger + 1)
            put(LABEL, np.zeros(larger.shape[1:], np.uint8))
        case "other channels":
            put(IMAGE, np.concatenate([image] * 3))


KINDS = (
    "an ordinary one",
    "NaN pixels",
    "1000 times as bright",
    "unseen class",
    "no label",
    "truncated file",
    "changed by somebody without the key",
    "oversize",
    "other channels",
)

GIVE_SOMETHING = ("an ordinary one", "1000 times as bright", "oversize")


class TestTrainingPatient:
    @pytest.mark.parametrize("kind", KINDS)
    def test_hostile_patient_shows_in_the_parameters_alone(self, town, kind):
        """
        Answers, refusals, notices, progress, sizes, audit and charges are byte-equal, and the sums differ by the clip.
        """
        along = town.station("along")
        spoilt(*town.entry(along, "train"), kind)
        squares = compare(town.without("train"), along, town.plans[0])

        assert len(squares) == 3 + 3 + 2
        assert [squares[i] > 0 for i in (0, 1, 2, 4, 5, 6)] == [kind in GIVE_SOMETHING] * 6
        assert squares[3] == squares[7] == 0

    @pytest.mark.parametrize("number", range(1, len(VARIANTS)), ids=list(VARIANTS)[1:])
    def test_whatever_the_plan_does_with_noised_steps(self, town, number):
        """
        Proximal term, automatic clipping, 16 bits, an optimiser with a memory, weight decay, several views, moments.
        """
        along = town.station("along", number)
        spoilt(*town.entry(along, "train"), "1000 times as bright")

        assert any(compare(town.without("train", number), along, town.plans[number]))

    def test_patient_whose_files_are_trouble_shows_in_nothing(self, town):
        """
        Cut files in the hospital's own folder: such a patient is not even in the cohort.
        """

        def cut(folder: Path) -> None:
            for file in folder.rglob("*.dcm"):
                file.write_bytes(file.read_bytes()[:900])

        squares = compare(town.without("train"), town.station("cut", spoil=cut), town.plans[0])
        assert not any(squares)

    def test_patient_from_a_scanner_that_nobody_else_has_shows_in_the_parameters_alone(self, town):
        """
        Another manufacturer in the header, and intensities of another order.
        """

        def elsewhere(folder: Path) -> None:
            for file in folder.rglob("im-*.dcm"):
                image = pydicom.dcmread(file)
                image.Manufacturer, image.ManufacturerModelName, image.RescaleSlope = "Acme", "Only One", "1000"
                image.save_as(file)

        station = town.station("elsewhere", spoil=elsewhere)
        assert any(
            "Acme" in scanner or "acme" in scanner.lower()
            for scanner in Station(station).cohort(town.plans[0]).scanners
        )
        assert any(compare(town.without("train"), station, town.plans[0]))


class TestMeasuredPatient:
    @pytest.mark.parametrize(
        ("split", "place", "kind"),
        [*(("validation", 3, kind) for kind in KINDS), ("test", 7, "an ordinary one"), ("test", 7, "NaN pixels")],
    )
    def test_hostile_patient_shows_in_the_metrics_alone(self, town, split, place, kind):
        """
        One who is measured moves one sum of metrics by its clip at most, and nothing else; being the only one, too.
        """
        along = town.station("along")
        spoilt(*town.entry(along, split), kind)
        squares = compare(town.without(split), along, town.plans[0])

        assert not any(squares[:place] + squares[place + 1 :])
        assert kind != "an ordinary one" or squares[place] > 0


def test_twins_that_differ_in_more_are_told_apart(town, monkeypatch):
    """
    The comparison notices what it is there for: a patient clipped too late, and a number that leaves.
    """
    along = town.station("along")
    spoilt(*town.entry(along, "train"), "1000 times as bright")
    town.without("train")
    with monkeypatch.context() as broken:
        broken.setattr("client.privacy.clipped", lambda gradient, mechanism, out=None: gradient.to(torch.float64))
        broken.setattr("client.privacy.on_grid", lambda scaled, m, seed, out=None: (scaled / m.grid).to(torch.int64))
        with pytest.raises(AssertionError):
            compare(town.without("train"), along, town.plans[0])
    monkeypatch.setattr("client.station.noted", lambda folder, _: {"images": len(list(folder.rglob("image.sealed")))})
    monkeypatch.setattr("client.station.Station._progress", lambda *_: None)
    with pytest.raises(AssertionError):
        compare(town.without("train"), town.station("along"), town.plans[0])
