"""What waits to be told, until somebody says that it arrived."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from client.outbox import MOST_AT_ONCE, Outbox


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path)


class TestOutbox:
    def test_notices_come_in_order_and_stay_until_told(self, outbox, tmp_path):
        """
        As often as somebody looks, also after a restart; what arrived is gone.
        """
        for body in (b"one", b"two", b"three"):
            outbox.put(body)
        last, bodies = outbox.waiting()
        assert bodies == [b"one", b"two", b"three"]
        assert Outbox(tmp_path).waiting() == (last, bodies)

        outbox.put(b"four")
        assert Outbox(tmp_path).waiting(last)[1] == [b"four"]

    def test_newest_of_a_topic_takes_the_place_of_the_one_before(self, outbox):
        """
        Of progress only the newest is worth telling; other notices keep their places.
        """
        outbox.put(b"10 %", topic="run-1")
        outbox.put(b"approved")
        outbox.put(b"20 %", topic="run-1")
        outbox.put(b"10 %", topic="run-2")

        assert outbox.waiting()[1] == [b"approved", b"20 %", b"10 %"]

    def test_number_of_one_that_was_told_is_never_used_again(self, outbox):
        """
        A notice that comes later is not taken for one that was told, even when the outbox was empty in between.
        """
        outbox.put(b"one")
        last, _ = outbox.waiting()
        outbox.waiting(last)
        outbox.put(b"two")

        assert outbox.waiting(last)[1] == [b"two"]

    def test_empty_outbox_keeps_its_place(self, outbox):
        """
        Nothing waits: the number stays what the courier said.
        """
        assert outbox.waiting(7) == (7, [])

    def test_few_are_handed_out_at_once(self, outbox):
        """
        After a long time away they come in portions.
        """
        for number in range(MOST_AT_ONCE + 1):
            outbox.put(str(number).encode())
        last, first = outbox.waiting()
        assert len(first) == MOST_AT_ONCE
        assert outbox.waiting(last)[1] == [str(MOST_AT_ONCE).encode()]

    def test_several_writers_lose_nothing(self, tmp_path):
        """
        Station and command write at the same time.
        """
        Outbox(tmp_path)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: Outbox(tmp_path).put(str(n).encode()), range(50)))
        assert sorted(int(body) for body in Outbox(tmp_path).waiting()[1]) == list(range(50))
