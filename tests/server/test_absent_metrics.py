"""A site that cannot give a metric does not drag it down."""

from __future__ import annotations

import pytest

from server.rounds import _measured
from shared_models.messages import Answer


def answer(site: str, n: int, **metrics: float) -> Answer:
    return Answer(site, None, metrics=metrics, counts={"measured": n})


def test_mean_is_over_the_sites_that_have_the_metric():
    """
    A hospital whose patients all have one label has no AUC, and its accuracy counts.
    """
    measured = _measured(
        [answer("a", 10, auc=0.9, accuracy=0.5), answer("b", 30, accuracy=1.0), answer("c", 30, auc=0.5, accuracy=0.0)]
    )

    assert measured.mean == pytest.approx({"auc": (9 + 15) / 40, "accuracy": (5 + 30) / 70})
    assert measured.per_site["b"] == {"accuracy": 1.0}


def test_metric_that_nobody_has_is_not_there():
    """
    Neither as a zero nor as a number that is none.
    """
    assert _measured([answer("a", 10, accuracy=0.5)]).mean == {"accuracy": 0.5}
    assert _measured([answer("a", 0, accuracy=0.5)]).mean is None
