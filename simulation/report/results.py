"""``result.json`` as typed objects, checked once when it is read; everything after that trusts them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared_models.errors import FederadError

Metrics = dict[str, float]
Result = TypeVar("Result", bound=BaseModel)


class Part(BaseModel):
    """A part of a result; numbers in it are finite."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Site(Part):
    """What one site brought."""

    name: str
    scanner: str
    patients: dict[Literal["train", "validation", "test"], int]
    """Number of patients in each split."""

    skipped: dict[str, int]
    """Number of files that were not used, for each reason."""

    simulated: int = 0
    """Number of studies whose phase and coils are made up."""


class Round(Part):
    """One exchange with the sites."""

    round: int
    seconds: float
    replied: tuple[str, ...]
    refused: tuple[dict[Literal["site", "reason"], str], ...]
    missing: tuple[str, ...]
    training_loss: float | None
    validation: Metrics | None
    per_site: dict[str, Metrics]


class Cost(Part):
    """What one release has cost a patient."""

    epsilon: float
    delta: float


class Noised(Part):
    """A number with noise."""

    value: float
    interval: tuple[float, float]
    """Where 95 % of the noise around ``value`` lies."""

    cost: Cost
    """Of the one release that held it, for a patient it is about."""


Figures = dict[str, float | Noised]


class Tested(Part):
    """Test metrics: means over all patients, one field each, beside every site's own; sites without any are left out."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: Figures
    per_site: dict[str, Figures]
    """Beside its metrics a site has the number of its ``patients``, or under ``[privacy]`` its ``declared_size``."""

    @property
    def mean(self) -> Metrics:
        """Means over patients."""
        return {name: _value(figure) for name, figure in self.__pydantic_extra__.items()}

    def at(self, site: str, metric: str) -> float | None:
        """A site's own figure; None if it has none."""
        figure = self.per_site.get(site, {}).get(metric)
        return None if figure is None else _value(figure)

    def interval(self, metric: str, site: str | None = None) -> tuple[float, float] | None:
        """Where 95 % of the noise around a mean, or a site's figure, lies; None without noise."""
        figure = (self.__pydantic_extra__ if site is None else self.per_site.get(site, {})).get(metric)
        return figure.interval if isinstance(figure, Noised) else None

    @property
    def cost(self) -> Cost | None:
        """What the figures have cost a patient they are about; None for exact ones."""
        return next((f.cost for f in self.__pydantic_extra__.values() if isinstance(f, Noised)), None)


def _value(figure: float | Noised) -> float:
    return figure.value if isinstance(figure, Noised) else figure


class Ways(NamedTuple):
    """The headline metric of four ways to train, on the same test patients; None where a way was not taken."""

    own: float | None
    elsewhere: float | None
    """Mean of the other hospitals' own models."""

    central: float | None
    shared: float | None

    def gain(self, over: float | None) -> float | None:
        """How far the shared model is above another way."""
        return None if self.shared is None or over is None else self.shared - over


class Method(Part):
    """One model, measured everywhere."""

    method: str
    per_site: Metrics
    interval: dict[str, tuple[float, float]] = {}
    """95 % of what other patients of a site might have given, by site."""

    mean: float | None
    """Mean over sites, each counting the same; None where no site has the metric."""


class Comparison(Part):
    """The shared model beside a central one and each hospital's own."""

    rows: tuple[Method, ...]
    local_own: float | None
    local_elsewhere: float | None

    @property
    def by_method(self) -> dict[str, Method]:
        """The models by name: ``federated``, ``central``, and ``local:SITE`` for each hospital that could train;
        ``personal:SITE`` where the strategy leaves a part of the model at the site."""
        return {row.method: row for row in self.rows}

    @property
    def mean(self) -> Ways:
        """Means over sites."""
        rows = self.by_method
        return Ways(self.local_own, self.local_elsewhere, rows["central"].mean, rows["federated"].mean)

    def at(self, site: str) -> Ways:
        """On the test patients of one site."""
        values = {row.method: row.per_site.get(site) for row in self.rows if "personal:" not in row.method}
        shared, central, own = values.pop("federated"), values.pop("central"), values.pop(f"local:{site}", None)
        others = [v for v in values.values() if v is not None]
        return Ways(own, sum(others) / len(others) if others else None, central, shared)


class Budget(Part):
    """What one site spent of its privacy budget."""

    epsilon: float
    """Of one patient."""

    delta: float
    declared_size: int
    """Public number of patients that its training draws from; of images where the plan's unit is one image."""

    image_epsilon: float | None = None
    """For one image, of an image-level plan."""


class Probe(Part):
    """How well a fresh probe reads something off the features of test patients."""

    accuracy: float
    """Mean over what it tells apart of the share that it names."""

    chance: float
    """What guessing gives."""


