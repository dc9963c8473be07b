"""A plan is read whole or refused with its key, its value and what to do about it."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from shared_models.adaptation import strength_at
from shared_models.errors import FederadError
from shared_models.plan import KEYS_OF_STRATEGY, MOMENTS_ONLY, NOT_YET, Plan, table_of
from shared_models.schedule import moments_rounds

PLANS = Path(__file__).parents[2] / "simulation" / "plans"

Tables = dict[str, Any]
Key = tuple[str, ...]

FULL: Tables = {
    "name": "every-key",
    "rounds": 20,
    "task": {
        "kind": "segmentation",
        "labels": ["background", "lesion"],
        "network": "unet",
        "channels": [8, 16, 32],
        "residual_units": 2,
    },
    "data": {
        "modality": "MR",
        "dimensions": 2,
        "patch": [96, 64],
        "spacing_mm": [1.0, 1.5],
        "channels": ["flair", "t1c"],
        "split": {"train": 0.5, "validation": 0.2, "test": 0.3},
    },
    "training": {
        "epochs": 2,
        "batch_size": 6,
        "samples_per_patient": 3,
        "foreground": 0.25,
        "flips": False,
        "optimizer": "sgd",
        "momentum": 0.9,
        "learning_rate": 0.002,
        "schedule": "cosine",
        "weight_decay": 0.01,
        "precision": "bfloat16",
    },
    "strategy": {
        "name": "fedprox",
        "weighting": "equal",
        "minimum_sites": 3,
        "deadline_s": 600.0,
        "proximal_mu": 0.01,
        "max_update_norm": 500.0,
        "start": "5a" * 32,
        "start_run": "an-earlier-run",
        "release": "averaged",
        "average_decay": 0.9,
    },
    "simulation": {
        "patients": 12,
        "slices": 6,
        "spacing_mm": [5.0, 0.9, 1.1],
        "spacing_spread": 0.1,
        "scanners": ["one", "two"],
        "second_series": "three",
        "prevalence": [0.5, 0.25],
        "label_skew": 0.5,
        "confounding": [0.9, 0.1],
        "size_skew": 2.0,
        "unlabelled": ["two"],
        "unseen": ["three", "four"],
        "unseen_prevalence": [0.3],
        "unseen_confounding": [0.2],
        "drop_out": 0.1,
        "delay_s": 2.0,
        "late_joiners": 1,
        "late_round": 3,
    },
    "adaptation": {
        "appearance": True,
        "adversarial": "scanner",
        "strength": 0.7,
        "conditional": True,
        "gradient_ratio": 0.1,
        "warm_up": 0.3,
        "scanners": ["SIEMENS 3 T", "GE 1.5 T"],
    },
}
"""A plan with every key that exists, none at its default."""

DESIGN_EXAMPLE = """
name = "brain-lesions"
rounds = 20

[task]
kind = "segmentation"            # segmentation | classification | reconstruction
labels = ["background", "lesion"]
network = "unet"

[data]
modality = "MR"
dimensions = 2
spacing_mm = [1.0, 1.0]
patch = [96, 96]

[training]
epochs = 1
batch_size = 8
optimizer = "adam"
learning_rate = 1e-3

[strategy]
name = "fedavg"
minimum_sites = 3
deadline_s = 3600
"""

DESIGN_PRIVACY = {
    "unit": "patient",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip": 1.0,
    "patients_per_step": 16,
    "steps_per_round": 10,
}
"""The table of the design's example."""

DESIGN_ADAPTATION = {"appearance": True, "adversarial": "scanner", "strength": 0.3}

MOMENTS = {"adversarial": "moments"}
"""The table of the design's example."""

RESERVED = {
    "secure_sum": {"threshold": 0.67},
}
"""The tables of the design's example that this version does not implement."""


