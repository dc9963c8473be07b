"""Flower's grid as it behaves in a deployment, without its sockets: nodes come, go and are asked again.

The stations behind it answer with arithmetic in place of training, so that a hundred runs take a minute; what the server
makes of the answers is the real thing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from shared_models.messages import Answer, decode_ask, encode_answer
from shared_models.parcel import pack, pack_trouble, unpack
from shared_models.seeds import generator

NODE_UNAVAILABLE = 5


class ArithmeticStation:
    """Answers every question with numbers that depend on it, on the site's name and on nothing else.

    Parameters
    ----------
    diary
        A file to which each question is added, over the deaths of processes.
    """

    def __init__(self, name: str, diary: Path | None = None) -> None:
        self.name, self._diary = name, diary
        self.n_answered = 0

    def answer(self, data: bytes) -> bytes:
        ask = decode_ask(data)
        question = ask.question
        if self._diary is not None:
            with self._diary.open("a") as stream:
                stream.write(json.dumps([question.round, question.kind, question.weights_sha256]) + "\n")
        self.n_answered += 1
        rng = generator(ask.seed, self.name, question.round, question.kind, question.weights_sha256)
        update = {
            name: rng.normal(0, 0.01, array.shape).astype(np.float32)
            for name, array in ask.weights.items()
            if question.kind == "train"
        }
        counts = {"measured": 2} | ({"trained": 1 + len(self.name) % 3} if question.kind == "train" else {})
        metrics = {"dice": float(rng.random()), "training_loss": 0.5} if question.kind == "train" else {"dice": 0.5}
        return encode_answer(Answer(self.name, question, None, update, metrics, counts))


@dataclass
class Node:
    """A SuperNode and the station behind it."""

    node_id: int
    station: object
    is_online: bool = True
    last_activated_at: str = "first"
    replies: Callable[[Message], Message | None] | None = None
    """How a message is answered instead; None from it means not yet."""

    asked: list[Message] = field(default_factory=list)

    def reconnect(self) -> None:
        self.is_online, self.last_activated_at = True, self.last_activated_at + "+"


class FlowerGrid(Grid):
    """Nodes that are online or not; a message to one that is not comes back as Flower's error 5.

    Parameters
    ----------
    on_pull
        Called before each look for replies or nodes: where a test lets things happen.
    """

    def __init__(self, nodes: list[Node], on_pull: Callable[[], None] = lambda: None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = {node.node_id: node for node in nodes}
        self.on_pull = on_pull
        self._messages: dict[str, Message] = {}

    def get_nodes(self):
        self.on_pull()
        return [node for node in self.nodes.values() if node.is_online]

    def get_node_ids(self):
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node = self.nodes[message.metadata.dst_node_id]
            message.metadata.__dict__["_message_id"] = f"{node.node_id}-{len(node.asked)}"
            node.asked.append(message)
            self._messages[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids):
        self.on_pull()
        for message_id in message_ids:
            if (message := self._messages.get(message_id)) is None:
                continue
            if (reply := self._reply(message)) is not None:
                del self._messages[message_id]
                return [reply]
        return []

    def _reply(self, message: Message) -> Message | None:
        node = self.nodes[message.metadata.dst_node_id]
        if not node.is_online:
            return Message(Error(NODE_UNAVAILABLE), reply_to=message)
        if node.replies is not None:
            return node.replies(message)
        return answered(node, message)

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args, **kwargs) -> Message:
        return Message(*args, **kwargs)

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def answered(node: Node, message: Message) -> Message:
    """The station's answer."""
    return Message(pack(node.station.answer(unpack(message))), reply_to=message)


def troubled(word: str) -> Callable[[Message], Message]:
    """A courier that brings a word."""
    return lambda message: pack_trouble(word, message)
