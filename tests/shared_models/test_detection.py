"""Peaks of a heatmap against what is outlined: the free-response curve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.detection import RATES, counted, found_at, peaks, summarised


def heat_of(*places: tuple[int, int, float], ground: float = -20.0) -> np.ndarray:
    """A plane with hot pixels."""
    heat = np.full((1, 24, 24), ground, np.float32)
    for y, x, value in places:
        heat[0, y, x] = value
    return heat


def outline_of(*boxes: tuple[int, int]) -> np.ndarray:
    """Lesions of 3 x 3 pixels around these places."""
    outline = np.zeros((1, 24, 24), bool)
    for y, x in boxes:
        outline[0, y - 1 : y + 2, x - 1 : x + 2] = True
    return outline


class TestPeaks:
    def test_hottest_come_first_and_a_plateau_is_one(self):
        """
        Two pixels that are equally hot side by side are one place.
        """
        places, scores = peaks(heat_of((5, 5, 1.0), (12, 3, 3.0), (18, 8, 2.0), (18, 9, 2.0)))

        np.testing.assert_array_equal(scores[:3], [3.0, 2.0, 1.0])
        np.testing.assert_array_equal(places[0], [0, 12, 3])


class TestCurve:
    def test_sensitivity_is_read_off_at_each_rate(self):
        """
        By hand: the hottest peak hits one of two lesions, the next is false, the third hits the other.
        """
        row = counted(heat_of((5, 5, 3.0), (12, 12, 2.0), (18, 18, 1.0)), outline_of((5, 5), (18, 18)))
        found = summarised([row])

        assert [found[found_at(rate)] for rate in RATES] == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
        assert found["froc"] == pytest.approx(11 / 14)

    def test_lesions_of_all_patients_count_together(self):
        """
        A false place of a healthy patient counts, and lesions that are never found do, too.
        """
        hit = counted(heat_of((5, 5, 3.0)), outline_of((5, 5)))
        missed = counted(heat_of(), outline_of((5, 5)))
        healthy = counted(heat_of((9, 9, 4.0)), outline_of())
        found = summarised([hit, missed, healthy])

        assert found[found_at(0.25)] == 0.0  # the false place is hotter than the hit: one in three studies
        assert found[found_at(0.5)] == 0.5

    def test_several_peaks_in_a_lesion_find_it_once(self):
        """
        Neither twice, nor as false places.
        """
        found = summarised([counted(heat_of((4, 4, 3.0), (6, 6, 2.0)), outline_of((5, 5)))])

        assert found["froc"] == 1.0

    def test_without_a_lesion_there_is_no_curve(self):
        """
        Nothing to be found is no sensitivity.
        """
        assert summarised([counted(heat_of((9, 9, 4.0)), outline_of())]) == {}

    @given(st.integers(0, 2**32 - 1))
    def test_more_false_places_never_find_less(self, seed):
        """
        The curve does not fall, and lies between 0 and 1.
        """
        rng = np.random.default_rng(seed)
        rows = [
            counted(rng.normal(0, 3, (1, 12, 12)).astype(np.float32), rng.random((1, 12, 12)) < 0.03) for _ in range(3)
        ]
        found = summarised(rows)
        values = [found[found_at(rate)] for rate in RATES if found]

        assert values == sorted(values)
        assert all(0 <= value <= 1 for value in values)
