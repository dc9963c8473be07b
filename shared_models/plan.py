"""The plan: everything a consortium agreed on, read from one TOML file, frozen, validated and hashed.

The same file serves simulation and deployment. Its SHA-256 is its identity: it is taken over the validated content, so
comments, order and spelling of defaults do not change it, while any value does. What a hospital decides for itself
(where data lies, which device, what it permits) is not here; it lives in the site's own ``site.toml``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from shared_models.configuration import divisors
from shared_models.errors import FederadError
from shared_models.networks import NETWORKS, NETWORKS_FOR, NETWORKS_FOR_ANY_SIZE, NOT_BY_IMAGE, WITH_NORMS
from shared_models.registry import one_of
from shared_models.scanners import MAKERS, OTHER, parse_scanner
from shared_models.tasks import OF_KSPACE, TASKS, WITH_BACKGROUND, WITH_NUMBERS

NOT_YET = ("secure_sum",)
"""Tables that DESIGN reserves and that this version refuses, so that nobody believes they are in force."""

ADVERSARIAL_ONLY = ("strength", "reads", "conditional", "gradient_ratio", "warm_up", "scanners")
"""Keys of ``[adaptation]`` that have a meaning beside ``adversarial`` alone."""

MOMENTS_ONLY = ("moments_every", "moments_clip", "moments_noise")
"""Those that have one for ``adversarial = "moments"`` alone."""

WITHOUT_PRIVACY_ONLY = {"epochs": "steps_per_round", "batch_size": "patients_per_step"}
"""Keys of ``[training]`` that have no meaning under ``[privacy]``, and the key there that takes their place."""

READ_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("task", "label_attribute"): ("classification", "quantification"),
    ("task", "residual_units"): (
        *("unet", "segresnet", "dynunet", "resnet", "densenet", "efficientnet"),
        *("varnet", "image-unet"),
    ),
    ("task", "dropout"): ("segmentation", "resnet", "scan-plane", "densenet"),
    ("task", "sharpness"): ("classification",),
    ("task", "target"): ("classification", "quantification"),
    ("task", "views"): ("classification",),
    ("training", "foreground"): ("segmentation",),
    ("training", "balanced"): ("classification",),
    ("training", "loss"): ("segmentation", "quantification"),
    ("training", "class_weights"): ("segmentation", "classification"),
    ("task", "reference"): ("reconstruction",),
    ("task", "mask"): ("reconstruction",),
    ("task", "acceleration"): ("reconstruction",),
    ("task", "site_acceleration"): ("reconstruction",),
    ("task", "centre_fraction"): ("reconstruction",),
    ("task", "cascades"): ("cascade", "varnet"),
    ("task", "consistency"): ("cascade",),
    ("data", "coils"): ("reconstruction",),
    ("data", "simulated"): ("reconstruction",),
}
"""Keys with a meaning for these kinds of task or networks alone; elsewhere they are refused."""

MOST_FINDINGS = 30
"""Labels of a study that may have several."""

LOSSES: dict[str, tuple[str, ...]] = {
    "segmentation": ("dice-ce", "dice", "binary-dice", "cross-entropy", "focal", "heteroscedastic"),
    "count": ("poisson", "squared"),
    "proportion": ("proportion", "squared"),
}
"""Losses of a kind of task, or of what is quantified; the first is taken where a plan names none."""

KEYS_OF_STRATEGY: dict[str, tuple[tuple[str, ...], float | None]] = {
    "proximal_mu": (("fedprox",), 0.01),
    "server_learning_rate": (("fedadam", "fedyogi"), 0.01),
    "beta_1": (("fedadam", "fedyogi"), None),
    "beta_2": (("fedadam", "fedyogi"), None),
    "tau": (("fedadam", "fedyogi"), None),
    "personal_pull": (("ditto",), 0.1),
}
"""Keys of ``[strategy]`` that some names alone read, and an example where such a name cannot do without the key."""

OF_EACH_SITE = frozenset({"fedbn", "ditto"})
"""Strategies whose models differ between sites."""

Dimensions = Literal[2, 3]

EVERYBODY = 100_000
"""Largest ``patients_per_step``: more than a site has, so that all of its patients take part."""


class _ContradictionError(ValueError):
    """Two keys that exclude each other; carries the remedy."""

    def __init__(self, key: str, happened: str, because: str, remedy: str) -> None:
        super().__init__(happened)
        self.key, self.happened, self.because, self.remedy = key, happened, because, remedy


def _none_or_several(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) == 1:
        raise ValueError("one label alone tells nothing apart")
    return names


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _quoted(names: tuple[str, ...]) -> str:
    return " and ".join(f'"{name}"' for name in names)


class TaskTable(_Table):
    """What is learned."""

    kind: Annotated[str, AfterValidator(one_of(TASKS))] = Field(
        description=f"the kind of task, one of: {', '.join(TASKS)}"
    )
    labels: Annotated[tuple[str, ...], AfterValidator(_none_or_several)] = Field(
        max_length=256,
        description="names of the label values 0, 1, ..., at least 2: in segmentation and quantification the first is "
        '"background"',
    )
    network: Annotated[str, AfterValidator(one_of(NETWORKS))] = Field(
        description=f"the network, one of: {', '.join(NETWORKS)}"
    )
    channels: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        default=(16, 32, 64, 128),
        min_length=2,
        max_length=7,
        description="features at each depth, e.g. [16, 32, 64, 128]; of a cascade, of each layer of its networks",
    )
    residual_units: int = Field(default=1, ge=0, le=8, description="residual units at each depth, 0 to 8")
    dropout: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of features that are left out at random while training, such as 0.1; leave it out for none",
    )
    sharpness: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="of the pooling of class maps: near 0 for the mean, 100 for nearly the maximum; leave it out for 1",
    )
    target: Literal["nominal", "ordinal", "multi-label", "count", "proportion"] | None = Field(
        default=None,
        description='of classification: "ordinal" where the labels are in order, such as grades, "multi-label" where a '
        'study may have several or none; leave it out for "nominal". Of quantification: "count" or "proportion"',
    )
    views: Literal["orthogonal"] | None = Field(
        default=None,
        description='"orthogonal": a 2-D network sees planes along each axis of a volume; leave it out for slices (2-D) or '
        "volumes (3-D)",
    )
    label_attribute: str | None = Field(
        default=None,
        pattern=r"^[A-Z][A-Za-z]{0,62}$",
        description='keyword of the DICOM attribute that holds the label, such as "BodyPartExamined"; leave it out to '
        "take labels from labels.csv or from folders",
    )
    reference: Literal["complex", "magnitude"] = Field(
        default="complex",
        description='what images are compared with: "complex" coil images, or the "magnitude" of all coils',
    )
    mask: Literal["variable-density", "equispaced", "radial"] = Field(
        default="variable-density",
        description='which samples are measured: "variable-density", "equispaced" or "radial"',
    )
    acceleration: Annotated[float, Field(ge=2, le=16)] = Field(
        default=4.0, description="samples of the full k-space over measured ones, 2 to 16"
    )
    site_acceleration: tuple[tuple[str, Annotated[float, Field(ge=2, le=16)]], ...] | None = Field(
        default=None,
        description='sites that measure another share, such as [["site-1", 4.0], ["site-2", 8.0]]',
    )
    centre_fraction: float = Field(
        default=0.08,
        gt=0,
        le=0.5,
        description="share of lines side by side in the centre of k-space, below 1/acceleration",
    )
    cascades: int = Field(default=5, ge=1, le=20, description="networks of the cascade, one after the other, 1 to 20")
    consistency: Literal["noiseless", "noisy", "none"] = Field(
        default="noiseless",
        description='what each step of a cascade does to measured samples: "noiseless" returns them, "noisy" draws towards '
        'them, "none" nothing',
    )

    @property
    def named_labels(self) -> tuple[str, ...]:
        """What a person would say is learned: all labels, but for the background of what is drawn."""
        return self.labels[1:] if self.kind in WITH_BACKGROUND else self.labels


class SplitTable(_Table):
    """Expected shares of a site's patients; each patient's place is fixed for ever by a secret hash."""

    train: float = Field(default=0.6, gt=0, lt=1, description="share of patients to train on, between 0 and 1")
    validation: float = Field(
        default=0.15, ge=0, lt=1, description="share that chooses the best model, between 0 and 1"
    )
    test: float = Field(default=0.25, gt=0, lt=1, description="share that is measured once at the end, between 0 and 1")

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-9:
            raise _ContradictionError(
                "data.split",
                f"the shares add up to {total:g}",
                "Every patient has exactly one place.",
                "make train + validation + test equal 1",
            )
        return self


class DataTable(_Table):
    """Which images take part and the grid they are brought to."""

    modality: Literal["MR", "CT", "PT", "DX", "OP"] = Field(
        description='DICOM modality: "MR", "CT", "PT", "DX" for radiographs, or "OP" for eye photographs'
    )
    dimensions: Dimensions = Field(description="2 (slices) or 3 (volumes)")
    patch: tuple[Annotated[int, Field(ge=8, le=4096)], ...] = Field(
        min_length=2, max_length=3, description="training patch in pixels or voxels, as (y, x) or (z, y, x)"
    )
    spacing_mm: tuple[Annotated[float, Field(gt=0, le=50)], ...] | None = Field(
        default=None,
        description="grid spacing in mm, as (y, x) or (z, y, x); leave it out to keep each image's own grid",
    )
    channels: tuple[str, ...] = Field(
        default=("image",),
        min_length=1,
        description='input channels: sequence names such as ["flair", "t1c"]; "image" takes the only one there is, '
        '["red", "green", "blue"] a colour photograph',
    )
    coils: int = Field(default=1, ge=1, le=64, description="receiver coils of the k-space, 1 to 64")
    simulated: bool = Field(
        default=False,
        description="whether magnitude images stand in for k-space, with a phase and coils that are made up: true or false",
    )
    split: SplitTable = Field(default_factory=SplitTable, description="shares for train, validation and test")


class TrainingTable(_Table):
    """How each site trains in a round."""

    epochs: int = Field(
        default=1, ge=1, le=1000, description="passes over the site's training patients in each round, 1 or more"
    )
    batch_size: int = Field(default=8, ge=1, le=4096, description="patches in one step, 1 or more")
    samples_per_patient: int = Field(
        default=4, ge=1, le=4096, description="patches drawn from each patient in each epoch"
    )
    foreground: float = Field(
        default=0.5, ge=0, le=1, description="share of patches centred on a labelled voxel, 0 to 1"
    )
    loss: (
        Literal[
            "dice-ce",
            "dice",
            "binary-dice",
            "cross-entropy",
            "focal",
            "heteroscedastic",
            "poisson",
            "proportion",
            "squared",
        ]
        | None
    ) = Field(
        default=None,
        description='of segmentation "dice", "binary-dice" for two labels, "cross-entropy", "focal", "heteroscedastic" to '
        'learn the noise of each voxel, too, or leave it out for "dice-ce"; of quantification "squared", or leave it out '
        'for "poisson" of counts and "proportion" of proportions',
    )
    class_weights: tuple[Annotated[float, Field(gt=0, le=1000)], ...] | None = Field(
        default=None,
        description="weight of each label in the loss, in the order of task.labels; leave it out for 1 each",
    )
    balanced: bool | None = Field(
        default=None,
        description="true: at each site, among the studies of each of its scanners, all labels count alike in the loss, "
        "however common they are there; leave it out otherwise",
    )
    flips: bool = Field(default=True, description="mirror patches left to right at random: true or false")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(default="adam", description='"adam", "adamw" or "sgd"')
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="step size, above 0")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description='"constant", or "cosine": from learning_rate down to nearly 0 over the rounds'
    )
    momentum: float | None = Field(
        default=None, ge=0, lt=1, description='Nesterov momentum within a round, for "sgd" only (0.9 is usual)'
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="weight decay, 0 or more")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description='"float32", or "bfloat16" for mixed precision where the device supports it'
    )

    @model_validator(mode="after")
    def _momentum(self) -> Self:
        if self.momentum is not None and self.optimizer != "sgd":
            raise _ContradictionError(
                "training.momentum",
                f'optimizer = "{self.optimizer}" with momentum = {self.momentum:g}',
                "Adam and AdamW keep averages of their own, so the key would be ignored.",
                'set optimizer = "sgd" or remove momentum',
            )
        return self


class StrategyTable(_Table):
    """How rounds are run and updates combined."""

    name: Literal["fedavg", "fedprox", "fedadam", "fedyogi", "scaffold", "fedbn", "ditto"] = Field(
        default="fedavg",
        description='"fedavg", "fedprox", "fedadam", "fedyogi", "scaffold", or one whose models differ between sites: '
        '"fedbn", "ditto"',
    )
    weighting: Literal["equal"] | None = Field(
        default=None,
        description='"equal" lets every site count alike, as [privacy] always does; leave it out to count patients',
    )
    minimum_sites: int = Field(default=2, ge=1, le=10_000, description="a round with fewer good replies pauses the run")
    deadline_s: float = Field(default=3600.0, gt=0, le=7 * 86_400, description="seconds a round waits for its sites")
    proximal_mu: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description='weight of the proximal term, for "fedprox" only (0.001 to 1 in the paper)',
    )
    server_learning_rate: float | None = Field(
        default=None, gt=0, le=10, description='step size of the server, for "fedadam" and "fedyogi" only, such as 0.01'
    )
    beta_1: float | None = Field(
        default=None, ge=0, lt=1, description='decay of the server\'s mean update, for "fedadam" and "fedyogi"; 0.9'
    )
    beta_2: float | None = Field(
        default=None, ge=0, lt=1, description='decay of its mean square, for "fedadam" and "fedyogi"; 0.99'
    )
    tau: float | None = Field(
        default=None, gt=0, le=1, description='smallest divisor of a step, for "fedadam" and "fedyogi"; 0.001'
    )
    personal_pull: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description='pull of a site\'s own model to the shared one, for "ditto" only (0.05 to 2 in the paper)',
    )
    release: Literal["best", "last", "averaged"] = Field(
        default="best",
        description='the model that is tested and released: "best" by validation; the "last", as a falling schedule wants '
        'where few patients validate; or "averaged" over rounds. [privacy] demands one of the latter two',
    )
    average_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description='for release = "averaged" only: how much of the average stays from one round to the next, such as 0.9',
    )
    start: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the model.safetensors at which training begins; leave it out for fresh weights",
    )
    start_run: str | None = Field(
        default=None,
        pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$",
        description="the run that made the model named by start; with [privacy] a site looks it up in its ledger",
    )
    max_update_norm: float = Field(
        default=1000.0, gt=0, le=1e5, description="an update with a larger L2 norm is refused, up to 1e5"
    )

    @model_validator(mode="after")
    def _run_of_start(self) -> Self:
        if self.start_run is not None and self.start is None:
            raise _ContradictionError(
                "strategy.start_run",
                f'start_run = "{self.start_run}" without start',
                "It says which run made the model at which training begins, and training begins at fresh weights.",
                "add start, the SHA-256 of its model.safetensors, or remove start_run",
            )
        return self

    @model_validator(mode="after")
    def _average(self) -> Self:
        if (self.release == "averaged") != (self.average_decay is not None):
            raise _ContradictionError(
                "strategy.average_decay",
                f'release = "{self.release}" '
                + (
                    "without average_decay"
                    if self.average_decay is None
                    else f"with average_decay = {self.average_decay:g}"
                ),
                "The average of a run needs a decay, and nothing else uses one.",
                'set both under [strategy], for example release = "averaged" and average_decay = 0.9, or neither',
            )
        return self

    @model_validator(mode="after")
    def _keys_of_name(self) -> Self:
        for key, (names, example) in KEYS_OF_STRATEGY.items():
            value = getattr(self, key)
            if value is not None and self.name not in names:
                raise _ContradictionError(
                    f"strategy.{key}",
                    f'name = "{self.name}" with {key} = {value:g}',
                    f"{_quoted(names)} alone {'have' if len(names) > 1 else 'has'} such a number, so it would be ignored.",
                    f'set name = "{names[0]}" or remove {key}',
                )
            if value is None and self.name in names and example is not None:
                raise _ContradictionError(
                    f"strategy.{key}",
                    f'name = "{self.name}" without {key}',
                    "It is what this strategy is about, and no value of it is right for everyone.",
                    f"add {key} = {example:g} under [strategy]",
                )
        return self

    @model_validator(mode="after")
    def _last_of_each_site(self) -> Self:
        if self.name in OF_EACH_SITE and self.release != "last":
            raise _ContradictionError(
                "strategy.release",
                f'name = "{self.name}" with release = "{self.release}"',
                "A part of each site's model stays at the site, which keeps the last one and no other.",
                'set release = "last" under [strategy]',
            )
        return self


class PrivacyTable(_Table):
    """Differential privacy: whom it protects, how strongly, and the steps it is paid for.

    Every number here is public. The noise of a step is Gaussian with standard deviation ``noise_multiplier * clip`` on
    the sum of what each patient gives, and the divisor is ``patients_per_step``, whatever a site holds.
    """

    unit: Literal["patient", "image"] = Field(
        default="patient",
        description='whom the noise hides: "patient" with all images, or "image", which does not protect patients',
    )
    epsilon: float | None = Field(
        default=None, gt=0, le=1000, description="privacy loss of the whole run, above 0; the noise follows from it"
    )
    noise_multiplier: float | None = Field(
        default=None, ge=0.01, le=1000, description="noise over clip, 0.01 to 1000; epsilon follows from it"
    )
    delta: float = Field(default=1e-5, gt=0, le=1e-5, description="slack of the promise, a probability up to 1e-5")
    clip: float = Field(default=1.0, ge=1e-6, le=1e6, description="largest L2 norm of what one patient gives to a step")
    clipping: Literal["flat", "automatic"] = Field(
        default="flat",
        description='"flat": longer gradients are cut to clip; "automatic": all are scaled to about clip',
    )
    clip_gamma: float | None = Field(
        default=None, gt=0, le=1e6, description='stabiliser of the norm, for clipping = "automatic" only'
    )
    patients_per_step: int = Field(
        ge=1, le=EVERYBODY, description="expected patients (or images) of a step and the divisor of its sum, 1 or more"
    )
    steps_per_round: int = Field(ge=1, le=100_000, description="steps of each site in each round, 1 or more")
    images_per_patient: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description='most images that one patient trains with, for unit = "image" only: what it means for a patient '
        "follows from it",
    )
    views: int = Field(default=1, ge=1, le=64, description="random views of each sample, averaged within the patient")
    metrics_every: int = Field(default=0, ge=0, le=10_000, description="rounds between noised metrics; 0 for none")
    metrics_noise: float | None = Field(
        default=None,
        ge=0.01,
        le=1000,
        description="noise multiplier of one release of metrics, with metrics_every only",
    )

    @model_validator(mode="after")
    def _one_of_epsilon_and_noise(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise _ContradictionError(
                "privacy.epsilon",
                "neither epsilon nor noise_multiplier is given"
                if self.epsilon is None
                else f"epsilon = {self.epsilon:g} with noise_multiplier = {self.noise_multiplier:g}",
                "Each of the two follows from the other.",
                "give one of them, for example epsilon = 8.0 under [privacy]",
            )
        return self

    @model_validator(mode="after")
    def _bound_of_images(self) -> Self:
        if (self.unit == "image") != (self.images_per_patient is not None):
            raise _ContradictionError(
                "privacy.images_per_patient",
                'unit = "image" without images_per_patient'
                if self.images_per_patient is None
                else f'unit = "patient" with images_per_patient = {self.images_per_patient}',
                "Hiding single images means the less for a patient, the more images a patient has; nothing else needs it.",
                'add images_per_patient = 20 under [privacy] for unit = "image", or remove it for "patient"',
            )
        return self

    @model_validator(mode="after")
    def _gamma_of_automatic_clipping(self) -> Self:
        if (self.clipping == "automatic") != (self.clip_gamma is not None):
            raise _ContradictionError(
                "privacy.clip_gamma",
                'clipping = "automatic" without clip_gamma'
                if self.clip_gamma is None
                else f'clipping = "flat" with clip_gamma = {self.clip_gamma:g}',
                'Automatic clipping divides by the norm plus clip_gamma, and "flat" clipping has no such number.',
                'add clip_gamma = 0.01 under [privacy] for clipping = "automatic", or remove it for "flat"',
            )
        return self

    @model_validator(mode="after")
    def _noise_of_metrics(self) -> Self:
        if (self.metrics_every > 0) != (self.metrics_noise is not None):
            raise _ContradictionError(
                "privacy.metrics_noise",
                f"metrics_every = {self.metrics_every} "
                + ("without metrics_noise" if self.metrics_noise is None else f"with {self.metrics_noise:g}"),
                "Metrics of patients leave with noise of their own, or not at all.",
                "give metrics_every = 5 and metrics_noise = 10.0 together under [privacy], or neither",
            )
        return self


class AdaptationTable(_Table):
    """What is done about differences between scanners."""

    appearance: bool = Field(
        default=False, description="vary contrast, shading, blur and noise of training samples: true or false"
    )
    adversarial: Literal["scanner", "moments"] | None = Field(
        default=None,
        description='"scanner": features learn to hide the scanner from a discriminator, at sites with several; "moments": '
        "from one that the server trains on moments of features, where sites have one each; leave it out for none",
    )
    strength: float = Field(
        default=0.3, gt=0, le=100, description="weight of the gradient that hides scanners after the warm-up, above 0"
    )
    reads: Literal["predictions"] | None = Field(
        default=None,
        description='"predictions": outlines learn to look alike whatever the scanner, for segmentation with adversarial = '
        '"scanner" only; leave it out for features',
    )
    conditional: bool = Field(
        default=False, description="tell scanners apart among samples of the same label: true or false"
    )
    gradient_ratio: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="most that a sample's gradient against scanners may be beside the task's, at each depth: above 0, to 1",
    )
    warm_up: float = Field(
        default=0.2, ge=0, lt=1, description="share of the rounds before that gradient begins, 0 to below 1"
    )
    scanners: tuple[str, ...] | None = Field(
        default=None,
        min_length=2,
        max_length=64,
        description='scanners to tell apart, such as ["SIEMENS 3 T", "GE SIGNA Vesper 1.5 T"]; all others count as one; '
        "leave it out for makers and field strengths",
    )
    moments_every: int = Field(
        default=5, ge=1, le=10_000, description='rounds between releases of moments, for adversarial = "moments" only'
    )
    moments_clip: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="largest L2 norm of a patient's mean features, which measure about 1, in a release of moments",
    )
    moments_noise: float | None = Field(
        default=None,
        ge=0.01,
        le=1000,
        description='noise multiplier of one release of moments, for adversarial = "moments" with [privacy] only',
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not self.appearance and self.adversarial is None:
            raise _ContradictionError(
                "adaptation.appearance",
                "a table [adaptation] that adapts nothing",
                "A run without adaptation has no such table.",
                'set appearance = true or adversarial = "scanner" under [adaptation], or remove the table',
            )
        return self

    @model_validator(mode="after")
    def _adversary(self) -> Self:
        said = [key for key in ADVERSARIAL_ONLY if key in self.model_fields_set]
        if self.adversarial is None and said:
            raise _ContradictionError(
                f"adaptation.{said[0]}",
                f"{said[0]} without adversarial",
                "A key that nothing reads would be ignored in silence.",
                f'set adversarial = "scanner" under [adaptation], or remove {said[0]}',
            )
        return self

    @model_validator(mode="after")
    def _moments(self) -> Self:
        said = [key for key in MOMENTS_ONLY if key in self.model_fields_set and getattr(self, key) is not None]
        if self.adversarial != "moments" and said:
            raise _ContradictionError(
                f"adaptation.{said[0]}",
                f"{said[0]} with adversarial = {json.dumps(self.adversarial)}"
                if self.adversarial
                else f"{said[0]} alone",
                "No moments leave then, so the key would be ignored.",
                f'set adversarial = "moments" under [adaptation], or remove {said[0]}',
            )
        if self.adversarial == "moments" and self.conditional:
            raise _ContradictionError(
                "adaptation.conditional",
                'conditional with adversarial = "moments"',
                "Moments are those of a scanner, and of no label.",
                'remove conditional from [adaptation], or set adversarial = "scanner"',
            )
        return self

    @model_validator(mode="after")
    def _reads(self) -> Self:
        for key, is_set in (
            ('adversarial = "moments"', self.adversarial == "moments"),
            ("conditional = true", self.conditional),
        ):
            if self.reads is not None and is_set:
                raise _ContradictionError(
                    "adaptation.reads",
                    f'reads = "{self.reads}" with {key}',
                    "Moments, and labels that a discriminator is told, are of features.",
                    f"remove reads from [adaptation], or {key}",
                )
        return self

    @model_validator(mode="after")
    def _table_of_scanners(self) -> Self:
        for name in self.scanners or ():
            if parse_scanner(name).maker == OTHER:
                raise _ContradictionError(
                    "adaptation.scanners",
                    f"scanners names {name!r}, which begins with no known maker",
                    "What a header says is brought to one spelling of its maker before it is compared.",
                    f"begin with one of: {', '.join(MAKERS)}",
                )
        return self


class SimulationTable(_Table):
    """What the harness emulates; a deployment carries it along unread."""

    patients: int = Field(default=40, ge=1, le=100_000, description="patients of each emulated hospital, 1 or more")
    slices: int = Field(default=12, ge=1, le=200, description="slices of each emulated series, 1 to 200")
    scanners: tuple[str, ...] = Field(
        default=(),
        description="names of emulated scanners, dealt to the sites in this order, or several of one site joined by a plus "
        "sign; empty takes the first four in turn",
    )
    second_series: str | None = Field(
        default=None,
        pattern="^[a-z0-9][a-z0-9.-]{0,62}$",
        description="emulated scanner whose sequence each study shows as well, on its own device; leave it out for none",
    )
    prevalence: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description="share of patients with a lesion, dealt to the sites in this order; leave it out for all of them",
    )
    label_skew: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="how alike the sites are in their shares of labels: 0.1 for hardly, 100 for nearly; leave it out for "
        "equal shares",
    )
    confounding: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description="share of patients with a lesion who come to the first scanner of their site, and of those without who "
        "come to another, dealt to the sites; leave it out for chance",
    )
    size_skew: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="how alike hospitals are in size: 0.5 for hardly, 100 for nearly; leave it out for equal sizes",
    )
    unlabelled: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="emulated scanners whose studies have no reference at the sites"
    )
    unseen: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="emulated scanners of further hospitals that train nothing: the released model is tested there",
    )
    unseen_prevalence: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        default=None, min_length=1, description="share of patients with a lesion, dealt to the unseen hospitals"
    )
    unseen_confounding: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        default=None, min_length=1, description="as confounding, dealt to the unseen hospitals"
    )
    spacing_mm: tuple[Annotated[float, Field(ge=0.5, le=20)], ...] | None = Field(
        default=None,
        min_length=3,
        max_length=3,
        description="spacing of emulated images in mm as (z, y, x), whatever the plan brings them to; leave it out for the "
        "plan's",
    )
    spacing_spread: float | None = Field(
        default=None,
        gt=0,
        lt=0.5,
        description="how much finer or coarser than spacing_mm a site's images may be, such as 0.1; leave it out for none",
    )
    drop_out: float = Field(default=0.0, ge=0, lt=1, description="probability that a site misses a round, 0 to below 1")
    delay_s: float = Field(default=0.0, ge=0, le=3600, description="longest emulated delay of an answer in seconds")
    late_joiners: int = Field(default=0, ge=0, le=10_000, description="how many of the last sites join late")
    late_round: int = Field(default=2, ge=2, le=10_000, description="round in which late joiners appear, 2 or more")

    @model_validator(mode="after")
    def _spread_around_something(self) -> Self:
        if self.spacing_spread is not None and self.spacing_mm is None:
            raise _ContradictionError(
                "simulation.spacing_spread",
                f"spacing_spread = {self.spacing_spread:g} without spacing_mm",
                "It says how much sites differ from that spacing.",
                "add spacing_mm = [5.0, 1.0, 1.0] under [simulation], or remove spacing_spread",
            )
        return self


class Plan(_Table):
    """One agreed plan: frozen, validated, hashable.

    Read it with :meth:`load`; a mistake raises :class:`~shared_models.errors.FederadError` P100 to P104 with the key,
    the value and the remedy.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="lower-case letters, digits and hyphens")
    rounds: int = Field(ge=1, le=10_000, description="exchanges with the sites, 1 or more")
    task: TaskTable = Field(description="a table [task]")
    data: DataTable = Field(description="a table [data]")
    training: TrainingTable = Field(default_factory=TrainingTable, description="a table [training]")
    strategy: StrategyTable = Field(default_factory=StrategyTable, description="a table [strategy]")
    simulation: SimulationTable = Field(default_factory=SimulationTable, description="a table [simulation]")
    privacy: PrivacyTable | None = Field(default=None, description="a table [privacy]; leave it out for none")
    adaptation: AdaptationTable | None = Field(default=None, description="a table [adaptation]; leave it out for none")
    asks: Literal["fingerprint"] | None = Field(
        default=None,
        description='"fingerprint": sites count spacings and sizes of their images, once, and train nothing; leave it out '
        "to train",
    )

    @model_validator(mode="after")
    def _asks_once(self) -> Self:
        if self.asks is None:
            return self
        privacy = self.privacy
        wrong = {
            "rounds": (self.rounds != 1, "is asked once", "rounds = 1"),
            "adaptation": (self.adaptation is not None, "trains nothing that could adapt", "no [adaptation]"),
            "data.spacing_mm": (self.data.spacing_mm is not None, "is of images as they are", "no spacing_mm"),
            "data.dimensions": (self.data.dimensions != 3, "is of volumes", "dimensions = 3"),
            "task.kind": (self.task.kind != "segmentation", "is for segmentation", 'kind = "segmentation"'),
            "strategy.name": (self.strategy.name != "fedavg", "is added up", 'name = "fedavg"'),
            "strategy.release": (self.strategy.release == "averaged", "is no model", 'release = "last"'),
            "strategy.start": (self.strategy.start is not None, "begins at no model", "no start"),
            "privacy.noise_multiplier": (
                privacy is not None and privacy.noise_multiplier is None,
                "has noise that the server knows, to tell counts from it",
                "noise_multiplier instead of epsilon",
            ),
            "privacy.unit": (privacy is not None and privacy.unit != "patient", "is of patients", 'unit = "patient"'),
            "privacy.steps_per_round": (
                privacy is not None and privacy.steps_per_round != 1,
                "is one sum over patients",
                "steps_per_round = 1",
            ),
            "privacy.patients_per_step": (
                privacy is not None and privacy.patients_per_step < EVERYBODY,
                "is of all patients",
                f"patients_per_step = {EVERYBODY}",
            ),
            "privacy.metrics_every": (
                privacy is not None and privacy.metrics_every > 0,
                "measures no model",
                "no metrics_every",
            ),
        }
        for key, (is_wrong, because, remedy) in wrong.items():
            if is_wrong:
                raise _ContradictionError(
                    key,
                    f'{key} with asks = "fingerprint"',
                    f"A fingerprint {because}.",
                    f"write {remedy}",
                )
        return self

    @property
    def n_outputs(self) -> int:
        """Channels of what a network of labels answers: a logit for each, and the noise of them all where it is learned."""
        return len(self.task.labels) + (self.training.loss == "heteroscedastic")

    @model_validator(mode="after")
    def _private_release(self) -> Self:
        if self.privacy is not None and self.strategy.release == "best":
            raise _ContradictionError(
                "strategy.release",
                'release = "best" with [privacy]',
                "The best model is chosen by exact measurements of patients, which no noise hides.",
                'set release = "last" under [strategy], or "averaged" with average_decay',
            )
        return self

    @model_validator(mode="after")
    def _balance_is_counted(self) -> Self:
        if self.training.balanced is not None and self.privacy is not None:
            raise _ContradictionError(
                "training.balanced",
                "balanced with [privacy]",
                "How common a label is at a site is found by counting its patients, and each of them would show.",
                "remove balanced from [training]; class_weights says public weights",
            )
        if self.training.balanced is not None and self.training.class_weights is not None:
            raise _ContradictionError(
                "training.balanced",
                "balanced with class_weights",
                "Both say how much a label counts.",
                "remove one of them from [training]",
            )
        return self

    @model_validator(mode="after")
    def _strategy_fits(self) -> Self:
        if self.strategy.name == "scaffold" and self.training.optimizer != "sgd":
            raise _ContradictionError(
                "training.optimizer",
                f'optimizer = "{self.training.optimizer}" with name = "scaffold"',
                "A site's control variate is its mean gradient, read off how far its steps went: those of SGD alone tell.",
                'set optimizer = "sgd" under [training]',
            )
        if self.strategy.name == "scaffold" and self.training.momentum:
            raise _ContradictionError(
                "training.momentum",
                f'momentum = {self.training.momentum:g} with name = "scaffold"',
                "A site's control variate is its mean gradient, read off how far its steps went: momentum lengthens them.",
                "remove momentum",
            )
        if self.strategy.name == "fedbn" and self.task.network not in WITH_NORMS:
            raise _ContradictionError(
                "strategy.name",
                f'name = "fedbn" with network = "{self.task.network}"',
                "FedBN keeps normalisation layers at the site, and this network has none.",
                f"choose a network from: {', '.join(sorted(WITH_NORMS))}, or another strategy",
            )
        return self

    @model_validator(mode="after")
    def _predictions_of_outlines(self) -> Self:
        if self.task.kind != "segmentation" and self.adaptation is not None and self.adaptation.reads is not None:
            raise _ContradictionError(
                "adaptation.reads",
                f'reads = "{self.adaptation.reads}" with kind = "{self.task.kind}"',
                "Outlines look alike on all scanners; how many patients have a disease, or what an image shows, need not.",
                "remove reads from [adaptation]: the discriminator reads features then",
            )
        return self

    @model_validator(mode="after")
    def _conditional_of_labels(self) -> Self:
        if self.adaptation is not None and self.adaptation.conditional and self.task.kind in WITH_NUMBERS | OF_KSPACE:
            raise _ContradictionError(
                "adaptation.conditional",
                f'conditional with kind = "{self.task.kind}"',
                "A discriminator for each label needs labels of images or of what they show, and this task has none.",
                "remove conditional from [adaptation]",
            )
        return self

    @model_validator(mode="after")
    def _network_by_image(self) -> Self:
        if self.privacy is not None and self.privacy.unit == "image" and self.task.network in NOT_BY_IMAGE:
            raise _ContradictionError(
                "task.network",
                f'network = "{self.task.network}" with unit = "image" under [privacy]',
                "It adds in place what Opacus must see, and nothing else takes its gradient apart into images.",
                'set unit = "patient" under [privacy], or choose another network',
            )
        return self

    @model_validator(mode="after")
    def _adversary_of_patients(self) -> Self:
        if self.is_adversarial and self.privacy is not None and self.privacy.unit == "image":
            raise _ContradictionError(
                "adaptation.adversarial",
                f'adversarial = {json.dumps(self.adaptation and self.adaptation.adversarial)} with unit = "image" under '
                "[privacy]",
                "What hides scanners is bounded for each patient, and nothing takes it apart into images.",
                'set unit = "patient" under [privacy], or remove adversarial from [adaptation]',
            )
        return self

    @model_validator(mode="after")
    def _moments_have_their_noise(self) -> Self:
        if not self.asks_for_moments or self.adaptation is None:
            return self
        noise = self.adaptation.moments_noise
        if (self.privacy is not None) != (noise is not None):
            raise _ContradictionError(
                "adaptation.moments_noise",
                'adversarial = "moments" with [privacy] and without moments_noise'
                if noise is None
                else f"moments_noise = {noise:g} without [privacy]",
                "Under [privacy] moments leave with noise of their own, for which the run's epsilon pays, and only there.",
                "add moments_noise = 10.0 under [adaptation], or remove adversarial"
                if noise is None
                else "remove moments_noise from [adaptation]",
            )
        if self.rounds < 2:
            raise _ContradictionError(
                "adaptation.adversarial",
                'adversarial = "moments" with rounds = 1',
                "The discriminator is trained after a round and used in the next.",
                "set rounds = 2 or more",
            )
        return self

    @property
    def is_adversarial(self) -> bool:
        """Whether the network learns to hide scanners."""
        return self.adaptation is not None and self.adaptation.adversarial is not None

    @property
    def has_discriminator(self) -> bool:
        """Whether a discriminator of scanners is trained at the sites, and its parameters travel with the network's."""
        return self.adaptation is not None and self.adaptation.adversarial == "scanner"

    @property
    def asks_for_moments(self) -> bool:
        """Whether sites release moments of features, on which the server trains a discriminator of scanners."""
        return self.adaptation is not None and self.adaptation.adversarial == "moments"

    @property
    def takes_unlabelled(self) -> bool:
        """Whether studies without a reference take part in training: they show a discriminator their scanner.

        Not under ``[privacy]``: there the bound on a patient's reversed gradient is the task's gradient of that patient.
        k-space is its own reference.
        """
        return self.is_adversarial and self.privacy is None and self.task.kind not in OF_KSPACE

    @model_validator(mode="after")
    def _axes_agree(self) -> Self:
        n_axes = self.data.dimensions
        for key, value in (("patch", self.data.patch), ("spacing_mm", self.data.spacing_mm)):
            if value is not None and len(value) != n_axes:
                raise _ContradictionError(
                    f"data.{key}",
                    f"{key} = {list(value)} has {len(value)} numbers, dimensions = {n_axes}",
                    "Every axis needs its own number.",
                    f"give {n_axes} numbers, in the order {'(y, x)' if n_axes == 2 else '(z, y, x)'}",
                )
        return self

    @model_validator(mode="after")
    def _patch_fits_network(self) -> Self:
        if self.task.network in NETWORKS_FOR_ANY_SIZE:
            return self
        n_depths, patch = len(self.task.channels), self.data.patch
        factors: tuple[int, ...] = (2 ** (n_depths - 1),) * len(patch)
        if self.task.network == "dynunet":
            factors = divisors(patch, self.data.spacing_mm, n_depths)
        if any(side % factor for side, factor in zip(patch, factors, strict=True)):
            raise _ContradictionError(
                "data.patch",
                f"patch = {list(patch)}, and a network of {n_depths} depths halves it {n_depths - 1} times",
                "A side that cannot be halved that often does not come back at the same size.",
                f"use multiples of {factors[0]}, or fewer numbers in task.channels",
            )
        if patch == factors:
            raise _ContradictionError(
                "data.patch",
                f"patch = {list(patch)} is a single point at the network's depth {n_depths}",
                "Normalising a single point leaves nothing of it.",
                f"use at least {2 * factors[0]} along one axis, or fewer numbers in task.channels",
            )
        return self

    @model_validator(mode="after")
    def _views_are_of_cubes(self) -> Self:
        if self.task.views is not None and (self.data.dimensions == 2 or len(set(self.data.patch)) > 1):
            raise _ContradictionError(
                "task.views",
                f"views with dimensions = {self.data.dimensions} and patch = {list(self.data.patch)}",
                "Planes along all axes go through one network, so they have one size.",
                "set dimensions = 3 under [data], and a patch whose sides are the same",
            )
        return self

    @model_validator(mode="after")
    def _channels_double(self) -> Self:
        first = self.task.channels[0]
        doubled = tuple(first * 2**depth for depth in range(len(self.task.channels)))
        if self.task.network == "segresnet" and self.task.channels != doubled:
            raise _ContradictionError(
                "task.channels",
                f'channels = {list(self.task.channels)} with network = "segresnet"',
                "This network doubles its features from depth to depth.",
                f"set channels = {list(doubled)} under [task]",
            )
        return self

    @model_validator(mode="after")
    def _loss_fits_labels(self) -> Self:
        loss = self.training.loss
        if loss == "binary-dice" and len(self.task.labels) != 2:
            raise _ContradictionError(
                "training.loss",
                f'loss = "binary-dice" with {len(self.task.labels)} labels',
                "It sets one label against the background.",
                'use two labels, or loss = "dice"',
            )
        if loss in {"dice", "binary-dice"} and self.training.class_weights is not None:
            raise _ContradictionError(
                "training.class_weights",
                f'class_weights with loss = "{loss}"',
                "Soft Dice has no such weights, so the key would be ignored.",
                'remove class_weights, or set loss = "dice-ce"',
            )
        return self

    @model_validator(mode="after")
    def _target_fits_kind(self) -> Self:
        of_number = self.task.target in {"count", "proportion"}
        if of_number and self.task.kind not in WITH_NUMBERS and ("task", "target") not in self._unread():
            raise _ContradictionError(
                "task.target",
                f'target = "{self.task.target}" with kind = "{self.task.kind}"',
                "It is a number, and this kind of task learns names.",
                'set kind = "quantification", or target = "ordinal" where names are in order, or remove target',
            )
        if self.task.kind in WITH_NUMBERS and not of_number:
            raise _ContradictionError(
                "task.target",
                f'target = "{self.task.target}" with kind = "{self.task.kind}"'
                if self.task.target
                else f'kind = "{self.task.kind}" without target',
                "It is what is learned, and nobody guesses which number a table holds.",
                'set target = "count", or target = "proportion" for shares from 0 to 1, under [task]',
            )
        return self

    @model_validator(mode="after")
    def _several_labels(self) -> Self:
        if self.task.target != "multi-label" or self.task.kind != "classification":
            return self
        if len(self.task.labels) > MOST_FINDINGS:
            raise _ContradictionError(
                "task.labels",
                f'{len(self.task.labels)} labels with target = "multi-label"',
                f"A study's labels are kept as one number of {MOST_FINDINGS} bits.",
                f"name {MOST_FINDINGS} labels at most",
            )
        for key, is_set in (
            ("training.balanced", bool(self.training.balanced)),
            ("adaptation.conditional", self.adaptation is not None and self.adaptation.conditional),
        ):
            if is_set:
                raise _ContradictionError(
                    key,
                    f'{key.split(".")[1]} with target = "multi-label"',
                    "It is about the one label of a study, and these have several.",
                    f"remove {key.split('.')[1]} from [{key.split('.')[0]}]; class_weights weigh labels",
                )
        return self

    @model_validator(mode="after")
    def _loss_fits_target(self) -> Self:
        known = LOSSES.get(self.task.target if self.task.kind in WITH_NUMBERS and self.task.target else self.task.kind)
        if known is not None and self.training.loss is not None and self.training.loss not in known:
            about = f'target = "{self.task.target}"' if self.task.kind in WITH_NUMBERS else f'kind = "{self.task.kind}"'
            raise _ContradictionError(
                "training.loss",
                f'loss = "{self.training.loss}" with {about}',
                "It measures something else than what is learned.",
                f"choose from: {', '.join(known)}, or leave loss out for the first",
            )
        return self

    @model_validator(mode="after")
    def _labels_are_names(self) -> Self:
        if self.task.kind in OF_KSPACE:
            if self.task.labels:
                raise _ContradictionError(
                    "task.labels",
                    f'labels = {list(self.task.labels)} with kind = "{self.task.kind}"',
                    "Nothing is labelled where a plan begins at k-space, so the key would be ignored.",
                    "remove labels from [task]",
                )
            return self
        is_drawn = self.task.kind in WITH_BACKGROUND
        names = {label.strip().lower() for label in self.task.labels}
        if is_drawn and (
            self.task.labels[:1] != ("background",) or len(set(self.task.labels)) != len(self.task.labels)
        ):
            raise _ContradictionError(
                "task.labels",
                f"labels = {list(self.task.labels)}",
                "Label 0 is everything that nobody drew, and every name stands for one value.",
                'start the list with "background" and name each label once',
            )
        if self.task.kind in WITH_NUMBERS and len(self.task.labels) != 2:
            raise _ContradictionError(
                "task.labels",
                f'labels = {list(self.task.labels)} with kind = "{self.task.kind}"',
                "One number is learned, that of the second label.",
                'name "background" and what is counted',
            )
        if not is_drawn and (len(names) != len(self.task.labels) or not names or "" in names):
            raise _ContradictionError(
                "task.labels",
                f"labels = {list(self.task.labels)}",
                "Every name stands for one value, whatever its case.",
                "name each label once",
            )
        return self

    @model_validator(mode="after")
    def _network_answers_task(self) -> Self:
        if self.task.network not in NETWORKS_FOR[self.task.kind]:
            raise _ContradictionError(
                "task.network",
                f'network = "{self.task.network}" with kind = "{self.task.kind}"',
                "Its output is not what this kind of task asks for.",
                f"choose from: {', '.join(NETWORKS_FOR[self.task.kind])}",
            )
        return self

    @model_validator(mode="after")
    def _keys_are_read(self) -> Self:
        for table, key in self._unread():
            if key in getattr(self, table).model_fields_set:
                raise _ContradictionError(
                    f"{table}.{key}",
                    f'{key} with kind = "{self.task.kind}" and network = "{self.task.network}"',
                    "A key that nothing reads would be ignored in silence.",
                    f"remove {key} from [{table}]",
                )
        return self

    @model_validator(mode="after")
    def _weight_for_each_label(self) -> Self:
        weights = self.training.class_weights
        if weights is not None and len(weights) != len(self.task.labels):
            raise _ContradictionError(
                "training.class_weights",
                f"class_weights = {list(weights)} has {len(weights)} numbers for {len(self.task.labels)} labels",
                "Every label needs its own weight.",
                f"give {len(self.task.labels)} numbers, in the order of task.labels",
            )
        return self

    @model_validator(mode="after")
    def _kspace_is_planar(self) -> Self:
        if self.task.kind not in OF_KSPACE:
            return self
        wrong = {
            "dimensions": (self.data.dimensions != 2, "slices are reconstructed one by one", "dimensions = 2"),
            "spacing_mm": (
                self.data.spacing_mm is not None,
                "k-space has the grid it was measured on",
                "no spacing_mm",
            ),
            "channels": (self.data.channels != ("image",), "coils take the place of sequences", 'channels = ["image"]'),
            "modality": (self.data.modality != "MR", "nothing else has k-space", 'modality = "MR"'),
        }
        for key, (is_wrong, because, remedy) in wrong.items():
            if is_wrong:
                raise _ContradictionError(
                    f"data.{key}",
                    f'{key} = {json.dumps(getattr(self.data, key))} with kind = "{self.task.kind}"',
                    f"Where a plan begins at k-space, {because}.",
                    f"write {remedy} under [data]",
                )
        return self

    @model_validator(mode="after")
    def _centre_is_measured(self) -> Self:
        if self.task.kind not in OF_KSPACE:
            return self
        named = [("acceleration", self.task.acceleration)]
        named += [(f"site_acceleration of {site}", value) for site, value in self.task.site_acceleration or ()]
        for key, acceleration in named:
            if self.task.centre_fraction >= 1 / acceleration:
                raise _ContradictionError(
                    "task.centre_fraction",
                    f"centre_fraction = {self.task.centre_fraction:g} with {key} = {acceleration:g}",
                    "The centre alone would be more than what is measured.",
                    f"set centre_fraction below {1 / acceleration:.3g}, or a lower acceleration",
                )
        sites = [site for site, _ in self.task.site_acceleration or ()]
        if len(set(sites)) != len(sites):
            raise _ContradictionError(
                "task.site_acceleration",
                f"site_acceleration = {json.dumps(self.task.site_acceleration)}",
                "Every site measures one share.",
                "name each site once",
            )
        return self

    @model_validator(mode="after")
    def _coils_fit_network(self) -> Self:
        if self.task.network == "varnet" and self.data.coils == 1:
            raise _ContradictionError(
                "data.coils",
                'coils = 1 with network = "varnet"',
                "It estimates the sensitivities of several coils, and one coil has none.",
                'set network = "cascade" under [task], or the number of coils under [data]',
            )
        return self

    @property
    def image_channels(self) -> int:
        """Channels of a prepared image: one for each name, or two (real, imaginary) for each coil of k-space."""
        return 2 * self.data.coils if self.task.kind in OF_KSPACE else len(self.data.channels)

    @property
    def network_channels(self) -> int:
        """Channels of what a network is given: those of an image, and beside k-space the mask of what was measured."""
        return self.image_channels + (self.task.kind in OF_KSPACE)

    @property
    def sha256(self) -> str:
        """Identity of the plan: SHA-256 of its canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def canonical_json(self) -> str:
        """Every key that has a value, sorted, without spaces: what is hashed, stored and sent.

        An optional table that is left out leaves no trace, so a plan keeps its hash when a later version knows more of
        them. Nor do keys without a meaning: those that :data:`READ_BY` keeps for other tasks and networks, and under
        ``[privacy]`` those that :data:`WITHOUT_PRIVACY_ONLY` names.
        """
        tables = self.model_dump(mode="json", exclude_none=True)
        for table, key in self._unread():
            tables[table].pop(key, None)
        if self.privacy is not None:
            for key in WITHOUT_PRIVACY_ONLY:
                del tables["training"][key]
        if self.adaptation is not None:
            unread = () if self.is_adversarial else ADVERSARIAL_ONLY
            for key in (*unread, *(("conditional",) if self.asks_for_moments else MOMENTS_ONLY)):
                tables["adaptation"].pop(key, None)
        return json.dumps(tables, sort_keys=True, separators=(",", ":"))

    def _unread(self) -> list[tuple[str, str]]:
        """Table and name of each key that means nothing for this task and network."""
        return [key for key, readers in READ_BY.items() if not {self.task.kind, self.task.network} & set(readers)]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan from a TOML file.

        Raises
        ------
        FederadError
            P100 unreadable file, P101 not TOML, P102 a wrong key or value, P103 a contradiction, P104 not implemented yet.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FederadError(
                "P100",
                happened=f"The plan {path} cannot be read ({type(error).__name__}).",
                because="Everything a run does is written there.",
                remedies=(
                    "check the path and that the file is text; a service reads it under its own account",
                    "example plans lie in simulation/plans",
                ),
            ) from None
        return cls.from_toml(text, name=str(path))

    @classmethod
    def from_toml(cls, text: str, *, name: str = "plan") -> Self:
        """Validate the text of a plan; ``name`` stands in messages for where it came from."""
        try:
            tables = tomllib.loads(text)
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number too long to read is a ValueError too
            raise FederadError(
                "P101",
                happened=f"{name} is not valid TOML: {error}.",
                because="A plan that cannot be parsed cannot be agreed on.",
                remedies=("mend the line named above", "example plans lie in simulation/plans"),
            ) from None
        return cls.from_tables(tables, name=name)

    @classmethod
    def from_tables(cls, tables: dict[str, Any], *, name: str = "plan") -> Self:
        """Validate tables as TOML or JSON gives them."""
        for table in NOT_YET:
            if table in tables:
                raise FederadError(
                    "P104",
                    happened=f"{name} has a table [{table}], which this version does not implement.",
                    because="Ignoring it would run the plan without what it promises.",
                    remedies=(f"remove [{table}] to run without it", "or wait for a release whose CHANGELOG names it"),
                )
        try:
            complete = _with_no_labels(_completed(tables, name))
            return cls.model_validate_json(json.dumps(complete, default=_not_json))
        except ValidationError as error:
            raise _as_federad_error(cls, error, name) from None


def _completed(tables: dict[str, Any], name: str) -> dict[str, Any]:
    """The tables without opposites of ``[privacy]``; the last model is released where no other can be and none is named.

    The check is on what was written, since a validated plan holds the default of every key.
    """
    training, strategy = tables.get("training", {}), tables.get("strategy", {})
    if not isinstance(training, dict) or not isinstance(strategy, dict):
        return tables
    if "privacy" not in tables:
        is_of_each = strategy.get("name") in OF_EACH_SITE if isinstance(strategy.get("name"), str) else False
        return {**tables, "strategy": {"release": "last", **strategy}} if is_of_each else tables
    for key, instead in WITHOUT_PRIVACY_ONLY.items():
        if key in training:
            raise FederadError(
                "P103",
                happened=f"{name}: training.{key}: {key} with [privacy].",
                because="Steps and their size come from public numbers then, never from how many patients a site has.",
                remedies=(f"remove {key} from [training]; {instead} under [privacy] says it",),
            )
    return {**tables, "strategy": {"release": "last", **strategy}}


def _with_no_labels(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables, with ``task.labels`` said to be none where nothing is labelled and nobody says it."""
    task = tables.get("task")
    if not isinstance(task, dict) or "labels" in task or str(task.get("kind")) not in OF_KSPACE:
        return tables
    return {**tables, "task": {**task, "labels": []}}


