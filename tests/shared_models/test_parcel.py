"""Bytes inside Flower's messages, or only their name."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from shared_models.errors import FederadError
from shared_models.parcel import (
    PARCEL_LIMIT,
    STYPE,
    Reference,
    Trouble,
    pack,
    pack_reference,
    pack_trouble,
    trouble_in,
    unpack,
)

NAME = "ab" * 32


@pytest.fixture(autouse=True)
def _task():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def message_with(content: RecordDict) -> Message:
    return Message(content, 1, "query")


class TestParcel:
    @pytest.mark.parametrize("data", [b"", b"\0", bytes(range(256)) * 100])
    def test_bytes_come_out_as_they_went_in(self, data):
        """
        Whatever they are.
        """
        assert unpack(message_with(pack(data))) == data

    def test_name_comes_out_as_it_went_in(self):
        """
        A reference is the hash and the number of bytes.
        """
        assert unpack(message_with(pack_reference(Reference(NAME, 500 * 2**20)))) == Reference(NAME, 500 * 2**20)

    @pytest.mark.parametrize(
        "content",
        [
            RecordDict(),
            RecordDict({"other": ConfigRecord({"x": 1})}),
            RecordDict({"parcel": ConfigRecord({"bytes": b"abc"})}),
            RecordDict({"parcel": ArrayRecord({"bytes": Array("uint8", (1,), "numpy.ndarray", b"a")})}),
            RecordDict({"parcel": ArrayRecord({"other": Array("uint8", (1,), STYPE, b"a")})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME, "bytes": 0})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME, "bytes": -1})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME, "bytes": True})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME, "bytes": PARCEL_LIMIT + 1})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME, "bytes": 1.0})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME, "bytes": 1, "more": 1})}),
            RecordDict({"reference": ConfigRecord({"sha256": "../../etc/passwd", "bytes": 1})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME.upper(), "bytes": 1})}),
            RecordDict({"reference": ConfigRecord({"sha256": NAME + "\n", "bytes": 1})}),
            RecordDict({"reference": ArrayRecord({"bytes": Array("uint8", (1,), STYPE, b"a")})}),
        ],
    )
    def test_anything_else_is_refused(self, content):
        """
        M211 for a message that neither holds bytes of ours nor names them properly.
        """
        with pytest.raises(FederadError, match="M211"):
            unpack(message_with(content))


class TestTrouble:
    @pytest.mark.parametrize("word", get_args(Trouble))
    def test_word_comes_out_as_it_went_in(self, word):
        """
        A courier that brings no answer says why, in a word of the list.
        """
        reply = pack_trouble(word, message_with(pack(b"")))

        assert reply.has_error()
        assert trouble_in(reply) == word

    def test_other_words_are_none_of_ours(self):
        """
        Neither Flower's own text nor an answer is a word.
        """
        asked = message_with(pack(b""))

        assert trouble_in(Message(Error(2, "<class 'ValueError'>:<'Jane Doe'>"), reply_to=asked)) is None
        assert trouble_in(Message(Error(5), reply_to=asked)) is None
        assert trouble_in(Message(pack(b""), reply_to=asked)) is None


def test_whoever_carries_parcels_loads_no_torch():
    """
    The parcel is all that a courier needs of the shared parts, and starts in no time.
    """
    code = "import shared_models.parcel, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
