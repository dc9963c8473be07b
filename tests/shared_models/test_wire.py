"""How bytes travel: chunks, limits, and errors that keep their number. On a real socket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models import wire
from shared_models.errors import FederadError
from shared_models.wire import CHUNK_BYTES, chunks, error_in, joined, stream, stream_handler, unary, unary_handler


def no(request, context):
    raise FederadError("S184", happened="No (50 %).", because="So.", remedies=("ask again", "or not"))


def fall_over(request, context):
    raise RuntimeError("patient Jane Doe, born 1970")


def echo(parts, context):
    yield from parts


def half(parts, context):
    yield next(parts)
    no(parts, context)


METHODS = {
    "No": lambda channel: unary(channel, "/a.B/No")(b""),
    "Half": lambda channel: list(stream(channel, "/a.B/Half")(iter([b"x"]))),
    "Fall": lambda channel: unary(channel, "/a.B/Fall")(b""),
    "FallStream": lambda channel: list(stream(channel, "/a.B/FallStream")(iter([b""]))),
}


@pytest.fixture
def channel(tmp_path):
    server = grpc.server(ThreadPoolExecutor(4))
    handlers = {
        "Reverse": unary_handler(lambda request, _: request[::-1]),
        "No": unary_handler(no),
        "Fall": unary_handler(fall_over),
        "Echo": stream_handler(echo),
        "Half": stream_handler(half),
        "FallStream": stream_handler(fall_over),
    }
    server.add_generic_rpc_handlers((wire.service("a.B", handlers),))
    address = f"unix:{tmp_path / 's'}"
    server.add_insecure_port(address)
    server.start()
    with grpc.insecure_channel(address) as channel:
        yield channel
    server.stop(None).wait()


class TestChunks:
    @given(st.binary(max_size=100), st.integers(1, 40))
    def test_pieces_together_are_the_whole(self, data, length):
        """
        Cut and joined again, bytes are the same, and no piece is longer than the longest.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wire, "CHUNK_BYTES", length)
            pieces = list(chunks(data))

        assert joined(pieces, limit=len(data)) == data
        assert all(len(piece) <= length for piece in pieces)

    def test_limit_stops_an_endless_sender(self):
        """
        What is too long is not read to its end, so it cannot fill the memory.
        """
        taken = []

        def endless():
            while True:
                taken.append(1)
                yield bytes(10)

        with pytest.raises(FederadError) as error:
            joined(endless(), limit=25)

        assert error.value.code == "M213"
        assert len(taken) == 3

    def test_limit_itself_is_allowed(self):
        """
        Exactly as long as allowed is allowed.
        """
        assert joined([b"ab", b"c"], limit=3) == b"abc"


class TestCalls:
    def test_bytes_go_and_come(self, channel):
        """
        One message each way, any bytes.
        """
        assert unary(channel, "/a.B/Reverse")(b"\x00ab") == b"ba\x00"

    def test_stream_longer_than_any_message_goes_and_comes(self, channel):
        """
        Chunks of the longest kind pass, eight times what one message may hold.
        """
        data = bytes(range(256)) * (32 * CHUNK_BYTES // 256)

        assert joined(stream(channel, "/a.B/Echo")(chunks(data)), limit=len(data)) == data

    @pytest.mark.parametrize("method", ["No", "Half"])
    def test_error_arrives_as_the_same_error(self, channel, method):
        """
        Number, words and remedies survive the way, also in the middle of a stream.
        """
        with pytest.raises(grpc.RpcError) as failure:
            METHODS[method](channel)
        error = error_in(failure.value)

        assert error is not None
        assert (error.code, error.happened, error.because) == ("S184", "No (50 %).", "So.")
        assert error.remedies == ("ask again", "or not")

    @pytest.mark.parametrize("method", ["Fall", "FallStream"])
    def test_text_of_any_other_exception_stays_at_home(self, channel, method):
        """
        Unexpected trouble reaches the caller without its words.
        """
        with pytest.raises(grpc.RpcError) as failure:
            METHODS[method](channel)

        assert failure.value.code() == grpc.StatusCode.INTERNAL
        assert "Jane" not in failure.value.details() + failure.value.debug_error_string()
        assert error_in(failure.value) is None

    @pytest.mark.parametrize(
        "details",
        [
            None,
            "",
            "upstream connect error",
            "[1]",
            '{"federad": 3}',
            '{"federad": {"error": "S184"}}',
            '{"federad": {"error": "X999", "happened": "", "because": "", "remedies": []}}',
            '{"federad": {"error": "S184", "happened": 1, "because": "", "remedies": []}}',
            '{"federad": {"error": "S184", "happened": "\\u001b[2J", "because": "", "remedies": []}}',
        ],
    )
    def test_words_of_somebody_else_are_no_error_of_ours(self, details):
        """
        A proxy's words, another form, or signs that would move a terminal's cursor are not shown as the other side's.
        """

        class Failure(grpc.RpcError):
            def details(self):
                return details

        assert error_in(Failure()) is None
