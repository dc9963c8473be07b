"""The station behind its socket: real sockets, real processes."""

from __future__ import annotations

import os
import signal
import socket as sockets
import stat
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest
from deployed import (
    FEDERAD_SITE,
    ROOT,
    Operator,
    ask_of,
    asked,
    is_listening,
    longer,
    make_site,
    running_station,
    start_station,
    until,
)

from client.audit import FILE, AuditLog
from client.service import MOST_WAITING, StationServer
from client.station import Station
from client.stub import SERVICE, StationAwayError, StationBusyError, StationStub
from shared_models.errors import FederadError
from shared_models.messages import decode_answer
from shared_models.parcel import PARCEL_LIMIT
from shared_models.wire import CHUNK_BYTES, chunks, stream, unary


class Parrot:
    """A station that says what it heard, when it is let."""

    name = "parrot"
    busy_with = None
    is_broken = False

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.let = threading.Event()
        self.let.set()

    def answer(self, data: bytes) -> bytes:
        self.heard.append(len(data))
        self.let.wait(30)
        return data[::-1]

    def offer(self, data: bytes) -> None:
        raise ValueError("Jane Doe, 1970-01-01")

    def outbox(self, told: int) -> tuple[int, list[bytes]]:
        return told, []


@pytest.fixture
def parrot(tmp_path):
    station = Parrot()
    with StationServer(station, tmp_path / "s.sock"):
        yield station, tmp_path / "s.sock"
        station.let.set()


@pytest.fixture(scope="module")
def operator():
    return Operator()


@pytest.fixture
def site(tmp_path, hospitals, operator):
    return make_site(tmp_path / "site", hospitals[0].folder, operator)


@pytest.fixture
def slow_plan(smoke_plan):
    """A plan whose round takes some seconds."""
    return longer(smoke_plan, epochs=40)