def keys_of(model: type[BaseModel], above: Key = ()) -> list[Key]:
    """Every key of a table and of the tables in it."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append((*above, name))
        if (table := table_of(field)) is not None:
            keys += keys_of(table, (*above, name))
    return keys


def value_at(tables: Tables, key: Key) -> Any:
    for part in key:
        tables = tables[part]
    return tables


def with_value(key: Key, value: Any, tables: Tables = FULL) -> Tables:
    changed = deepcopy(tables)
    value_at(changed, key[:-1])[key[-1]] = value
    return changed


def without(key: Key, tables: Tables = FULL) -> Tables:
    changed = deepcopy(tables)
    del value_at(changed, key[:-1])[key[-1]]
    return changed


def as_toml(tables: Tables, *, backwards: bool = False, prefix: str = "") -> str:
    """TOML text of ``tables``, with keys and tables in the given or in the opposite order."""
    items = sorted(tables.items(), reverse=True) if backwards else list(tables.items())
    text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in items if not isinstance(v, dict))
    for name, table in items:
        if isinstance(table, dict):
            text += f"[{prefix}{name}]\n{as_toml(table, backwards=backwards, prefix=f'{prefix}{name}.')}"
    return text


def wrong_types(value: Any) -> list[Any]:
    """Values that are not of the type of ``value``, near and far."""
    match value:
        case bool():
            return [1, "true", [True], {"surprise": 1}]
        case int():
            return [str(value), True, value + 0.5, [value], {"surprise": 1}]
        case float():
            return [str(value), True, [value], {"surprise": 1}, math.nan, math.inf]
        case str():
            return [7, True, [value], {"surprise": 1}, "x" * 1000]
        case list():
            return [value[0], 7, [[]], [{"surprise": 1}], [*value[1:], None], {"surprise": 1}]
        case _:
            return [7, "text", [], [value]]


def refused(tables: Tables) -> FederadError:
    with pytest.raises(FederadError) as error:
        Plan.from_tables(tables, name="the plan")
    return error.value


def keys_in(tables: Tables, above: Key = ()) -> list[Key]:
    """Every key of tables, and of the tables in them."""
    keys: list[Key] = []
    for name, value in tables.items():
        keys += [(*above, name), *(keys_in(value, (*above, name)) if isinstance(value, dict) else [])]
    return keys


CLASSIFYING_KEYS = [
    ("task", "label_attribute"),
    ("task", "sharpness"),
    ("training", "class_weights"),
    ("training", "balanced"),
]
LOSS_KEYS = [("asks",), ("training", "loss"), ("task", "target"), ("task", "views"), ("task", "dropout")]
"""Keys that mean nothing in this plan, which trains, and segments."""

RECONSTRUCTING_KEYS = [
    *(("task", key) for key in ("reference", "mask", "acceleration", "site_acceleration", "centre_fraction")),
    *(("task", key) for key in ("cascades", "consistency")),
    *(("data", key) for key in ("coils", "simulated")),
]
"""Likewise."""

KEYS = keys_in(FULL)
LEAVES = [key for key in KEYS if not isinstance(value_at(FULL, key), dict)]

PRIVACY: Tables = {
    "unit": "image",
    "noise_multiplier": 1.5,
    "delta": 1e-6,
    "clip": 0.5,
    "clipping": "automatic",
    "clip_gamma": 0.1,
    "patients_per_step": 16,
    "steps_per_round": 10,
    "images_per_patient": 12,
    "views": 2,
    "metrics_every": 5,
    "metrics_noise": 10.0,
}
"""Every key of ``[privacy]`` but epsilon, none at its default."""

PRIVATE: Tables = {
    **{table: keys for table, keys in FULL.items() if table != "adaptation"},
    "training": {k: v for k, v in FULL["training"].items() if k not in ("epochs", "batch_size")},
    "privacy": PRIVACY,
}
"""The full plan with privacy in place of epochs and batches."""

STRATEGY_KEYS = [("strategy", key) for key in KEYS_OF_STRATEGY]
PRIVATE_LEAVES = [("privacy", key) for key in PRIVACY]
PRIVATE_KEYS = [("privacy",), ("privacy", "epsilon"), *PRIVATE_LEAVES]


MOMENTS_KEYS = [("adaptation", key) for key in (*MOMENTS_ONLY, "reads")]
"""Keys that conditional keeps out: where sites release moments, and where predictions are read."""

LEAST_KEYS = (
    ("name",), ("rounds",), ("task", "kind"), ("task", "labels"), ("task", "network"),
    ("data", "modality"), ("data", "dimensions"), ("data", "patch"),
)  # fmt: skip
LEAST: Tables = {
    **{key[0]: FULL[key[0]] for key in LEAST_KEYS if len(key) == 1},
    **{table: {key[1]: FULL[table][key[1]] for key in LEAST_KEYS if key[0] == table} for table in ("task", "data")},
}
"""The same plan with nothing but the keys that have no default."""


def key_id(key: Key) -> str:
    return ".".join(key)


class TestEveryKey:
    def test_full_plan_holds_every_key_and_no_default(self):
        """
        The plan that these tests walk through has every key there is, each with a value of its own.
        """
        keys = {
            *KEYS,
            *PRIVATE_KEYS,
            *CLASSIFYING_KEYS,
            *STRATEGY_KEYS,
            *LOSS_KEYS,
            *RECONSTRUCTING_KEYS,
            *MOMENTS_KEYS,
        }
        assert keys == set(keys_of(Plan))
        full, least = Plan.from_tables(FULL).model_dump(mode="json"), Plan.from_tables(LEAST).model_dump(mode="json")

        for key in LEAVES:
            given = key[:1] in LEAST_KEYS or key[:2] in LEAST_KEYS
            is_left_out = least[key[0]] is None
            assert given or is_left_out or value_at(full, key) != value_at(least, key), key

    @pytest.mark.parametrize("key", KEYS, ids=key_id)
    def test_value_of_another_type_is_refused_with_key_value_and_remedy(self, key):
        """
        A value of the wrong type is named together with its key, and the remedy says what belongs there.
        """
        for wrong in wrong_types(value_at(FULL, key)):
            error = refused(with_value(key, wrong))

            assert error.code == "P102", wrong
            assert f"the plan: {key_id(key)}" in error.happened
            if not isinstance(wrong, dict | list) or not wrong:
                assert json.dumps(wrong) in error.happened
            assert key[-1] in " ".join(error.remedies) or "keys here are" in error.remedies[0]

    @pytest.mark.parametrize("key", KEYS, ids=key_id)
    def test_neighbour_that_nobody_knows_is_refused_with_the_likely_key(self, key):
        """
        A misspelt key is named with its table, and the remedy has the key that was meant.
        """
        misspelt = (*key[:-1], f"{key[-1]}x")
        error = refused(with_value(misspelt, 1))

        assert error.code == "P102"
        assert f"the plan: {key_id(misspelt)} is not a key" in error.happened
        assert error.remedies == (f"did you mean {key[-1]}?",)

    @pytest.mark.parametrize("table", [(), *(k for k in KEYS if k not in LEAVES)], ids=key_id)
    def test_foreign_key_is_refused_with_the_keys_there_are(self, table):
        """
        A key that resembles none is answered with the list of the table's keys.
        """
        error = refused(with_value((*table, "zzz"), 1))

        assert error.code == "P102"
        for key in KEYS:
            if key[:-1] == table:
                assert key[-1] in error.remedies[0]

    @pytest.mark.parametrize("key", [*LEAST_KEYS, ("task",), ("data",)], ids=key_id)
    def test_key_without_a_default_is_missed_by_name(self, key):
        """
        What no default can decide for everyone is asked for.
        """
        error = refused(without(key))

        assert error.code == "P102"
        assert error.happened == f"the plan: {key_id(key)} is missing."
        assert key[-1] in error.remedies[0]

    def test_everything_else_may_be_left_out(self):
        """
        The keys missed above are all that a plan must have.
        """
        assert Plan.from_tables(LEAST).name == FULL["name"]

    @pytest.mark.parametrize("key", LEAVES, ids=key_id)
    def test_every_key_is_explained(self, key):
        """
        The remedy of a wrong value tells what the key is for, in words and not only by its name.
        """
        error = refused(with_value(key, {"surprise": 1}))

        assert len(error.remedies[0]) > len(f"{key[-1]}: ") + 10

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            (("name",), "Capital"),
            (("name",), "two words"),
            (("name",), "../up"),
            (("rounds",), 0),
            (("rounds",), 10**50),
            (("task", "kind"), "registration"),
            (("task", "network"), "transformer"),
            (("task", "labels"), ["background"]),
            (("task", "channels"), [16]),
            (("data", "dimensions"), 4),
            (("data", "modality"), "US"),
            (("data", "spacing_mm"), [0.0, 1.0]),
            (("data", "split", "train"), 0.0),
            (("training", "learning_rate"), 0.0),
            (("training", "foreground"), 1.5),
            (("strategy", "minimum_sites"), 0),
            (("strategy", "deadline_s"), 0),
            (("strategy", "max_update_norm"), 1e6),
            (("simulation", "drop_out"), 1.0),
        ],
    )
    def test_impossible_value_is_refused(self, key, value):
        """
        A value of the right type that no run could use is refused with the key and the value.
        """
        error = refused(with_value(key, value))

        assert error.code == "P102"
        assert key_id(key) in error.happened
        assert json.dumps(value[0] if key[-1] == "spacing_mm" else value) in error.happened

    def test_more_labels_than_a_voxel_can_hold_are_refused(self):
        """
        A voxel's label is one byte: with 257 labels the last would be read as background.
        """
        labels = ["background", *(f"part-{i}" for i in range(256))]

        assert refused(with_value(("task", "labels"), labels)).code == "P102"

    def test_date_is_not_a_name(self):
        """
        TOML's dates are a type of their own; a key that wants text refuses one.
        """
        with pytest.raises(FederadError, match="P102"):
            Plan.from_toml(as_toml(FULL).replace('"every-key"', "2024-01-01"))


class TestFile:
    def test_missing_file_is_p100(self, tmp_path):
        """
        A path that leads nowhere is named.
        """
        with pytest.raises(FederadError, match=r"P100.*nowhere\.toml"):
            Plan.load(tmp_path / "nowhere.toml")

    def test_folder_and_bytes_that_are_no_text_are_p100(self, tmp_path):
        """
        A folder or a binary file is not a plan.
        """
        (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")

        for path in (tmp_path, tmp_path / "binary.toml"):
            with pytest.raises(FederadError, match="P100"):
                Plan.load(path)

    def test_text_that_is_not_toml_is_p101_with_its_line(self, tmp_path):
        """
        A file that cannot be parsed is refused with the line where reading stopped.
        """
        (tmp_path / "plan.toml").write_text('name = "x"\nrounds = = 2\n')

        with pytest.raises(FederadError, match=r"P101.*plan\.toml.*line 2"):
            Plan.load(tmp_path / "plan.toml")

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("rounds = " + "9" * 5000, id="a number of 5000 digits"),
            pytest.param("rounds = " + "[" * 20000, id="20000 brackets"),
            pytest.param("rounds = " + "[" * 300 + "]" * 300, id="lists in lists, 300 deep"),
            pytest.param("", id="nothing"),
            pytest.param("\ufeffname = 'x'", id="a byte order mark"),
            pytest.param("name = 'x'\nname = 'y'", id="a key twice"),
        ],
    )
    def test_odd_text_is_refused_with_a_number_too(self, text):
        """
        Whatever the file holds, its reader gets a numbered error and no traceback.
        """
        with pytest.raises(FederadError, match=r"P10[12]"):
            Plan.from_toml(text)

    @pytest.mark.parametrize("file", sorted(PLANS.glob("*.toml")), ids=lambda file: file.stem)
    def test_plans_that_come_with_the_house_load(self, file):
        """
        Every example plan is valid, and is named like its file.
        """
        assert Plan.load(file).name == file.stem

    def test_example_of_the_design_loads(self):
        """
        The design's example, without the tables that wait for their release, is a plan.
        """
        plan = Plan.from_toml(DESIGN_EXAMPLE)

        assert (plan.strategy.deadline_s, plan.training.learning_rate, plan.data.patch) == (3600.0, 1e-3, (96, 96))


class TestContradictions:
    CASES = (
        ("_sum_to_one", ("data", "split", "train"), 0.6, "data.split"),
        ("_keys_of_name", ("strategy", "name"), "fedavg", "strategy.proximal_mu"),
        ("_keys_of_name", ("strategy",), {"name": "fedprox"}, "strategy.proximal_mu"),
        ("_keys_of_name", ("strategy",), {"name": "fedadam"}, "strategy.server_learning_rate"),
        ("_keys_of_name", ("strategy",), {"name": "ditto"}, "strategy.personal_pull"),
        ("_keys_of_name", ("strategy",), {"tau": 0.1}, "strategy.tau"),
        (
            "_keys_of_name",
            ("strategy",),
            {"name": "fedyogi", "server_learning_rate": 0.1, "personal_pull": 1.0},
            "strategy.personal_pull",
        ),
        ("_last_of_each_site", ("strategy",), {"name": "fedbn", "release": "best"}, "strategy.release"),
        ("_strategy_fits", ("strategy",), {"name": "scaffold"}, "training.momentum"),
        ("_momentum", ("training", "optimizer"), "adam", "training.momentum"),
        ("_run_of_start", ("strategy", "start"), None, "strategy.start_run"),
        ("_average", ("strategy", "release"), "last", "strategy.average_decay"),
        ("_average", ("strategy", "average_decay"), None, "strategy.average_decay"),
        ("_spread_around_something", ("simulation", "spacing_mm"), None, "simulation.spacing_spread"),
        ("_asks_once", ("asks",), "fingerprint", "rounds"),
        ("_axes_agree", ("data", "patch"), [32, 32, 32], "data.patch"),
        ("_axes_agree", ("data", "spacing_mm"), [1.0, 1.0, 1.0], "data.spacing_mm"),
        ("_axes_agree", ("data", "dimensions"), 3, "data.patch"),
        ("_patch_fits_network", ("data", "patch"), [96, 62], "data.patch"),
        ("_patch_fits_network", ("task", "channels"), [8, 16, 32, 64, 64, 64, 64], "data.patch"),
        ("_labels_are_names", ("task", "labels"), ["lesion", "background"], "task.labels"),
        ("_labels_are_names", ("task", "labels"), ["background", "lesion", "lesion"], "task.labels"),
        ("_network_answers_task", ("task", "network"), "scan-plane", "task.network"),
        ("_keys_are_read", ("task", "label_attribute"), "BodyPartExamined", "task.label_attribute"),
        ("_loss_fits_labels", ("training",), {"loss": "dice", "class_weights": [1.0, 2.0]}, "training.class_weights"),
        (
            "_channels_double",
            ("task",),
            {**FULL["task"], "network": "segresnet", "channels": [8, 16, 24]},
            "task.channels",
        ),
        ("_keys_are_read", ("task", "sharpness"), 5.0, "task.sharpness"),
    )

    @pytest.mark.parametrize(("check", "key", "value", "named"), CASES)
    def test_contradiction_is_refused_with_a_way_out(self, check, key, value, named):
        """
        Two keys that exclude each other are named together with what to change.
        """
        error = refused(with_value(key, value))

        assert error.code == "P103"
        assert error.happened.startswith(f"the plan: {named}: ")
        assert error.remedies[0]

    def test_scaffold_wants_steps_that_tell_the_gradient(self):
        """
        With an optimiser that scales each step, a site's control variate could not be read off its weights.
        """
        tables = with_value(("strategy",), {"name": "scaffold"})
        tables["training"] = {"optimizer": "adam"}

        assert refused(tables).happened.startswith("the plan: training.optimizer: ")

    def test_every_check_of_the_plan_is_tried(self):
        """
        No check between keys exists that the cases above leave out.
        """
        tables = [Plan, *(table_of(f) for f in Plan.model_fields.values())]
        tables += [f.annotation for t in tables[1:] if hasattr(t, "model_fields") for f in t.model_fields.values()]
        checks = {
            name
            for table in tables
            if isinstance(table, type) and issubclass(table, BaseModel)
            for name in table.__pydantic_decorators__.model_validators
        }

        others = (*TestPrivacy.CASES, *TestClassification.CASES, *TestAdaptation.CASES, *TestReconstruction.CASES)
        others += TestQuantification.CASES
        assert checks == {check for check, *_ in (*self.CASES, *others) if check}

    def test_patch_that_shrinks_to_one_voxel_is_refused(self):
        """
        A patch halved down to a single voxel cannot be normalised there: such a plan stops before any site trains.
        """
        tables = with_value(("task", "channels"), [8, 16, 32, 64], with_value(("data", "patch"), [8, 8]))

        assert refused(tables).code == "P103"


class TestPrivacy:
    CASES = (
        ("_one_of_epsilon_and_noise", ("privacy", "epsilon"), 8.0, "privacy.epsilon"),
        ("_gamma_of_automatic_clipping", ("privacy", "clipping"), "flat", "privacy.clip_gamma"),
        ("_bound_of_images", ("privacy", "unit"), "patient", "privacy.images_per_patient"),
        ("_noise_of_metrics", ("privacy", "metrics_every"), 0, "privacy.metrics_noise"),
        ("_private_release", ("strategy",), {"release": "best"}, "strategy.release"),
        ("_network_by_image", ("task", "network"), "dynunet", "task.network"),
        ("", ("training", "epochs"), 1, "training.epochs"),
        ("", ("training", "batch_size"), 8, "training.batch_size"),
    )

    def test_full_table_holds_no_default(self):
        """
        The table that these tests walk through has a value of its own for every key.
        """
        least = {"epsilon": 8.0, "patients_per_step": 1, "steps_per_round": 1}
        plan = Plan.from_tables({**LEAST, "privacy": least})

        for key in PRIVATE_LEAVES:
            assert value_at(Plan.from_tables(PRIVATE).model_dump(mode="json"), key) != getattr(plan.privacy, key[1])

    def test_table_of_the_design_loads_and_releases_the_last_model(self):
        """
        The design's example says nothing of the release: with privacy it is the last model, without the best.
        """
        lines = [line for line in DESIGN_EXAMPLE.splitlines() if not line.startswith(("epochs", "batch_size"))]
        text = "\n".join(lines)
        plan = Plan.from_toml(f"{text}\n{as_toml({'privacy': DESIGN_PRIVACY})}")

        assert plan.privacy is not None
        assert (plan.privacy.epsilon, plan.privacy.clipping, plan.privacy.views) == (8.0, "flat", 1)
        assert (plan.strategy.release, Plan.from_toml(text).strategy.release) == ("last", "best")

    @pytest.mark.parametrize("key", [("privacy",), *PRIVATE_LEAVES], ids=key_id)
    def test_value_of_another_type_is_refused_with_key_and_remedy(self, key):
        """
        A value of the wrong type is named together with its key, and the remedy says what belongs there.
        """
        for wrong in wrong_types(value_at(PRIVATE, key)):
            error = refused(with_value(key, wrong, PRIVATE))

            assert error.code == "P102", wrong
            assert f"the plan: {key_id(key)}" in error.happened
            assert key[-1] in " ".join(error.remedies) or "keys here are" in error.remedies[0]

    @pytest.mark.parametrize("key", PRIVATE_LEAVES, ids=key_id)
    def test_misspelt_key_is_refused_with_the_likely_one(self, key):
        """
        A misspelt key is never ignored: it could be the one that protects.
        """
        error = refused(with_value((*key[:-1], f"{key[-1]}x"), 1, PRIVATE))

        assert error.remedies == (f"did you mean {key[-1]}?",)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("unit", "study"),
            ("delta", 1.1e-5),
            ("delta", 0.0),
            ("noise_multiplier", 0.0),
            ("clip", 0.0),
            ("clipping", "per-layer"),
            ("patients_per_step", 0),
            ("steps_per_round", 0),
            ("views", 0),
            ("metrics_every", -1),
            ("metrics_noise", 0.0),
        ],
    )
    def test_impossible_value_is_refused(self, key, value):
        """
        A value under which the promise would be empty is refused with the key and the value.
        """
        error = refused(with_value(("privacy", key), value, PRIVATE))

        assert error.code == "P102"
        assert f"privacy.{key} = {json.dumps(value)}" in error.happened

    @pytest.mark.parametrize(("key", "value", "named"), [case[1:] for case in CASES], ids=[key_id(c[1]) for c in CASES])
    def test_contradiction_is_refused_with_a_way_out(self, key, value, named):
        """
        What privacy excludes is named together with what to write instead.
        """
        error = refused(with_value(key, value, PRIVATE))

        assert error.code == "P103"
        assert error.happened.startswith(f"the plan: {named}: ")
        assert error.remedies[0]

    @pytest.mark.parametrize("key", ["noise_multiplier", "clip_gamma", "metrics_noise"])
    def test_half_of_a_pair_is_refused(self, key):
        """
        Two keys that need each other are asked for together.
        """
        assert refused(without(("privacy", key), PRIVATE)).code == "P103"

    @pytest.mark.parametrize("key", ["patients_per_step", "steps_per_round"])
    def test_steps_and_their_size_have_no_default(self, key):
        """
        What the noise is divided by and how often it is drawn is said in the plan.
        """
        error = refused(without(("privacy", key), PRIVATE))

        assert error.happened == f"the plan: privacy.{key} is missing."

    def test_refusal_of_epochs_names_the_key_that_takes_its_place(self):
        """
        Who writes epochs or batch_size learns the key to write instead.
        """
        for key, instead in (("epochs", "steps_per_round"), ("batch_size", "patients_per_step")):
            assert instead in refused(with_value(("training", key), 1, PRIVATE)).remedies[0]

    def test_stored_form_is_read_as_the_same_plan_on_every_way(self):
        """
        The canonical text has no key that privacy excludes, so it is read again from JSON and from tables alike.
        """
        plan = Plan.from_tables(PRIVATE)
        text = plan.canonical_json()

        assert "epochs" not in text
        assert Plan.model_validate_json(text) == Plan.from_tables(json.loads(text)) == plan
        assert text == json.dumps(PRIVATE, sort_keys=True, separators=(",", ":"))

    @pytest.mark.parametrize("key", PRIVATE_LEAVES, ids=key_id)
    def test_any_single_value_changes_the_identity(self, key):
        """
        Nothing that bears on privacy can change without making another plan.
        """
        plan = Plan.from_tables(PRIVATE)
        changed = plan.privacy.model_copy(update={key[1]: another(getattr(plan.privacy, key[1]))})

        assert plan.model_copy(update={"privacy": changed}).sha256 != plan.sha256


class TestAdaptation:
    def test_design_example_tells_scanners_apart(self):
        """
        The table of the design is read, with the defaults of what it leaves out.
        """
        plan = Plan.from_toml(DESIGN_EXAMPLE + as_toml({"adaptation": DESIGN_ADAPTATION}))

        assert plan.is_adversarial
        assert plan.adaptation is not None
        assert (plan.adaptation.strength, plan.adaptation.scanners) == (0.3, None)

    CASES = (
        ("_asks_for_something", {"adaptation": {}}, "adapts nothing"),
        ("_asks_for_something", {"adaptation": {"appearance": False}}, "adapts nothing"),
        ("_adversary", {"adaptation": {"appearance": True, "strength": 0.3}}, "strength without adversarial"),
        ("_adversary", {"adaptation": {"appearance": True, "conditional": False}}, "conditional without adversarial"),
        (
            "_table_of_scanners",
            {"adaptation": {"adversarial": "scanner", "scanners": ["Siemens", "Acme 3 T"]}},
            "Acme 3 T",
        ),
        ("_adversary_of_patients", {"adaptation": DESIGN_ADAPTATION, "privacy": PRIVACY}, "unit"),
        ("_moments", {"adaptation": {**DESIGN_ADAPTATION, "moments_every": 2}}, 'adversarial = "scanner"'),
        ("_moments", {"adaptation": {"appearance": True, "moments_clip": 2.0}}, "moments_clip alone"),
        ("_moments", {"adaptation": {**MOMENTS, "conditional": True}}, "conditional"),
        ("_reads", {"adaptation": {**MOMENTS, "reads": "predictions"}}, 'adversarial = "moments"'),
        ("_reads", {"adaptation": {**DESIGN_ADAPTATION, "reads": "predictions", "conditional": True}}, "conditional"),
        ("_adversary", {"adaptation": {"appearance": True, "reads": "predictions"}}, "reads without adversarial"),
        ("_moments_have_their_noise", {"adaptation": MOMENTS, "privacy": DESIGN_PRIVACY}, "without moments_noise"),
        ("_moments_have_their_noise", {"adaptation": {**MOMENTS, "moments_noise": 5.0}}, "without [privacy]"),
        ("_moments_have_their_noise", {"adaptation": MOMENTS, "rounds": 1}, "rounds = 1"),
    )

    @pytest.mark.parametrize(("check", "tables", "word"), CASES)
    def test_table_that_says_nothing_or_too_much_is_refused(self, check, tables, word):
        """
        A table without effect, a key that nothing would read, a maker that nobody knows, a bound for images.
        """
        error = refused({**LEAST, **tables})

        assert error.code == "P103"
        assert word in error.happened

    def test_appearance_alone_is_one_plan_however_it_is_written(self):
        """
        Keys that only an adversary reads leave no trace in a plan without one.
        """
        plan = Plan.from_tables({**LEAST, "adaptation": {"appearance": True}})

        assert "strength" not in plan.canonical_json()
        assert Plan.from_tables(json.loads(plan.canonical_json())).sha256 == plan.sha256

    def test_plan_that_asks_for_moments_is_the_same_after_a_journey(self):
        """
        With and without privacy; and what it asks for leaves no trace in a plan whose sites train the discriminator.
        """
        open_ = Plan.from_tables({**LEAST, "adaptation": {**MOMENTS, "moments_every": 3}})
        noised = {**MOMENTS, "moments_noise": 4.0}
        private = Plan.from_tables({**LEAST, "adaptation": noised, "privacy": DESIGN_PRIVACY})

        for plan in (open_, private):
            assert Plan.from_tables(json.loads(plan.canonical_json())).sha256 == plan.sha256
            assert (plan.is_adversarial, plan.asks_for_moments, plan.has_discriminator) == (True, True, False)
        assert "moments" not in Plan.from_tables({**LEAST, "adaptation": DESIGN_ADAPTATION}).canonical_json()

    @pytest.mark.parametrize("rounds", [2, 3, 10, 100])
    @pytest.mark.parametrize("warm_up", [0.0, 0.3, 0.99])
    def test_rounds_of_moments_follow_from_the_plan(self, rounds, warm_up):
        """
        From the round before features are first moved, every so many rounds, and never in the last one.
        """
        table = {**MOMENTS, "moments_every": 2, "warm_up": warm_up}
        plan = Plan.from_tables({**LEAST, "rounds": rounds, "adaptation": table})
        opposed = [r for r in range(1, rounds + 1) if strength_at(plan.adaptation, r, rounds) > 0]

        assert list(moments_rounds(plan)) == list(range(opposed[0] - 1, rounds, 2))
        assert not moments_rounds(Plan.from_tables({**LEAST, "adaptation": DESIGN_ADAPTATION}))

    def test_unlabelled_studies_take_part_without_privacy_alone(self):
        """
        Under privacy nothing is trained on a study without a reference.
        """
        open_ = Plan.from_tables({**LEAST, "adaptation": DESIGN_ADAPTATION})
        private = Plan.from_tables({**LEAST, "adaptation": DESIGN_ADAPTATION, "privacy": DESIGN_PRIVACY})

        assert open_.takes_unlabelled
        assert not private.takes_unlabelled


class TestNotYet:
    @pytest.mark.parametrize(
        ("table", "key"), [(t, k) for t, keys in RESERVED.items() for k in keys], ids=lambda part: part
    )
    def test_reserved_key_is_refused_and_never_ignored(self, table, key):
        """
        A promise that this version cannot keep is refused with the table's name, alone or with its neighbours.
        """
        for values in ({key: RESERVED[table][key]}, RESERVED[table], {}):
            with pytest.raises(FederadError) as error:
                Plan.from_toml(DESIGN_EXAMPLE + as_toml({table: values}))
            assert error.value.code == "P104"
            assert f"[{table}]" in error.value.happened
            assert any(f"[{table}]" in remedy for remedy in error.value.remedies)

    def test_all_reserved_tables_are_tried(self):
        """
        The tables above are all that are reserved.
        """
        assert set(NOT_YET) == set(RESERVED)


class TestFrozen:
    @pytest.mark.parametrize("key", KEYS, ids=key_id)
    def test_no_key_can_be_changed_afterwards(self, key):
        """
        A plan that was agreed on stays as it is.
        """
        table: Any = Plan.from_tables(FULL)
        for part in key[:-1]:
            table = getattr(table, part)

        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key[-1], getattr(table, key[-1]))

    def test_equal_plans_are_the_same_key(self):
        """
        A plan can be looked up: equal ones are equal keys.
        """
        assert {Plan.from_tables(FULL): "found"}[Plan.from_tables(deepcopy(FULL))] == "found"


class TestIdentity:
    def test_comments_and_order_do_not_change_it(self):
        """
        The same content in another order, with comments and other spellings of numbers, is the same plan.
        """
        plan = Plan.from_toml(as_toml(FULL))
        turned = as_toml(FULL, backwards=True).replace("\n", " # a remark\n")
        respelt = turned.replace("0.002", "2e-3").replace("600.0", "600").replace("= 20 ", "= 0x14 ")

        assert turned != respelt
        assert Plan.from_toml(turned).sha256 == plan.sha256
        assert Plan.from_toml(respelt).sha256 == plan.sha256

    def test_spelling_out_defaults_does_not_change_it(self):
        """
        A default that is written down is still the default.
        """
        plan = Plan.from_toml(DESIGN_EXAMPLE)
        spelt_out = plan.model_dump(mode="json", exclude_none=True)
        for table, key in RECONSTRUCTING_KEYS:
            spelt_out[table].pop(key, None)

        assert Plan.from_toml(as_toml(spelt_out)).sha256 == plan.sha256

    @pytest.mark.parametrize("key", LEAVES, ids=key_id)
    def test_any_single_value_changes_it(self, key):
        """
        The smallest change of any one value makes another plan.
        """
        plan = Plan.from_tables(FULL)
        tables: list[Any] = [plan]
        for part in key[:-1]:
            tables.append(getattr(tables[-1], part))
        changed: Any = another(getattr(tables[-1], key[-1]))
        for table, part in zip(reversed(tables), reversed(key), strict=True):
            changed = table.model_copy(update={part: changed})

        assert changed.sha256 != plan.sha256

    def test_stored_form_is_read_as_the_same_plan(self):
        """
        The canonical text that a station stores gives the plan again.
        """
        plan = Plan.from_tables(FULL)

        assert Plan.model_validate_json(plan.canonical_json()) == plan

    def test_is_64_hex_digits_of_a_known_text(self):
        """
        The identity is SHA-256 of sorted JSON without spaces, which a second program can compute.
        """
        plan = Plan.from_tables(FULL)
        text = json.dumps(FULL, sort_keys=True, separators=(",", ":"))

        assert plan.sha256 == sha256(text.encode()).hexdigest()


def another(value: Any) -> Any:
    """The nearest other value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return math.nextafter(value, math.inf)
        case str():
            return value + "x"
        case tuple():
            return (*value[:-1], another(value[-1]))
        case _:
            raise TypeError(f"{value!r} has no other value")