class Scanners(Part):
    """Test metrics by scanner."""

    seen: dict[str, dict[str, float]]
    unseen: dict[str, dict[str, float | str]]
    """By hospital that trained nothing; ``scanner`` says what it has."""

    leakage: Probe | None = None
    kept: Probe | None = None


class Doubtful(Part):
    """How sure the models were of one test patient, and how well they did."""

    site: str
    seen: bool
    """Whether the hospital trained."""

    poor: bool
    score: float
    score_single: float
    entropy: float
    entropy_single: float
    mutual_information: float
    disagreement: float


class Flag(Part):
    """How well a number tells poor patients."""

    auroc: float | None
    correlation: float | None


class Calibration(Part):
    """What ``--uncertainty`` looked at: see ``simulation.calibration``."""

    temperature: float
    members: dict[str, int]
    ece: dict[str, float]
    points: dict[str, tuple[tuple[float, float], ...]]
    """Confidence, and share that is right."""

    patients: tuple[Doubtful, ...]
    flags: dict[str, Flag]


class Run(Part):
    """What ``federad-sim run`` writes."""

    plan: str
    plan_sha256: str
    task: str
    headline: str
    """The metric that chooses the best model; larger is better."""

    metrics: dict[str, bool]
    """Name of each metric, and whether larger is better."""

    labels: tuple[str, ...] = ()
    engine: str
    workers: int
    seed: int
    command: str
    sites: tuple[Site, ...]
    rounds: tuple[Round, ...]
    test: Tested | None
    comparison: Comparison | None
    scanners: Scanners | None = None
    """Where the plan is about scanners."""

    uncertainty: Calibration | None = None
    """Where it was asked for."""

    classical: tuple[Method, ...] = ()
    """Methods that learn nothing, on the same test patients."""

    stability: dict[str, Metrics] = {}
    """By site, how steady the shared model is."""

    privacy: dict[str, Budget] | None
    versions: dict[str, str]
    started: datetime
    seconds: float
    status: Literal["finished", "paused", "stopped", "failed"]
    message: str | None = None
    """Why the run did not finish."""

    best_round: int | None = None
    released: Literal["best", "last", "averaged"] | None = None
    weights_sha256: str | None
    released_sha256: str | None = None
    scanners_sha256: str | None = None
    """Of the emulated scanners; None where images were given."""

    @property
    def is_private(self) -> bool:
        """Whether the plan has a table ``[privacy]``; known once a round is done."""
        return self.privacy is not None

    @property
    def is_emulated(self) -> bool:
        """Whether the patients are a simulation's, and protect nobody."""
        return self.scanners_sha256 is not None

    @property
    def names(self) -> list[str]:
        """The sites."""
        return [site.name for site in self.sites]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """The headline metric on validation patients after each round that has it."""
        measured = [(r.round, (r.validation or {}).get(self.headline)) for r in self.rounds]
        return [(number, value) for number, value in measured if value is not None]

    @property
    def best_validation(self) -> float | None:
        """The headline metric on validation patients after the best round."""
        return max((value for _, value in self.validation), default=None)


class Measured(Part):
    """A line of an experiment's table: mean and standard deviation over seeds."""

    method: str
    metric: str
    split: str
    mean: float
    sd: float
    interval: tuple[float, float] | None = None
    """95 % t-interval of the mean over seeds; None for one seed."""

    values: tuple[float, ...]
    line: str | None = None
    """The line of the drawing on which this row is a point; None for a row that is on none."""

    at: str | None = None
    """The place on the horizontal axis above which the point lies."""


class Claim(Part):
    """What an experiment set out to show, and whether it did."""

    claim: str
    value: float
    interval: tuple[float, float] | None = None
    values: tuple[float, ...]
    expected: float
    bound: Literal["at least", "at most"] = "at least"
    holds: bool
    id: str


class Experiment(Part):
    """What ``federad-sim experiment`` writes."""

    experiment: str
    title: str
    plans: dict[str, str]
    """SHA-256 of each arm's plan by the name of the arm."""

    quick: bool
    seeds: tuple[int, ...]
    axis: str = ""
    """What the horizontal axis of the drawing shows, where rows are points of lines."""

    rows: tuple[Measured, ...]
    claims: tuple[Claim, ...]
    command: str
    seconds: float


def read(kind: type[Result], folder: Path) -> Result:
    """``result.json`` of a folder; R231 if there is none or it is something else."""
    try:
        return kind.model_validate_json((folder / "result.json").read_bytes())
    except OSError as error:
        happened = f"There is no result.json that can be read in {folder} ({type(error).__name__})."
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        happened = f"{folder / 'result.json'} is not a result: {where}: {first['msg'][0].lower()}{first['msg'][1:]}."
    raise FederadError(
        "R231",
        happened=happened,
        because="The report is written from result.json alone, so that it can say nothing else.",
        remedies=(
            "give the folder that was named with --out",
            "or run the plan again: federad-sim run PLAN.toml --out DIR",
        ),
    )
