"""What one command names as the next can be typed as it stands."""

from __future__ import annotations

import pytest

from shared_models.commands import START_VARIABLE, TYPED_VARIABLE, typed


@pytest.fixture(autouse=True)
def as_a_clone(monkeypatch):
    for name in (TYPED_VARIABLE, START_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_in_a_clone_it_is_the_command():
    """
    Nothing is added where nobody said how the program is typed.
    """
    assert typed("federad-site", "approve smoke") == "federad-site approve smoke"
    assert typed("federad-server", "start --detach") == "federad-server start --detach"


def test_as_a_service_it_is_what_the_administrator_types(monkeypatch):
    """
    With sudo, and started by systemd, so that it is back after the machine was started anew.
    """
    monkeypatch.setenv(TYPED_VARIABLE, "sudo federad-site")
    monkeypatch.setenv(START_VARIABLE, "sudo systemctl enable --now federad-station")

    assert typed("federad-site", "approve smoke") == "sudo federad-site approve smoke"
    assert typed("federad-site", "start") == "sudo systemctl enable --now federad-station"