CLASSIFYING: Tables = {
    "name": "classifying",
    "rounds": 1,
    "task": {"kind": "classification", "labels": ["normal", "pneumonia"], "network": "scan-plane"},
    "data": {"modality": "DX", "dimensions": 2, "patch": [32, 32]},
}


class TestClassification:
    CASES = (
        ("_network_answers_task", ("task", "network"), "unet", "resnet, scan-plane"),
        ("_labels_are_names", ("task", "labels"), ["normal", "Normal"], "once"),
        ("_labels_are_names", ("task", "labels"), ["normal", " "], "once"),
        ("_keys_are_read", ("task", "residual_units"), 2, "remove residual_units"),
        ("_keys_are_read", ("training",), {"foreground": 0.5}, "remove foreground"),
        ("_weight_for_each_label", ("training",), {"class_weights": [1.0]}, "give 2 numbers"),
        ("_balance_is_counted", ("training",), {"class_weights": [1.0, 2.0], "balanced": True}, "remove one"),
        ("_views_are_of_cubes", ("task", "views"), "orthogonal", "set dimensions = 3"),
        (
            "_several_labels",
            ("task",),
            {**CLASSIFYING["task"], "target": "multi-label", "labels": [f"finding {n}" for n in range(31)]},
            "name 30 labels",
        ),
    )

    @pytest.mark.parametrize(("check", "key", "value", "named"), CASES)
    def test_what_has_no_meaning_is_refused_with_the_remedy(self, check, key, value, named):
        """
        A network for another task, a label named twice, a key that this network or task does not read.
        """
        error = refused(with_value(key, value, CLASSIFYING))

        assert error.code == "P103"
        assert named in error.remedies[0]

    def test_balance_that_is_counted_is_refused_under_privacy(self):
        """
        How common a label is at a site is private; public weights are the way out.
        """
        tables = {**CLASSIFYING, "training": {"balanced": True}, "privacy": DESIGN_PRIVACY}

        assert "class_weights" in refused(tables).remedies[0]

    @pytest.mark.parametrize("wrong", [["a"], [0.0, 1.0], ["1", "2"], 1.0])
    def test_weights_are_numbers_above_zero(self, wrong):
        """
        A weight of another type, or none at all, is no weight.
        """
        assert refused(with_value(("training",), {"class_weights": wrong}, CLASSIFYING)).code == "P102"

    @pytest.mark.parametrize("wrong", ["not a keyword", "0008,103E", ""])
    def test_attribute_is_named_by_its_keyword(self, wrong):
        """
        Tags and free text are not taken for a keyword.
        """
        assert refused(with_value(("task", "label_attribute"), wrong, CLASSIFYING)).code == "P102"

    def test_plan_is_the_same_after_a_journey(self):
        """
        The canonical text of a plan gives the plan again, without keys that mean nothing in it.
        """
        plan = Plan.from_tables(CLASSIFYING)
        text = plan.canonical_json()

        assert Plan.from_tables(json.loads(text)) == plan
        assert "foreground" not in text
        assert "residual_units" not in text


