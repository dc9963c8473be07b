"""Sites that misbehave on purpose, around real stations: what a server must survive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import make_client_app
from client.station import Station
from shared_models.messages import Answer, decode_answer, encode_answer

Tamper = Callable[[Answer], Answer | bytes]


class TamperedStation:
    """A real station whose answers are changed on the way out."""

    def __init__(self, station: Station, tamper: Tamper) -> None:
        self._station, self._tamper = station, tamper

    def answer(self, data: bytes) -> bytes:
        answer = decode_answer(self._station.answer(data))
        if answer.question is None or answer.question.kind != "train":
            return encode_answer(answer)
        tampered = self._tamper(answer)
        return tampered if isinstance(tampered, bytes) else encode_answer(tampered)


class RaisingStation:
    """A courier that falls over with a patient's name on its lips."""

    def answer(self, data: bytes) -> bytes:
        raise RuntimeError("patient Jane Doe, born 1970")


def with_update(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Tamper:
    """Change the update and leave the rest."""
    return lambda answer: replace(answer, update=change(dict(answer.update)))


def largest_array(change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    """Change the largest array of the update."""

    def apply(update: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = max(update, key=lambda key: update[key].size)
        return update | {name: change(update[name].copy())}

    return with_update(apply)


class ListGrid(Grid):
    """Stations in this process, answering in the order given; the order of arrival is the test's to choose."""

    def __init__(self, stations: list[object], order: list[int] | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.stations, self._order = stations, order or list(range(len(stations)))
        self._waiting: dict[str, Message] = {}
        self.most_waiting_replies = 0

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args, **kwargs) -> Message:
        return Message(*args, **kwargs)

    def get_node_ids(self):
        return list(range(1, len(self.stations) + 1))

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"{message.metadata.dst_node_id}-{len(self._waiting)}"
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids):
        wanted = set(message_ids)
        ready = [(self._order.index(m.metadata.dst_node_id - 1), i) for i, m in self._waiting.items() if i in wanted]
        if not ready:
            return []
        message = self._waiting.pop(min(ready)[1])
        station = self.stations[message.metadata.dst_node_id - 1]
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=UserConfig(),
            state=RecordDict(),
            run_config=UserConfig(),
        )
        try:
            return [make_client_app(lambda _: station)(message, context)]
        except Exception:
            return [Message(Error(2), reply_to=message)]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def opened(folders: list[Path]) -> list[Station]:
    """The stations in these folders."""
    return [Station(folder) for folder in folders]
