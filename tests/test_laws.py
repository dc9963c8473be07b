"""Each law finds the part that breaks it."""

from __future__ import annotations

import laws
import numpy as np
import pytest
import torch
from torch import nn

import shared_models.weights
from shared_models.weights import load_weights

ONE = {"w": np.array([1e8], np.float32)}
OTHER = {"w": np.array([-1e8], np.float32)}
SMALL = {"w": np.array([1.0], np.float32)}


def float32_mean(updates, weights):
    """What one would write first: a weighted sum in float32."""
    total = np.float32(0)
    for update, weight in zip(updates, weights, strict=True):
        total = total + np.float32(weight) * update["w"]
    return {"w": (total / np.float32(sum(weights))).astype(np.float64)}


def plain_sum(updates, weights):
    """A mean whose author forgot to divide."""
    return {"w": sum(w * u["w"].astype(np.float64) for u, w in zip(updates, weights, strict=True))}


class TestLawsOfAggregation:
    def test_a_sum_is_no_mean(self):
        """
        Equal updates that add up instead of averaging are noticed.
        """
        with pytest.raises(AssertionError):
            laws.assert_equal_updates_average_to_themselves(plain_sum, SMALL, [1, 2])

    def test_float32_depends_on_the_order(self):
        """
        A mean in float32 loses a small update between two large ones in one order only.
        """
        with pytest.raises(AssertionError):
            laws.assert_order_changes_no_bit(float32_mean, [ONE, OTHER, SMALL], [1, 1, 1], [0, 2, 1])

    def test_a_sum_does_not_scale(self):
        """
        A sum grows with its weights.
        """
        with pytest.raises(AssertionError):
            laws.assert_weights_scale_out(plain_sum, [SMALL], [1], 3)

    def test_float32_is_not_exact(self):
        """
        A mean in float32 differs from that of fractions.
        """
        with pytest.raises(AssertionError):
            laws.assert_mean_is_that_of_fractions(float32_mean, [ONE, SMALL, OTHER], [1, 1, 1], within=1e-9)


class TestLawsOfExchange:
    def test_a_lossy_wire_is_noticed(self, monkeypatch):
        """
        A wire that halves the precision changes bits.
        """
        exact = shared_models.weights.encode
        monkeypatch.setattr(
            laws, "encode", lambda w, t: exact({k: v.astype(np.float16).astype(np.float32) for k, v in w.items()}, t)
        )

        with pytest.raises(AssertionError):
            laws.assert_survives_the_wire({"w": np.array([0.1], np.float32)})

    def test_a_model_that_takes_any_shape_is_noticed(self, monkeypatch):
        """
        Loading without looking at shapes raises nothing and is found.
        """
        monkeypatch.setattr(laws, "load_weights", lambda network, weights: None)

        with pytest.raises(pytest.fail.Exception):
            laws.assert_refuses_weights_of_another_shape(nn.Linear(2, 2))

    def test_a_model_that_is_half_loaded_is_noticed(self, monkeypatch):
        """
        A model that changes before it refuses is found.
        """

        def spoil(network, weights):
            with torch.no_grad():
                network.bias.add_(1)
            load_weights(network, weights)

        monkeypatch.setattr(laws, "load_weights", spoil)

        with pytest.raises(AssertionError):
            laws.assert_refuses_weights_of_another_shape(nn.Linear(2, 2))
