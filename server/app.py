"""The Flower ``ServerApp``: hands Flower's grid to our round loop.

``make_server_app`` serves the simulation; ``app`` is what the bundle of a deployed run names (``server.app:app``). It is
told the operator's folder and the run, and finds everything else there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.supercore.run import Run

    from server.rounds import Outcome, Rounds

PULL_PAUSE_S = 0.7
"""Pause between two looks for replies at the SuperLink, each of which it answers from its database [s]."""


def make_server_app(rounds_on: Callable[[Grid], Rounds], on_outcome: Callable[[Outcome], None]) -> ServerApp:
    """A ``ServerApp`` that runs the rounds which ``rounds_on`` sets up on Flower's grid, and reports their outcome."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        on_outcome(rounds_on(grid).run())

    return app


class OneByOne(Grid):
    """Flower's grid, giving one reply at a time: replies that wait do so at the SuperLink, not in this memory.

    Parameters
    ----------
    grid
        Flower's own.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._first = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The next reply to any of ``message_ids``; after a look in vain, a pause."""
        ids = list(message_ids)
        for step in range(len(ids)):
            place = (self._first + step) % len(ids)
            if replies := list(self._grid.pull_messages([ids[place]])):
                self._first = place  # the one after it moves up to this place
                return replies
        time.sleep(PULL_PAUSE_S)
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids in the same order."""
        return self._grid.push_messages(messages)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes that are online."""
        return self._grid.get_nodes()

    def get_node_ids(self) -> Iterable[int]:
        """Their ids."""
        return self._grid.get_node_ids()

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message, as Flower's own constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not used: the round loop pushes and pulls by itself, with its deadline."""
        raise NotImplementedError


app = ServerApp()


@app.main()
def carry_out_run(grid: Grid, context: Context) -> None:
    """Carry out the run that the configuration names."""
    from server.bundle import RUN_KEY
    from server.consortium import Consortium
    from server.runs import carry_out
    from server.superlink import FOLDER_VARIABLE

    folder = Path(os.environ[FOLDER_VARIABLE])
    carry_out(OneByOne(grid), Consortium(folder), str(context.run_config[RUN_KEY]))
