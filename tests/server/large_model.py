"""A round of a model of 30 million parameters in a process of its own, which then tells its peak memory.

python large_model.py N_SITES FOLDER           the ServerApp's side; prints the peak [bytes]
python large_model.py sites FOLDER             the sites' side, another process: answers through the depot
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from faults.flower import FlowerGrid, Node
from flwr.app import Message

from server.depot import Depot
from server.journal import Journal
from server.rounds import Rounds
from shared_models.messages import Answer, decode_ask, encode_answer
from shared_models.parcel import Reference, pack_reference, unpack
from shared_models.plan import Plan
from shared_models.wire import chunks

N_PARAMETERS = 30_000_000
N_ARRAYS = 60
PLAN = Path(__file__).parents[2] / "simulation" / "plans" / "smoke.toml"


class KnownRoster:
    """Node ``n`` is ``site-n``; lost ones are asked again, as in a consortium."""

    asks_again, look_s = True, 1.0

    def __init__(self, n_sites: int) -> None:
        self._n_sites = n_sites

    def present(self):
        return dict.fromkeys(range(1, self._n_sites + 1), "")

    def absent(self, seen):
        return []

    def n_most(self) -> int:
        return self._n_sites

    def name_of(self, node: int) -> str:
        return f"site-{node}"

    def fault_of(self, node: int, site: str) -> str | None:
        return None


def serve(n_sites: int, folder: Path) -> int:
    """One round with ``n_sites`` sites; the peak resident memory of this process [bytes]."""
    plan = Plan.load(PLAN)
    strategy = plan.strategy.model_copy(update={"minimum_sites": n_sites})
    plan = plan.model_copy(update={"rounds": 1, "strategy": strategy})
    depot = Depot(folder / "depot")
    sites = subprocess.Popen(
        [sys.executable, __file__, "sites", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def reply(message: Message) -> Message:
        question = unpack(message)
        assert isinstance(question, Reference)
        print(message.metadata.dst_node_id, question.sha256, file=sites.stdin, flush=True)
        sha256, n_bytes = sites.stdout.readline().split()
        return Message(pack_reference(Reference(sha256, int(n_bytes))), reply_to=message)

    grid = FlowerGrid([Node(n, None, replies=reply) for n in range(1, n_sites + 1)])
    size = N_PARAMETERS // N_ARRAYS
    weights = {f"layer-{i}": np.full(size, i, np.float32) for i in range(N_ARRAYS)}
    rounds = Rounds(
        plan,
        grid,
        Journal(folder / "journal"),
        run="a-run",
        seed=0,
        weights=weights,
        roster=KnownRoster(n_sites),
        depot=depot,
    )
    del weights
    outcome = rounds.run()
    assert len(outcome.records[0].replied) == n_sites
    sites.stdin.close()
    sites.wait()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer_questions(folder: Path) -> None:
    """Answer each question on the input with the name of a parcel."""
    depot = Depot(folder / "depot")
    for line in sys.stdin:
        node, sha256 = line.split()
        ask = decode_ask(depot.path(sha256).read_bytes())
        update = (
            {name: np.full(array.shape, 1e-3 * int(node), np.float32) for name, array in ask.weights.items()}
            if ask.question.kind == "train"
            else {}
        )
        counts = {"measured": 1} | ({"trained": 1} if update else {})
        answer = encode_answer(Answer(f"site-{node}", ask.question, None, update, {"dice": 0.5}, counts))
        print(depot.put(chunks(answer)), len(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "sites":
        answer_questions(Path(sys.argv[2]))
    else:
        print(serve(int(sys.argv[1]), Path(sys.argv[2])))