class TestSocket:
    @pytest.mark.parametrize("n_bytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES])
    def test_bytes_arrive_as_they_were_sent(self, parrot, n_bytes):
        """
        Any number of bytes comes through, in pieces that a small message holds.
        """
        data = os.urandom(n_bytes)
        with StationStub(parrot[1]) as stub:
            pieces = list(stub.answer(chunks(data)))

        assert b"".join(pieces) == data[::-1]
        assert all(len(piece) <= CHUNK_BYTES for piece in pieces)

    def test_socket_is_for_its_group_and_nobody_else(self, parrot):
        """
        The file permissions are the lock: 0660.
        """
        mode = parrot[1].stat().st_mode

        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660

    def test_path_longer_than_the_kernel_takes_works(self, tmp_path):
        """
        A site may lie deep in folders with long names.
        """
        folder = tmp_path / ("a" * 100) / ("b" * 100)
        folder.mkdir(parents=True)
        with StationServer(Parrot(), folder / "station.sock"):
            assert asked(folder / "station.sock", b"abc") == b"cba"

    def test_message_longer_than_a_chunk_is_not_taken(self, parrot):
        """
        gRPC's limit is small, so that no single message fills the memory.
        """
        with StationStub(parrot[1]) as stub, pytest.raises(StationAwayError):
            list(stub.answer(iter([bytes(3 * CHUNK_BYTES)])))

        assert parrot[0].heard == []

    def test_more_than_the_longest_question_is_stopped(self, parrot, monkeypatch):
        """
        A question without end is cut off with a number.
        """
        monkeypatch.setattr("client.service.PARCEL_LIMIT", 3 * CHUNK_BYTES)
        with StationStub(parrot[1]) as stub, pytest.raises(FederadError, match="M213"):
            list(stub.answer(bytes(CHUNK_BYTES) for _ in range(10**6)))

        assert PARCEL_LIMIT > 2**32

    def test_text_of_trouble_stays_inside(self, parrot):
        """
        An exception behind the socket ends the call, and its text does not come through.
        """
        with StationStub(parrot[1]) as stub:
            with pytest.raises(grpc.RpcError) as raw:
                unary(stub._channel, f"/{SERVICE}/Offer")(b"{}")
            with pytest.raises(StationAwayError):
                stub.offer(b"{}")

            assert raw.value.code() is grpc.StatusCode.INTERNAL
            assert "Jane" not in str(raw.value)
            assert stub.status()["site"] == "parrot"

    def test_numbered_error_about_the_data_stays_inside(self, tmp_path):
        """
        Of the numbered errors, only those about what the courier itself brought may pass.
        """

        class Declining(Parrot):
            def answer(self, data):
                raise FederadError("C162", happened="/data/Jane", because="", remedies=())

        with StationServer(Declining(), tmp_path / "s.sock"), StationStub(tmp_path / "s.sock") as stub:
            with pytest.raises(grpc.RpcError) as raw:
                list(stream(stub._channel, f"/{SERVICE}/Answer")(iter([b"a", b""])))
            assert "Jane" not in str(raw.value)

    @pytest.mark.parametrize("pieces", [[], [b"half a question"]])
    def test_question_without_an_end_is_no_question(self, parrot, pieces):
        """
        Whoever went away in the middle has asked nothing.
        """
        with StationStub(parrot[1]) as stub, pytest.raises(grpc.RpcError):
            list(stream(stub._channel, f"/{SERVICE}/Answer")(iter(pieces)))

        assert parrot[0].heard == []

    def test_raised_while_asking_reaches_the_asker(self, parrot):
        """
        What goes wrong while the question is fetched is not lost in gRPC's thread.
        """

        def broken():
            yield b"a"
            raise KeyError("link")

        with StationStub(parrot[1]) as stub, pytest.raises(KeyError, match="link"):
            list(stub.answer(broken()))

        assert parrot[0].heard == []
        assert asked(parrot[1], b"ab") == b"ba"


class TestTurns:
    def test_question_is_read_when_its_turn_comes(self, parrot):
        """
        While one question is worked on, the next stays with its asker: the station holds one at a time.
        """
        station, socket = parrot
        station.let.clear()
        first = threading.Thread(target=asked, args=(socket, b"first"))
        first.start()
        until(lambda: station.heard == [5])
        read = []

        def second():
            read.append(1)
            yield b"second one"

        with StationStub(socket) as stub:
            answer = stub.answer(second())
            asking = threading.Thread(target=lambda: read.append(b"".join(answer)))
            asking.start()
            time.sleep(0.5)
            assert read == []
            station.let.set()
            asking.join(10)
            first.join(10)

        assert read == [1, b"eno dnoces"]

    def test_asker_that_goes_away_gives_its_turn_back(self, parrot):
        """
        An asker that dies before, while or after it is heard is in nobody's way.
        """
        station, socket = parrot
        for begin in (0, 1):
            station.let.set()
            stub = StationStub(socket)
            held = threading.Event()

            def never(held=held, begin=begin):
                yield from [b"x"] * begin
                held.wait(10)

            answer = stub.answer(never())
            thread = threading.Thread(target=_swallow, args=(answer,))
            thread.start()
            time.sleep(0.3)
            stub.close()
            thread.join(5)
            held.set()

            assert asked(socket, b"ab") == b"ba"

    def test_crowd_is_turned_away(self, parrot):
        """
        Beyond a few waiting questions the station says that it is busy, and still tells how it is.
        """
        station, socket = parrot
        station.let.clear()
        crowd = [threading.Thread(target=asked, args=(socket, b"x")) for _ in range(MOST_WAITING)]
        for one in crowd:
            one.start()
        until(lambda: station.heard == [1])
        time.sleep(0.5)

        with StationStub(socket) as stub:
            with pytest.raises(StationBusyError):
                list(stub.answer(chunks(b"one more")))
            assert stub.status()["site"] == "parrot"
        station.let.set()
        for one in crowd:
            one.join(10)
        assert len(station.heard) == MOST_WAITING


class TestWay:
    def test_dead_socket_is_replaced(self, tmp_path):
        """
        What a killed process left is no obstacle.
        """
        with sockets.socket(sockets.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "s.sock"))
        with StationServer(Parrot(), tmp_path / "s.sock"):
            assert asked(tmp_path / "s.sock", b"ab") == b"ba"

    def test_socket_where_somebody_listens_is_left_alone(self, parrot):
        """
        Two stations never share a socket, and the first goes on.
        """
        with pytest.raises(FederadError, match="another process listens") as error, StationServer(Parrot(), parrot[1]):
            pass

        assert error.value.code == "C157"
        assert asked(parrot[1], b"ab") == b"ba"

    def test_file_in_the_way_is_left_alone(self, tmp_path):
        """
        Something that is no socket is never removed.
        """
        (tmp_path / "s.sock").write_text("precious")
        with pytest.raises(FederadError, match="C157"), StationServer(Parrot(), tmp_path / "s.sock"):
            pass

        assert (tmp_path / "s.sock").read_text() == "precious"

    def test_missing_folder_is_named(self, tmp_path):
        """
        C157 says that the folder is missing.
        """
        with (
            pytest.raises(FederadError, match="folder is missing"),
            StationServer(Parrot(), tmp_path / "no" / "s.sock"),
        ):
            pass

    def test_nobody_at_the_socket_is_noticed(self, tmp_path):
        """
        A station that is not there is away, within the time given.
        """
        with StationStub(tmp_path / "s.sock") as stub:
            began = time.monotonic()
            with pytest.raises(StationAwayError):
                stub.wait(0.5)
            assert time.monotonic() - began < 5