def _not_json(value: object) -> dict[str, str]:
    """A date or time, which no key takes, so that the message shows it as what it is."""
    return {type(value).__name__: str(value)}


def _as_federad_error(model: type[BaseModel], error: ValidationError, name: str) -> FederadError:
    mistakes = error.errors(include_url=False)
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _ContradictionError):
        return FederadError(
            "P103",
            happened=f"{name}: {cause.key}: {cause.happened}.",
            because=cause.because,
            remedies=(cause.remedy,),
        )
    location = [part for part in first["loc"] if isinstance(part, str)]
    if not location:
        return FederadError(
            "P101",
            happened=f"{name} cannot be read: {first['msg']}.",
            because="A plan that cannot be parsed cannot be agreed on.",
            remedies=("look for brackets inside brackets", "example plans lie in simulation/plans"),
        )
    key = ".".join(str(part) for part in first["loc"])
    table, field = _look_up(model, location)
    if first["type"] == "extra_forbidden":
        known = sorted(table.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        return FederadError(
            "P102",
            happened=f"{name}: {key} is not a key of a plan.",
            because="A key that nothing reads would be ignored in silence.",
            remedies=(f"did you mean {close[0]}?",) if close else (f"the keys here are: {', '.join(known)}",),
        )
    if first["type"] == "missing":
        happened, because = f"{name}: {key} is missing.", "It has no default, since no value is right for everyone."
    else:
        happened = f"{name}: {key} = {json.dumps(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}."
        because = "Every site would refuse this plan."
    described = field.description if field is not None and field.description else "see simulation/plans for an example"
    return FederadError("P102", happened=happened, because=because, remedies=(f"{location[-1]}: {described}",))


def table_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a key holds, also where it may be left out; None for a plain value."""
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def _look_up(model: type[BaseModel], location: list[str]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The table that holds the last key of ``location``, and that key's field if it exists."""
    field: FieldInfo | None = None
    for i, part in enumerate(location):
        field = model.model_fields.get(part)
        below = table_of(field) if field is not None else None
        if i < len(location) - 1 and below is not None:
            model = below
    return model, field
