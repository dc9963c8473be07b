"""A hospital takes a model from the consortium only as the operator signed it."""

from __future__ import annotations

import json
import shutil

import network
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from releases import MEASURED, plan_of, records_of, weights_for
from typer.testing import CliRunner

from client.cli import app
from client.folder import SiteFolder
from client.releases import fetch, listed
from server.registry import FOLDER, Registry
from shared_models.errors import FederadError
from shared_models.release import MODEL
from shared_models.weights import weights_sha256


@pytest.fixture
def operator(tmp_path):
    with network.Operator(tmp_path / "operator") as running:
        yield running


@pytest.fixture
def site(operator, tmp_path) -> SiteFolder:
    """A site that has enrolled; it needs no data to fetch a model."""
    folder = SiteFolder(tmp_path / "site")
    folder.make()
    (folder.station / "site.toml").touch()
    for file in operator.enrolled("site-a").iterdir():
        if file.is_file():
            shutil.copy(file, folder.courier)
    return folder


def release(operator, *, seed: int = 0, key: Ed25519PrivateKey | None = None):
    """Publish in the operator's own registry."""
    plan, consortium = plan_of(), operator.consortium
    weights = weights_for(plan, seed)
    return Registry(consortium.folder / FOLDER).publish(
        plan,
        f"lesions-{seed}",
        weights,
        records_of(weights),
        MEASURED,
        key or consortium.plan_key,
        consortium=consortium.config.name,
    )


def code_of(work) -> str:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value.code


class TestFetch:
    def test_fetched_model_is_the_released_one(self, operator, site):
        """
        By its hash or its run; the list then says that it is here, and progress ends at the whole.
        """
        published = release(operator)
        release(operator, seed=1)
        steps = []

        fetched = fetch(site, published.sha256[:12], lambda *step: steps.append(step))

        assert weights_sha256(fetched.weights()) == weights_sha256(published.weights())
        assert fetched.folder == site.releases / published.sha256
        assert steps[-1][0] == steps[-1][1] > 0
        assert [one.is_here for one in listed(site)] == [True, False]
        assert fetch(site, "lesions-1").sha256 == listed(site)[1].sha256

    def test_release_of_another_signer_is_not_taken(self, operator, site):
        """
        Whoever holds the server but not the key that was pinned at enrolment can offer nothing.
        """
        release(operator, key=Ed25519PrivateKey.generate())

        assert code_of(lambda: fetch(site, "lesions-0")) == "M212"
        assert code_of(lambda: listed(site)) == "M212"
        assert not list(site.releases.glob("[0-9a-f]*"))

    def test_damaged_copy_at_the_operator_is_not_taken(self, operator, site):
        """
        One bit of the weights is enough, and nothing of it stays here.
        """
        published = release(operator)
        file = published.folder / MODEL
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.chmod(0o600)
        file.write_bytes(data)

        assert code_of(lambda: fetch(site, "lesions-0")) == "M211"
        assert not list(site.releases.glob("[0-9a-f]*"))

    def test_unclear_or_unknown_release_is_named(self, operator, site):
        """
        Together with what there is.
        """
        release(operator)

        for wanted in ("", "nothing", "lesions"):
            assert code_of(lambda wanted=wanted: fetch(site, wanted)) == "C163"


class TestCommands:
    def test_list_and_fetch_as_they_are_typed(self, operator, site):
        """
        Each tells the next.
        """
        sha256 = release(operator).sha256
        words = ["--site", str(site.root)]

        shown = CliRunner().invoke(app, ["releases", *words]).output
        fetched = json.loads(CliRunner().invoke(app, ["fetch", sha256[:12], *words, "--json"]).output)
        again = json.loads(CliRunner().invoke(app, ["releases", *words, "--json"]).output)

        assert f"federad-site fetch {sha256[:12]}" in shown
        assert fetched["release"] == sha256
        assert (site.releases / sha256 / MODEL).is_file()
        assert [one["here"] for one in again] == [True]