QUANTIFYING: Tables = {
    "name": "quantifying",
    "rounds": 1,
    "task": {
        "kind": "quantification",
        "target": "proportion",
        "labels": ["background", "emphysema"],
        "network": "resnet",
    },
    "data": {"modality": "CT", "dimensions": 3, "patch": [32, 32, 32]},
}


class TestQuantification:
    ADVERSARY: ClassVar = {"adversarial": "scanner", "scanners": ["SIEMENS A 3 T", "GE B 3 T"]}
    CASES: ClassVar = (
        ("_target_fits_kind", ("task", "target"), "ordinal", 'target = "count"'),
        ("_labels_are_names", ("task", "labels"), ["none", "emphysema"], '"background"'),
        ("_labels_are_names", ("task", "labels"), ["background", "a", "b"], "what is counted"),
        ("_loss_fits_target", ("training",), {"loss": "poisson"}, "proportion, squared"),
        ("_loss_fits_target", ("training",), {"loss": "dice"}, "proportion, squared"),
        ("_keys_are_read", ("training",), {"class_weights": [1.0, 1.0]}, "remove class_weights"),
        ("_keys_are_read", ("training",), {"balanced": True}, "remove balanced"),
        ("_keys_are_read", ("task", "sharpness"), 2.0, "remove sharpness"),
        ("_conditional_of_labels", ("adaptation",), {**ADVERSARY, "conditional": True}, "remove conditional"),
        ("_predictions_of_outlines", ("adaptation",), {**ADVERSARY, "reads": "predictions"}, "remove reads"),
    )

    @pytest.mark.parametrize(("check", "key", "value", "named"), CASES)
    def test_what_has_no_meaning_is_refused_with_the_remedy(self, check, key, value, named):
        """
        A target without a number, what is counted without a background, a loss of something else.
        """
        error = refused(with_value(key, value, QUANTIFYING))

        assert error.code == "P103"
        assert named in error.remedies[0]

    def test_number_that_nobody_names_is_not_guessed(self):
        """
        Without a target a plan is refused; nor has any other kind of task a number.
        """
        task = {key: value for key, value in QUANTIFYING["task"].items() if key != "target"}

        assert 'target = "count"' in refused({**QUANTIFYING, "task": task}).remedies[0]
        assert "quantification" in refused(with_value(("task", "target"), "count", CLASSIFYING)).remedies[0]
        assert "dice-ce" in refused(with_value(("training",), {"loss": "squared"})).remedies[0]

    def test_plan_is_the_same_after_a_journey(self):
        """
        The canonical text of a plan gives the plan again, and what a person says of it leaves the background out.
        """
        plan = Plan.from_tables(QUANTIFYING)

        assert Plan.from_tables(json.loads(plan.canonical_json())) == plan
        assert plan.task.named_labels == ("emphysema",)


