"""The bundle: what travels is configuration and not a line of code."""

from __future__ import annotations

import io
import zipfile

import pytest

from server.bundle import RUN_KEY, make_bundle


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


class TestBundle:
    def test_no_code_travels(self, bundle):
        """
        The bundle holds a project file, a page to read and Flower's own list of the two.
        """
        names = zipfile.ZipFile(io.BytesIO(bundle.content)).namelist()

        assert sorted(names) == [".info/CONTENT", "README.md", "pyproject.toml"]

    def test_flower_finds_the_installed_apps_in_it(self, bundle):
        """
        Flower reads it as valid, with the two apps that are installed where they run and the keys that a run sets.
        """
        from flwr.common.config import get_fab_config

        app = get_fab_config(bundle.content)["tool"]["flwr"]["app"]

        assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
        assert set(app["config"]) == {RUN_KEY}

    def test_same_version_makes_the_same_bytes(self, bundle):
        """
        Its hash can be compared, since nothing in it depends on where or when it was made.
        """
        assert make_bundle().sha256 == bundle.sha256

    def test_site_takes_it(self, bundle):
        """
        The guard of a site, which refuses bundles with code, lets it pass.
        """
        from client.guard import inspect_bundle

        inspect_bundle(bundle.content)
