"""Flower's ``Grid`` without sockets: the same apps, in this process or in a few persistent workers.

With one worker a message is answered in this process when its reply is pulled. With more, each message goes to the next
free worker, and at most one waits for each worker, so that memory does not grow with the number of sites. A worker that
dies costs its message a second try in a fresh pool, alone, and then that site the round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.app import make_client_app
from shared_models.plan import Plan
from simulation.processes import process_pool
from simulation.stations import station_of

CLIENT_APP_RAISED = 2
NODE_UNAVAILABLE = 5
"""Flower's own error codes (``flwr.common.constant.ErrorCode``)."""

PULL_WAIT_S = 0.2
"""How long one pull waits for a worker [s]."""


class InProcessGrid(Grid):
    """All nodes on this machine.

    Parameters
    ----------
    plan
        Says how reliable the sites are.
    folders
        The stations' folders; node ``i + 1`` is the site in ``folders[i]``.
    workers
        Processes that answer; 1 answers in this process.
    """

    def __init__(self, plan: Plan, folders: list[Path], *, workers: int, run: Run) -> None:
        self._plan, self._folders, self._run = plan, folders, run
        self._workers = min(workers, len(folders))
        self._pool: ProcessPoolExecutor | None = None
        self._queue: deque[Message] = deque()
        self._running: dict[Future[Message], Message] = {}
        self._retried: set[str] = set()

    def __enter__(self) -> InProcessGrid:
        if self._workers > 1:
            self._pool = process_pool(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message, as Flower's own constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """1 to the number of sites."""
        return range(1, len(self._folders) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; a message that was never pulled is forgotten when the next ones come."""
        self._queue.clear()
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())  # Flower's own in-memory grid sets it so too
            self._queue.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there by now, to any of ``message_ids``."""
        wanted = set(message_ids)
        replies = self._answer_here() if self._pool is None else self._answer_in_workers()
        return [reply for reply in replies if reply.metadata.reply_to_message_id in wanted]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until every reply is there; the round loop does this itself, with its deadline."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            new = list(self.pull_messages(waiting))
            replies += new
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
        return replies

    def _answer_here(self) -> list[Message]:
        return [answer(self._plan, self._folders, self._queue.popleft())] if self._queue else []

    def _answer_in_workers(self) -> list[Message]:
        while self._queue and len(self._running) < self._in_flight_limit():
            message = self._queue.popleft()
            try:
                self._running[self._submit(message)] = message
            except BrokenProcessPool:
                self._queue.appendleft(message)
                if self._running:
                    break
                self._renew_pool()
        done, _ = wait(self._running, timeout=PULL_WAIT_S, return_when=FIRST_COMPLETED)
        return [reply for future in done if (reply := self._reply(future)) is not None]

    def _in_flight_limit(self) -> int:
        """Two for each worker; one in all while a suspect gets its second try, so that it can take nobody with it."""
        suspects = [m for m in (self._queue[0], *self._running.values()) if m.metadata.message_id in self._retried]
        return 1 if suspects else 2 * self._workers

    def _submit(self, message: Message) -> Future[Message]:
        if self._pool is None:
            raise RuntimeError("the grid is closed")
        return self._pool.submit(answer, self._plan, self._folders, message)

    def _reply(self, future: Future[Message]) -> Message | None:
        """The reply of a finished worker; None if it died and its message is tried once more."""
        message = self._running.pop(future)
        try:
            return future.result()
        except BrokenProcessPool:
            self._renew_pool()
            if message.metadata.message_id in self._retried:
                return Message(Error(NODE_UNAVAILABLE), reply_to=message)
            self._retried.add(message.metadata.message_id)
            self._queue.appendleft(message)
            return None

    def _renew_pool(self) -> None:
        """A fresh pool once all of the broken one's messages have been handed back."""
        if not self._running and self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = process_pool(self._workers)


def answer(plan: Plan, folders: list[Path], message: Message) -> Message:
    """Let the site's ``ClientApp`` answer, as a SuperNode would; what it raises becomes a code without text."""
    context = Context(
        run_id=message.metadata.run_id,
        node_id=message.metadata.dst_node_id,
        node_config=UserConfig({"partition-id": message.metadata.dst_node_id - 1}),
        state=RecordDict(),
        run_config=UserConfig(),
    )
    try:
        return courier(plan, folders)(message, context)
    except Exception:
        return Message(Error(CLIENT_APP_RAISED), reply_to=message)


def courier(plan: Plan, folders: list[Path]) -> ClientApp:
    """The ``ClientApp`` of every simulated node; ``partition-id`` says which site it is."""
    return make_client_app(lambda context: station_of(plan, folders, int(context.node_config["partition-id"])))
