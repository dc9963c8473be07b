"""Errors that a person can act on."""

from __future__ import annotations

import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from shared_models.errors import TITLES, FederadError

ROOT = Path(__file__).parents[2]


def an_error() -> FederadError:
    return FederadError(
        "M210", happened="Layer 3 has shape (2,).", because="It belongs to another plan.", remedies=["check", "or wait"]
    )


def fail_in_a_worker() -> None:
    raise an_error()


class TestNumbers:
    def test_every_number_is_an_exit_status_of_its_own(self):
        """
        The number without its letter tells the scheduler which page to open, so it is between 100 and 255 and unique.
        """
        numbers = [int(code[1:]) for code in TITLES]

        assert all(re.fullmatch("[PCSMR][0-9]{3}", code) for code in TITLES)
        assert all(100 <= number <= 255 for number in numbers)
        assert len(set(numbers)) == len(numbers)

    def test_every_title_is_one_short_line(self):
        """
        Titles head pages and tables.
        """
        assert all(title and len(title) < 80 and title[-1] not in ".\n" for title in TITLES.values())

    def test_every_number_that_is_raised_is_in_the_table(self):
        """
        No code raises a number that has no title.
        """
        sources = [f for p in ("shared_models", "client", "server", "simulation") for f in (ROOT / p).rglob("*.py")]
        raised = {
            code for file in sources for code in re.findall(r'"([A-Z][0-9]{3})"', file.read_text(encoding="utf-8"))
        }

        assert raised
        assert raised <= TITLES.keys()

    def test_unknown_number_cannot_be_raised(self):
        """
        A number outside the table is a mistake of the programmer.
        """
        with pytest.raises(ValueError, match="X999"):
            FederadError("X999", happened="", because="", remedies=())


class TestMessage:
    def test_message_is_a_small_instruction(self):
        """
        What happened, why it matters, what to do, and where to read more.
        """
        assert str(an_error()) == (
            "M210  Layer 3 has shape (2,).\n"
            "      It belongs to another plan.\n"
            "What you can do:\n"
            "  - check\n"
            "  - or wait\n"
            "More: docs/errors/M210.md"
        )

    def test_number_is_the_exit_status(self):
        """
        The command ends with the number of its error.
        """
        assert an_error().exit_status == 210

    def test_json_says_the_same(self):
        """
        A program that reads the message gets the same parts.
        """
        assert an_error().as_json() == {
            "error": "M210",
            "title": TITLES["M210"],
            "happened": "Layer 3 has shape (2,).",
            "because": "It belongs to another plan.",
            "remedies": ["check", "or wait"],
        }


class TestTravel:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_error_survives_being_packed(self, protocol):
        """
        Every part is there after the way back from another process.
        """
        back = pickle.loads(pickle.dumps(an_error(), protocol))

        assert (str(back), back.exit_status, back.as_json()) == (str(an_error()), 210, an_error().as_json())

    def test_error_in_a_worker_reaches_the_person_whole(self):
        """
        An error raised in a worker process arrives as the same message.
        """
        with (
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
            pytest.raises(FederadError) as error,
        ):
            pool.submit(fail_in_a_worker).result()

        assert str(error.value) == str(an_error())
