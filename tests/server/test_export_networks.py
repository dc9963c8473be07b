"""Every network that a plan can name leaves as ONNX with the same output."""

from __future__ import annotations

import contracts
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from releases import publish

from server.export import TOLERANCE, export_onnx
from shared_models.networks import NETWORKS_FOR

CASES = [(task, network) for task in ("segmentation", "classification") for network in NETWORKS_FOR[task]]


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize(("task", "network"), CASES, ids=lambda name: name)
def test_every_network_gives_the_same_output_as_onnx(task, network, tmp_path):
    """
    Also on an image that is black, where a layer that divides by almost nothing would show.
    """
    plan = contracts.example_plan(task, network, data={"patch": [16, 16]})
    release = publish(tmp_path / "releases", Ed25519PrivateKey.generate(), plan)

    assert export_onnx(release, tmp_path / "model.onnx") <= TOLERANCE
