"""Burned-in text and faces are suspected where they are, and seldom where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from client.data import dicom
from client.data.scan import Scan
from client.data.skips import UnusableError
from client.data.suspicions import has_text, may_show_face


def anatomy(seed: int, shape=(256, 256)) -> np.ndarray:
    """Smooth grey shapes with noise, as soft tissue looks."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    image = gaussian_filter(rng.random(shape), 8) * 4000 + gaussian_filter(rng.random(shape), 2) * 400
    return (image - image.min()).astype(np.float32)


def written_on(image: np.ndarray, seed: int) -> np.ndarray:
    """The same with a name, a date or a measure burned in, in the brightest value."""
    rng = np.random.default_rng(seed)
    words = ["DOE^JANE", "12.03.1961", "ID 4711-08", "MUSTERMANN", "L 23.4 mm"]
    text = Image.new("L", image.shape[::-1])
    font = ImageFont.load_default(size=int(rng.integers(11, 26)))
    place = (int(rng.integers(5, 100)), int(rng.integers(5, 200)))
    ImageDraw.Draw(text).text(place, words[seed % len(words)], fill=255, font=font)
    return np.where(np.asarray(text) > 127, image.max() * 1.1, image).astype(np.float32)


class TestText:
    def test_planted_text_is_found(self):
        """
        Of 100 pictures with a burned-in line of text at least 95 are suspected.
        """
        assert sum(has_text(written_on(anatomy(n), n)) for n in range(100)) >= 95

    def test_pictures_without_text_are_left_alone(self):
        """
        Of 100 without any at most 5.
        """
        assert sum(has_text(anatomy(n)) for n in range(100)) <= 5

    def test_real_slices_without_text_are_left_alone(self, shared_data):
        """
        Of the slices of seven scanners, all without text, at most one in twenty.
        """
        folders = [p for p in (shared_data / "dicom").iterdir() if p.is_dir() and p.name != "pydicom_samples"]
        suspected = []
        for folder in folders:
            for path in sorted(p for p in folder.rglob("*") if p.is_file())[:6]:
                try:
                    stack = dicom.read_volumes([path])[0]
                except UnusableError:
                    continue
                suspected += [has_text(plane) for plane in stack.scan.image[0][::3]]

        assert len(suspected) > 100
        assert np.mean(suspected) <= 0.05

    @pytest.mark.parametrize("value", [0.0, 7.0])
    def test_even_picture_has_no_text(self, value):
        """
        Nothing to be seen.
        """
        assert not has_text(np.full((64, 64), value, dtype=np.float32))


class TestFaces:
    @pytest.fixture
    def head(self):
        """160 slices of a millimetre, 256 by 256: noise around a head."""
        image = np.random.default_rng(0).random((1, 160, 256, 256), dtype=np.float32)
        return Scan(image, np.diag([1.0, 1.0, 1.0, 1.0]))

    def test_fine_volume_of_a_head_may_show_a_face(self, head):
        """
        By its name, its size and its spacing.
        """
        assert may_show_face(head, "t1 mprage sag", "MR")

    @pytest.mark.parametrize(
        ("name", "spacing", "is_stripped"),
        [("t2 prostate", 1.0, False), ("t1 mprage", 4.0, False), ("t1 mprage", 1.0, True)],
    )
    def test_others_do_not(self, head, name, spacing, is_stripped):
        """
        Another part of the body, thick slices, a brain without its skull.
        """
        image = np.where(head.image < 0.8, 0, head.image) if is_stripped else head.image

        assert not may_show_face(Scan(image, np.diag([1.0, 1.0, spacing, 1.0])), name, "MR")