RECONSTRUCTING: Tables = {
    "name": "reconstructing",
    "rounds": 1,
    "task": {"kind": "reconstruction", "network": "cascade", "acceleration": 4.0},
    "data": {"modality": "MR", "dimensions": 2, "patch": [32, 24]},
}


class TestReconstruction:
    CASES = (
        ("_network_answers_task", ("task", "network"), "unet", "cascade, varnet, image-unet"),
        ("_labels_are_names", ("task", "labels"), ["background", "lesion"], "remove labels"),
        ("_keys_are_read", ("task", "residual_units"), 2, "remove residual_units"),
        ("_keys_are_read", ("training",), {"foreground": 0.5}, "remove foreground"),
        ("_kspace_is_planar", ("data", "spacing_mm"), [1.0, 1.0], "no spacing_mm"),
        ("_kspace_is_planar", ("data", "channels"), ["flair"], 'channels = ["image"]'),
        ("_kspace_is_planar", ("data", "modality"), "DX", 'modality = "MR"'),
        ("_centre_is_measured", ("task", "acceleration"), 15.0, "below 0.0667"),
        ("_centre_is_measured", ("task", "centre_fraction"), 0.25, "below 0.25"),
        ("_centre_is_measured", ("task", "site_acceleration"), [["a", 16.0]], "below 0.0625"),
        ("_centre_is_measured", ("task", "site_acceleration"), [["a", 4.0], ["a", 5.0]], "once"),
        ("_coils_fit_network", ("task", "network"), "varnet", "number of coils"),
        (
            "_conditional_of_labels",
            ("adaptation",),
            {"adversarial": "scanner", "conditional": True},
            "remove conditional",
        ),
    )

    @pytest.mark.parametrize(("check", "key", "value", "named"), CASES)
    def test_what_has_no_meaning_is_refused_with_the_remedy(self, check, key, value, named):
        """
        Labels, a grid, sequences, a centre that is all there is, and what this network does not read.
        """
        error = refused(with_value(key, value, RECONSTRUCTING))

        assert error.code == "P103"
        assert named in error.remedies[0]

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            (("task", "mask"), "spiral"),
            (("task", "reference"), "phase"),
            (("task", "consistency"), "hard"),
            (("task", "acceleration"), 1.0),
            (("task", "acceleration"), "4"),
            (("task", "site_acceleration"), {"site-1": 4.0}),
            (("task", "centre_fraction"), 0.0),
            (("task", "cascades"), 0),
            (("data", "coils"), 0),
            (("data", "simulated"), "yes"),
        ],
    )
    def test_impossible_value_is_refused(self, key, value):
        """
        With the key, the value and what belongs there.
        """
        error = refused(with_value(key, value, RECONSTRUCTING))

        assert error.code == "P102"
        assert key_id(key) in error.happened
        assert error.remedies[0].startswith(f"{key[-1]}: ")

    def test_three_dimensions_are_refused(self):
        """
        Slices are reconstructed one by one.
        """
        tables = with_value(("data", "patch"), [8, 8, 8], with_value(("data", "dimensions"), 3, RECONSTRUCTING))

        assert refused(tables).code == "P103"

    def test_nothing_is_labelled_and_any_size_will_do(self):
        """
        Neither labels nor a patch that can be halved are asked for, and the plan is the same after a journey.
        """
        plan = Plan.from_tables(with_value(("data", "patch"), [31, 31], RECONSTRUCTING))
        text = plan.canonical_json()

        assert plan.task.labels == ()
        assert Plan.from_tables(json.loads(text)) == plan
        assert "foreground" not in text
        assert hash(plan) == hash(Plan.from_tables(json.loads(text)))

    def test_other_plans_keep_their_hash(self):
        """
        What reconstruction reads leaves no trace in the plan of another task.
        """
        text = Plan.from_tables(FULL).canonical_json()

        assert not any(f'"{key}"' in text for _, key in RECONSTRUCTING_KEYS)


def test_labels_are_named_in_full_where_none_is_the_background():
    """
    What a hospital reads of a plan leaves out the background of what is drawn, and no label of whole studies.
    """
    assert Plan.from_tables(FULL).task.named_labels == ("lesion",)
    assert Plan.from_tables(CLASSIFYING).task.named_labels == tuple(CLASSIFYING["task"]["labels"])
