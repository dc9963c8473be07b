"""The courier's hands: what they carry, what they say when they carry nothing, and what they never hold."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from deployed import ROOT, Operator, ask_of, make_site, running_station
from depots import FolderDepot
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import COURIER_FOLDER, STATION_SOCKET, make_client_app, make_deployed_app
from client.service import StationServer
from client.station import Station
from shared_models.messages import decode_answer
from shared_models.parcel import INLINE_LIMIT, Reference, pack, pack_reference, trouble_in, unpack
from shared_models.wire import CHUNK_BYTES


class Parrot:
    """A station that gives back what it heard, as often as it is told."""

    name = "parrot"
    busy_with = None
    is_broken = False

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def answer(self, data: bytes) -> bytes:
        return data * self.times

    def offer(self, data: bytes) -> None: ...

    def outbox(self, told: int) -> tuple[int, list[bytes]]:
        return told, []


@pytest.fixture(autouse=True)
def _task():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture
def depot(tmp_path):
    folder = tmp_path / "depot"
    folder.mkdir()
    return folder


def context(socket: Path, folder: Path) -> Context:
    config = {STATION_SOCKET: str(socket), COURIER_FOLDER: str(folder)}
    return Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})


def carried(content: RecordDict, socket: Path, folder: Path) -> Message:
    message = Message(content, 1, "query")
    message.metadata.__dict__["_message_id"] = "m"
    return make_deployed_app(FolderDepot)(message, context(socket, folder))


class TestCarrying:
    def test_short_question_and_answer_travel_inside(self, tmp_path, depot):
        """
        Below the limit, all bytes are in Flower's messages.
        """
        with StationServer(Parrot(), tmp_path / "s.sock"):
            reply = carried(pack(b"abc" * 10**6), tmp_path / "s.sock", depot)

        assert unpack(reply) == b"abc" * 10**6
        assert not list(depot.iterdir())

    def test_answer_of_the_limit_travels_inside_and_one_byte_more_does_not(self, tmp_path, depot):
        """
        A long answer lies in the depot, and the message holds its name.
        """
        with StationServer(Parrot(), tmp_path / "s.sock"):
            inside = unpack(carried(pack(bytes(INLINE_LIMIT)), tmp_path / "s.sock", depot))
            named = unpack(carried(pack(bytes(INLINE_LIMIT + 1)), tmp_path / "s.sock", depot))

        assert inside == bytes(INLINE_LIMIT)
        assert named == Reference(hashlib.sha256(bytes(INLINE_LIMIT + 1)).hexdigest(), INLINE_LIMIT + 1)
        assert (depot / named.sha256).read_bytes() == bytes(INLINE_LIMIT + 1)

    def test_question_that_is_named_is_fetched(self, tmp_path, depot):
        """
        The station gets the bytes that lie in the depot.
        """
        question = bytes(range(256)) * 10_000
        name = hashlib.sha256(question).hexdigest()
        (depot / name).write_bytes(question)
        with StationServer(Parrot(2), tmp_path / "s.sock"):
            reply = carried(pack_reference(Reference(name, len(question))), tmp_path / "s.sock", depot)

        assert unpack(reply) == question * 2


class TestTrouble:
    def test_no_station_is_a_word(self, tmp_path, depot, monkeypatch):
        """
        Nobody at the socket: the server hears "station-away" and can ask again.
        """
        monkeypatch.setattr("client.app.PATIENCE_S", 0.3)
        assert trouble_in(carried(pack(b"x"), tmp_path / "s.sock", depot)) == "station-away"

    def test_message_that_holds_nothing_of_ours_is_a_word(self, tmp_path, depot):
        """
        The station is not even asked.
        """
        assert trouble_in(carried(RecordDict(), tmp_path / "s.sock", depot)) == "unreadable"

    def test_depot_that_fails_is_a_word(self, tmp_path, depot):
        """
        A parcel that cannot be fetched or left: "link-broken", and the station heard nothing of half a question.
        """
        station = Parrot(5 * 10**7)
        with StationServer(station, tmp_path / "s.sock"):
            missing = carried(pack_reference(Reference("a" * 64, 5)), tmp_path / "s.sock", depot)
            (depot / "new").mkdir()
            full = carried(pack(b"x"), tmp_path / "s.sock", depot)

        assert trouble_in(missing) == "link-broken"
        assert trouble_in(full) == "failed"

    @pytest.mark.parametrize("folder", [None, 7])
    def test_anything_else_is_a_word_without_text(self, tmp_path, depot, folder):
        """
        Whatever goes wrong in the courier itself: one word, and nothing of the exception.
        """
        app = make_deployed_app(FolderDepot)
        message = Message(pack(b"x"), 1, "query")
        message.metadata.__dict__["_message_id"] = "m"
        empty = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        reply = app(message, empty)

        assert trouble_in(reply) == "failed"
        assert "station-socket" not in repr(reply.error)

    def test_station_in_this_process_that_raises_is_a_word(self):
        """
        Also in a simulation no text of an exception becomes a message.
        """

        class Raising:
            def answer(self, data):
                raise RuntimeError("patient Jane Doe")

        message = Message(pack(b"x"), 1, "query")
        message.metadata.__dict__["_message_id"] = "m"
        reply = make_client_app(lambda _: Raising())(message, context(Path("/s"), Path("/c")))

        assert trouble_in(reply) == "failed"
        assert "Jane" not in repr(reply.error)


class TestProcess:
    """What Flower starts for each message."""

    CODE = textwrap.dedent("""
        import json, re, sys
        from pathlib import Path
        sys.path[:0] = sys.argv[1].split(":")
        from flwr.app import Message
        from flwr.supercore.task_identity import TaskIdentity
        from depots import FolderDepot
        from flwr.app import Context, RecordDict
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        from client.app import make_deployed_app
        from shared_models.parcel import Reference, pack, pack_reference, unpack
        socket, depot, question = Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
        content = pack_reference(Reference(*question)) if isinstance(question, list) else pack(question.encode())
        message = Message(content, 1, "query")
        message.metadata.__dict__["_message_id"] = "m"
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        before = peak()
        config = {"station-socket": str(socket), "courier-folder": str(depot)}
        context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
        reply = make_deployed_app(FolderDepot)(message, context)
        answer = None if reply.has_error() else unpack(reply)
        print(json.dumps({
            "error": reply.error.reason if reply.has_error() else None,
            "reference": [answer.sha256, answer.n_bytes] if isinstance(answer, Reference) else None,
            "answer": answer.hex() if isinstance(answer, bytes) else None,
            "torch": "torch" in sys.modules,
            "before": before,
            "peak": peak(),
        }))
    """)

    def test_nothing_of_torch_is_loaded_for_a_whole_round_trip(self, tmp_path, depot):
        """
        A process that imports the installed app and carries short and long parcels never loads torch, a reader of images
        or a part of the station.
        """
        code = textwrap.dedent("""
            import sys, hashlib
            from pathlib import Path
            from flwr.app import Context, Message, RecordDict
            from flwr.supercore.task_identity import TaskIdentity
            import client.app
            import client.link
            from shared_models.parcel import pack, unpack
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
            config = {"station-socket": sys.argv[1], "courier-folder": sys.argv[2]}
            message = Message(pack(b"abc"), 1, "query")
            message.metadata.__dict__["_message_id"] = "m"
            context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
            reply = client.app.app(message, context)
            assert unpack(reply) == b"abcabc", reply
            heavy = {"torch", "monai", "pydicom", "nibabel", "client.station", "client.data", "safetensors"}
            print(sorted(heavy & set(sys.modules)))
        """)
        with StationServer(Parrot(2), tmp_path / "s.sock"):
            done = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / "s.sock"), str(depot)],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip

        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"

    @pytest.mark.slow
    def test_model_of_500_megabytes_goes_through_a_small_courier(self, tmp_path, depot):
        """
        500 MB there and 500 MB back: the process that carries them never holds more than a few chunks above what it needs
        for the 32 MiB that might have been short, and the bytes are right.
        """
        question, name = depot / "question", hashlib.sha256()
        with question.open("wb") as file:
            for number in range(500):
                piece = number.to_bytes(2, "big") * (CHUNK_BYTES // 2)
                name.update(piece)
                file.write(piece)
        question.rename(depot / name.hexdigest())
        with StationServer(Parrot(), tmp_path / "s.sock"):
            told = self._carried_elsewhere(tmp_path / "s.sock", depot, [name.hexdigest(), 500 * CHUNK_BYTES])

        assert told["error"] is None
        assert told["reference"] == [name.hexdigest(), 500 * CHUNK_BYTES]
        assert told["torch"] is False
        assert told["peak"] - told["before"] < 120 * 2**20
        assert told["peak"] < 250 * 2**20

    @pytest.mark.slow
    def test_real_station_answers_through_it(self, tmp_path, hospitals, smoke_plan, depot):
        """
        A question to a real station in a process of its own trains there, and the reply is its answer.
        """
        site = make_site(tmp_path / "site", hospitals[0].folder, Operator())
        Station(site.station).approve(smoke_plan)
        with running_station(site):
            reply = carried(pack(ask_of(smoke_plan)), site.socket, depot)

        answer = decode_answer(unpack(reply))
        assert (answer.site, answer.refusal) == ("site-1", None)

    def _carried_elsewhere(self, socket: Path, depot: Path, question: object) -> dict:
        paths = ":".join(map(str, (ROOT, ROOT / "tests")))
        done = subprocess.run(
            [sys.executable, "-c", self.CODE, paths, str(socket), str(depot), json.dumps(question)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