class TestProcess:
    @pytest.mark.slow
    def test_same_bytes_as_the_station_itself_gives(self, site, smoke_plan):
        """
        A question through the socket trains once and gets the bytes that are in the store, as often as it is asked.
        """
        Station(site.station).approve(smoke_plan)
        question = ask_of(smoke_plan)
        with running_station(site):
            first = asked(site.socket, question)
            again = asked(site.socket, question)
        direct = Station(site.station).answer(question)

        assert decode_answer(first).refusal is None
        assert first == again == direct
        lines = [entry for entry in AuditLog(site.station / FILE).entries() if entry["event"] == "answer"]
        assert [line["again"] for line in lines] == [False, True, True]
        assert {line["n_bytes"] for line in lines} == {len(first)}

    @pytest.mark.slow
    def test_second_process_for_one_folder_is_refused(self, site):
        """
        The second ends at once with 156 and names the first, which goes on.
        """
        with running_station(site) as first:
            second = subprocess.run(
                [*FEDERAD_SITE, "station", "--site", str(site.root)],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert second.returncode == 156
            assert f"process {first.pid}" in second.stderr
            assert is_listening(site.socket)

    @pytest.mark.slow
    def test_killed_while_training_answers_when_asked_again(self, site, slow_plan, hospitals, operator, tmp_path):
        """
        SIGKILL in the middle of a round loses that round: the asker hears that the station is away, a new process takes
        the same place, and the same question gets the answer that an undisturbed station gives.
        """
        Station(site.station).approve(slow_plan)
        question = ask_of(slow_plan)
        outcome: list[object] = []
        with running_station(site) as process:
            asking = threading.Thread(target=_note, args=(outcome, site.socket, question))
            asking.start()
            until(lambda: _progress(site.socket) > 0)
            process.send_signal(signal.SIGKILL)
            asking.join(20)
        assert isinstance(outcome[0], StationAwayError)
        assert site.socket.exists()

        with running_station(site):
            after = asked(site.socket, question)
        other = make_site(tmp_path / "other", hospitals[0].folder, operator)
        (other.station / "secret").write_bytes((site.station / "secret").read_bytes())
        undisturbed = Station(other.station)
        undisturbed.approve(slow_plan)

        assert decode_answer(after).refusal is None
        assert after == undisturbed.answer(question)
        assert AuditLog(site.station / FILE).verify().n > 0

    @pytest.mark.slow
    def test_asker_killed_while_training_gets_the_answer_later(self, site, slow_plan):
        """
        A courier that dies in the middle of a round costs nothing: the station trains to the end, and whoever asks the
        same again gets that answer.
        """
        Station(site.station).approve(slow_plan)
        question = ask_of(slow_plan)
        with running_station(site):
            stub = StationStub(site.socket)
            asking = threading.Thread(target=_swallow, args=(stub.answer(chunks(question)),))
            asking.start()
            until(lambda: _progress(site.socket) > 0)
            stub.close()
            asking.join(5)
            answer = asked(site.socket, question)

        lines = [entry["again"] for entry in AuditLog(site.station / FILE).entries() if entry["event"] == "answer"]
        assert decode_answer(answer).refusal is None
        assert lines == [False, True]

    @pytest.mark.slow
    def test_progress_comes_in_tenths_while_training_goes_on(self, site, slow_plan):
        """
        The socket tells how far a round is, in at most ten steps that rise, and never a number of patients or steps.
        """
        Station(site.station).approve(slow_plan)
        seen: list[dict[str, int]] = []
        with running_station(site):
            asking = threading.Thread(target=asked, args=(site.socket, ask_of(slow_plan)))
            asking.start()
            told = 0
            while asking.is_alive():
                with StationStub(site.socket) as stub:
                    told, notices = stub.outbox(told)
                    assert stub.status()["site"] == "site-1"
                seen += [notice for notice in notices if notice["kind"] == "progress"]
                time.sleep(0.02)

        ticks = [notice["done"] for notice in seen]
        assert 1 < len(ticks) <= 10
        assert ticks == sorted(set(ticks))
        assert {(notice["total"], notice["round"], notice["run"]) for notice in seen} == {(10, 1, "run-1")}

    @pytest.mark.slow
    def test_what_questions_need_is_imported_before_the_first_one(self, site):
        """
        Nobody has asked, and tasks and accountants are in memory.
        """
        log = site.station / "logs" / "station.log"
        with running_station(site) as process:
            until(lambda: "All that questions need is imported." in log.read_text(), process)

    @pytest.mark.slow
    def test_told_to_stop_it_leaves_nothing_behind(self, site):
        """
        SIGTERM ends the process with 0, and the socket is gone.
        """
        with running_station(site) as process:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert not site.socket.exists()

    @pytest.mark.slow
    def test_folder_without_a_site_is_named(self, tmp_path):
        """
        A station without a configuration ends with a number.
        """
        process = start_station(make_empty(tmp_path))
        assert process.wait(30) == 143


def make_empty(folder: Path):
    from client.folder import SiteFolder

    return SiteFolder(folder)


def _swallow(answer) -> None:
    try:
        list(answer)
    except Exception:
        return


def _note(outcome: list[object], socket: Path, question: bytes) -> None:
    try:
        outcome.append(asked(socket, question))
    except Exception as error:
        outcome.append(error)


def _progress(socket: Path) -> int:
    with StationStub(socket) as stub:
        return sum(notice["kind"] == "progress" for notice in stub.outbox()[1])
