"""What the registry releases is whole, signed and told with its evidence, or it is not there."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import laws
import numpy as np
import pytest
from crashes import killed_at
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from releases import CONSORTIUM, MEASURED, plan_of, publish, records_of, weights_for

from server import registry as registry_module
from server.journal import Journal
from server.registry import Registry
from server.rounds import Measured
from shared_models import release as release_module
from shared_models.errors import FederadError
from shared_models.release import CARD, CARD_PAGE, FILES, MANIFEST, MODEL, PART, SitePrivacy, new_release, verify_folder
from shared_models.signing import fingerprint
from shared_models.weights import decode, weights_sha256
from simulation.engine import Execution, run_rounds

KEY = Ed25519PrivateKey.generate()
PLAN = plan_of()


def code_of(work) -> str:
    """The number of the error that ends ``work``."""
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value.code


def assert_whole(folder: Path) -> int:
    """Every release in the folder is one that a hospital would take; how many there are."""
    releases = Registry(folder).list()
    for release in releases:
        verify_folder(release.folder, KEY.public_key(), CONSORTIUM)
    assert len(releases) == len([path for path in folder.glob("*") if not path.name.startswith(".")])
    return len(releases)


class TestPublish:
    def test_release_holds_the_weights_bit_for_bit(self, tmp_path):
        """
        What was trained is what is handed out, under the hash of its file, and it says which run it is from.
        """
        release = publish(tmp_path, KEY)
        data = (release.folder / MODEL).read_bytes()

        laws.assert_same_bits(release.weights(), weights_for(PLAN))
        assert release.sha256 == release.folder.name == fingerprint(data)
        assert json.loads(decode(data)[1]) == {"plan_sha256": PLAN.sha256, "run": "lesions-1"}

    def test_manifest_signs_name_size_and_hash_of_every_file(self, tmp_path):
        """
        Besides the manifest there is nothing in the folder that is not signed.
        """
        release = publish(tmp_path, KEY)

        assert {path.name for path in release.folder.iterdir()} == {MANIFEST, *FILES}
        for entry in release.manifest.files:
            data = (release.folder / entry.name).read_bytes()
            assert (entry.n_bytes, entry.sha256) == (len(data), fingerprint(data))
        assert release.manifest.plan_sha256 == PLAN.sha256
        assert release.signed.consortium == CONSORTIUM
        release.verify(KEY.public_key(), CONSORTIUM)

    def test_published_again_it_is_the_same_release(self, tmp_path):
        """
        A run that is resumed after its release does not release a second one.
        """
        first, again = publish(tmp_path, KEY), publish(tmp_path, KEY)

        assert again.signed == first.signed
        assert len(Registry(tmp_path).list()) == 1

    def test_same_weights_of_another_run_are_another_release(self, tmp_path):
        """
        Each run has its own evidence.
        """
        publish(tmp_path, KEY)
        publish(tmp_path, KEY, run="lesions-2")

        assert {release.run for release in Registry(tmp_path).list()} == {"lesions-1", "lesions-2"}

    def test_damaged_release_is_not_published_over(self, tmp_path):
        """
        What hospitals may have fetched already is not replaced in silence.
        """
        release = publish(tmp_path, KEY)
        (release.folder / MODEL).write_bytes(b"")

        assert code_of(lambda: publish(tmp_path, KEY)) == "M215"

    @pytest.mark.parametrize("fault", ["not finite", "shape", "missing", "unknown round"])
    def test_weights_that_should_not_be_used_are_not_released(self, tmp_path, fault):
        """
        Not finite, of another network, or of no committed round: nothing is written.
        """
        weights = weights_for(PLAN)
        name = next(iter(weights))
        records = records_of(weights)
        if fault == "not finite":
            weights[name].flat[0] = np.nan
            records = records_of(weights)
        elif fault == "shape":
            weights[name] = weights[name][..., :1]
        elif fault == "missing":
            del weights[name]
        else:
            weights[name] = weights[name] + np.float32(1)

        registry = Registry(tmp_path / "releases")
        assert (
            code_of(lambda: registry.publish(PLAN, "r", weights, records, MEASURED, KEY, consortium=CONSORTIUM))
            == "S203"
        )
        assert not (tmp_path / "releases").exists()

    def test_folder_that_cannot_be_written_is_named(self, tmp_path):
        """
        A file in place of the folder ends in S202.
        """
        (tmp_path / "releases").write_text("")

        assert code_of(lambda: publish(tmp_path / "releases", KEY)) == "S202"

    def test_full_disk_leaves_nothing(self, tmp_path):
        """
        A write that the system refuses half-way ends in S202 and leaves no remains.
        """

        def work() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            assert code_of(lambda: publish(tmp_path, KEY)) == "S202"

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()

        assert child.exitcode == 0
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        publish(tmp_path, KEY)
        assert assert_whole(tmp_path) == 1

    def test_several_at_once_do_not_disturb_each_other(self, tmp_path):
        """
        Four processes that publish the same five runs leave five whole releases.
        """
        fork = multiprocessing.get_context("fork")
        plan = plan_of(channels=(16, 64, 256))

        def publish_five() -> None:
            for number in range(5):
                publish(tmp_path, KEY, plan, run=f"run-{number}")

        processes = [fork.Process(target=publish_five) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

        assert [process.exitcode for process in processes] == [0, 0, 0, 0]
        assert assert_whole(tmp_path) == 5

    def test_who_comes_while_another_publishes_waits(self, tmp_path):
        """
        Nothing of a release that is being written is touched.
        """
        publish(tmp_path / "before", KEY)  # imports are done: the other would need far less than a second
        folder = tmp_path / "releases"
        other = multiprocessing.get_context("fork").Process(target=publish, args=(folder, KEY))
        with new_release(folder) as part:
            other.start()
            other.join(1.0)
            assert other.is_alive()
            assert part.exists()
        other.join()

        assert other.exitcode == 0
        assert assert_whole(folder) == 1

    def test_model_of_a_real_run_is_released_with_what_was_measured(self, smoke_plan, stations, tmp_path):
        """
        Two rounds on three hospitals: the best round's weights, each hospital's figures and numbers of patients.
        """
        journal = Journal(tmp_path / "journal")
        outcome = run_rounds(smoke_plan, stations, journal, seed=0, execution=Execution())
        release = Registry(tmp_path / "releases").publish(
            smoke_plan, "smoke-1", outcome.best, journal.records(), outcome.test, KEY, consortium=CONSORTIUM
        )
        card = verify_folder(release.folder, KEY.public_key(), CONSORTIUM).card()

        laws.assert_same_bits(release.weights(), outcome.best)
        assert card.released_round == outcome.best_round
        assert {"dice", "hd95_mm"} <= card.test.keys()
        assert card.test.items() <= outcome.test.mean.items()
        assert {site.name: site.test_patients for site in card.sites if site.test} == outcome.test.patients
        assert len(card.sites) == 3
        assert len(card.rounds) == smoke_plan.rounds


class TestCard:
    def test_card_tells_where_the_model_comes_from(self, tmp_path):
        """
        Plan, run, round, weights, versions, as JSON that any program reads.
        """
        release = publish(tmp_path, KEY)
        card = json.loads((release.folder / CARD).read_text())

        assert card["plan"] == json.loads(PLAN.canonical_json())
        assert card["plan_sha256"] == PLAN.sha256
        assert card["weights_sha256"] == weights_sha256(weights_for(PLAN))
        assert card["model_sha256"] == release.sha256
        assert (card["run"], card["consortium"], card["released_round"]) == ("lesions-1", CONSORTIUM, 2)
        assert card["parameters"] == sum(array.size for array in weights_for(PLAN).values())
        assert {"federad", "torch", "monai"} <= card["versions"].keys()
        assert card["issued"] == release.issued

    def test_every_site_stands_there_with_its_own_figures(self, tmp_path):
        """
        Rounds, validation and test with the number of patients; no privacy was spent and the card says so.
        """
        north, south = publish(tmp_path, KEY).card().sites

        assert (north.name, north.rounds, north.test_patients) == ("north", 2, 4)
        assert (south.name, south.rounds, south.test_patients) == ("south", 1, 3)
        assert south.test == {"dice": 0.5, "hd95_mm": 9.0}
        assert south.validation == {"dice": 0.4, "hd95_mm": 10.0}
        assert north.privacy is None

    def test_privacy_of_every_site_stands_there(self, tmp_path):
        """
        Under [privacy] the card gives what a patient of each site has paid, and no number of test patients.
        """
        plan = plan_of(privacy={"epsilon": 8.0, "patients_per_step": 4, "steps_per_round": 2})
        cost = {"north": {"epsilon": 7.5, "delta": 1e-5, "declared_size": 200.0}}

        release = publish(tmp_path, KEY, plan, cost=cost)
        north, south = release.card().sites
        text = (release.folder / CARD_PAGE).read_text()

        assert north.privacy == SitePrivacy(epsilon=7.5, delta=1e-5, declared_size=200)
        assert south.privacy is None
        assert north.test_patients is None
        assert "| north | 7.5 | 1e-05 | - | 200 |" in text
        assert "without differential privacy" not in text
        assert "So few test patients" not in text

    def test_noised_figures_stand_with_their_interval(self, tmp_path):
        """
        Where metrics have noise, the card says where 95 % of it lies, of each site's and of all together.
        """
        plan = plan_of(
            privacy={
                "epsilon": 8.0, "patients_per_step": 4, "steps_per_round": 2, "metrics_every": 1, "metrics_noise": 0.5,
            }
        )  # fmt: skip

        release = publish(tmp_path, KEY, plan)
        card, text = release.card(), (release.folder / CARD_PAGE).read_text()
        low, high = card.test_interval["dice"]

        assert 0 <= low < card.test["dice"] < high <= 1
        assert all(site.test_interval.keys() == site.test.keys() for site in card.sites)
        assert f"{card.test['dice']:.4g} ({low:.4g} to {high:.4g})" in text
        assert "| all | - |" in text
        assert publish(tmp_path / "exact", KEY).card().test_interval is None

    def test_page_says_what_a_reader_must_know(self, tmp_path):
        """
        Intended use, limits, figures with patients, and that there is no differential privacy.
        """
        text = (publish(tmp_path, KEY).folder / CARD_PAGE).read_text()

        assert "Not a medical device" in text
        assert "without differential privacy" in text
        assert "| north | 4 | 2 | 0.6 | 8 |" in text
        assert "| all | 7 |  | 0.55 | 8.5 |" in text
        assert "So few test patients" in text
        assert PLAN.sha256 in text

    @pytest.mark.parametrize(
        ("release", "said"), [("best", "They chose the round"), ("last", "releases its last round")]
    )
    def test_page_says_how_the_round_was_chosen(self, tmp_path, release, said):
        """
        Figures that chose the model are too good, others are not.
        """
        plan = plan_of(strategy={"release": release})

        assert said in (publish(tmp_path, KEY, plan).folder / CARD_PAGE).read_text()

    def test_model_that_nobody_tested_says_so(self, tmp_path):
        """
        No test patients anywhere is the first of its limits.
        """
        weights = weights_for(PLAN)
        release = Registry(tmp_path).publish(
            PLAN, "r", weights, records_of(weights), Measured(None, {}, {}), KEY, consortium=CONSORTIUM
        )

        assert release.card().limits[0].startswith("Nobody has tested it")
        assert release.card().test is None

    def test_what_a_site_calls_a_metric_does_not_reach_the_page(self, tmp_path):
        """
        Only the task's own metrics are told: a site cannot write on the card.
        """
        said = {"dice": 0.5, "hd95_mm": 1.0, "| x |\n# Approved": 1.0}
        measured = replace(MEASURED, mean=said, per_site={"north": said}, patients={"north": 4})
        weights = weights_for(PLAN)
        release = Registry(tmp_path).publish(
            PLAN, "r", weights, records_of(weights), measured, KEY, consortium=CONSORTIUM
        )

        assert "Approved" not in (release.folder / CARD_PAGE).read_text()
        assert "Approved" not in (release.folder / CARD).read_text()


class TestFind:
    @pytest.fixture
    def registry(self, tmp_path) -> Registry:
        publish(tmp_path, KEY)
        publish(tmp_path, KEY, run="lesions-2", seed=1)
        publish(tmp_path, KEY, plan_of("vessels"), run="vessels-1", seed=2)
        return Registry(tmp_path)

    def test_release_is_found_by_the_digits_of_its_hash_its_run_or_its_plan(self, registry):
        """
        Whatever names one release and no other.
        """
        for release in registry.list():
            assert registry.find(release.sha256) == release
            assert registry.find(release.sha256[:10]) == release
            assert registry.find(release.run) == release
        assert registry.find("vessels").run == "vessels-1"

    def test_name_of_several_is_refused_with_all_of_them(self, registry):
        """
        The message lists what could be meant.
        """
        with pytest.raises(FederadError) as caught:
            registry.find("lesions")

        assert caught.value.code == "S201"
        for release in registry.list()[:2]:
            assert (release.sha256[:12] in caught.value.happened) == (release.name == "lesions")

    @pytest.mark.parametrize("name", ["", "zzz", "..", "*", "lesions-", "../releases"])
    def test_unknown_name_is_refused(self, registry, name):
        """
        And the message says what there is.
        """
        assert code_of(lambda: registry.find(name)) == "S200"

    def test_empty_folder_has_no_releases(self, tmp_path):
        """
        Before the first release the folder need not be there.
        """
        registry = Registry(tmp_path / "none")

        assert registry.list() == []
        assert code_of(lambda: registry.find("lesions")) == "S200"

    def test_every_released_file_is_found_by_its_hash_and_nothing_else(self, registry, tmp_path):
        """
        What a site fetches by hash is a released file, whatever else lies near it.
        """
        for release in registry.list():
            for entry in release.manifest.files:
                assert fingerprint(registry.path(entry.sha256).read_bytes()) == entry.sha256
                assert fingerprint(b"".join(registry.read(entry.sha256))) == entry.sha256
        (tmp_path / ("0" * 64)).mkdir()
        for other in ("0" * 64, "../../keys/plan.key", fingerprint((tmp_path / ".lock").read_bytes())):
            assert code_of(lambda other=other: registry.path(other)) == "S200"
            assert code_of(lambda other=other: registry.read(other)) == "S200"

    def test_oldest_release_comes_first(self, tmp_path):
        """
        In the order in which they were signed, whatever their hashes.
        """
        releases = [publish(tmp_path, KEY, run=f"run-{i}") for i in range(4)]
        for i, release in enumerate(releases):
            signed = release.signed.model_copy(update={"issued": f"2026-01-0{4 - i}T00:00:00+00:00"}).signed(KEY)
            (release.folder / MANIFEST).write_bytes(signed.encode())

        assert [release.run for release in Registry(tmp_path).list()] == ["run-3", "run-2", "run-1", "run-0"]

    def test_damaged_release_does_not_hide_the_others(self, registry, caplog):
        """
        It is left out and named in the log.
        """
        first, *others = registry.list()
        (first.folder / MANIFEST).write_text("{")
        with caplog.at_level(logging.WARNING):
            assert registry.list() == others
        assert first.sha256[:12] in caplog.text


def test_listing_and_handing_out_load_no_torch(tmp_path):
    """
    The service that sites ask does so for days; a framework of hundreds of megabytes is no part of it.
    """
    release = publish(tmp_path, KEY)
    work = (
        "import sys; from pathlib import Path; from server.registry import Registry; "
        "r = Registry(Path(sys.argv[1])); n = sum(map(len, r.read(r.find('lesions').sha256))); "
        "assert not {'torch', 'flwr', 'monai'} & sys.modules.keys(); print(n)"
    )
    done = subprocess.run(
        [sys.executable, "-c", work, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert int(done.stdout) == release.signed.n_bytes


class TestKilled:
    @pytest.mark.parametrize("module", [registry_module, release_module], ids=["registry", "release"])
    def test_killed_before_any_line_there_is_a_whole_release_or_none(self, tmp_path, module):
        """
        Wherever publishing dies, the next call ends with one whole release and no remains.
        """
        seen, n_lines, killed = [], 1, True
        while killed:
            folder = tmp_path / str(n_lines)
            killed = killed_at(n_lines, module, lambda folder=folder: publish(folder, KEY))
            seen.append(assert_whole(folder))
            writing = folder.exists()
            if writing:
                publish(folder, KEY)
                assert {path.name for path in folder.iterdir()} == {".lock", Registry(folder).list()[0].folder.name}
                shutil.rmtree(folder)
            n_lines += 1 if writing else 4  # nothing is on the disk before

        assert seen == sorted(seen)
        assert set(seen) == {0, 1}

    def test_killed_at_any_moment_there_are_only_whole_releases(self, tmp_path):
        """
        Killed by the clock, also in the middle of a write of megabytes, nothing half-written is ever listed.
        """
        fork = multiprocessing.get_context("fork")
        plan = plan_of(channels=(16, 64, 256))
        done = 0

        def publish_on(first: int) -> None:
            for number in range(first, first + 1000):
                publish(tmp_path, KEY, plan, run=f"run-{number}")

        for i in range(6):
            running = fork.Process(target=publish_on, args=(done,))
            running.start()
            while len(Registry(tmp_path).list()) < done + 1:
                time.sleep(0.001)
            time.sleep(random.Random(i).uniform(0, 0.1))
            running.kill()
            running.join()
            found = assert_whole(tmp_path)
            assert found >= done + 1
            done = found
        publish(tmp_path, KEY, plan, run="last")
        assert not list(tmp_path.glob(f"{PART}*"))
