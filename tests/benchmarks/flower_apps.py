"""The peer: Flower's own strategy, records and Ray engine around the same training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from client.training import resident_trainer
from shared_models.plan import Plan
from shared_models.task import task_for
from shared_models.weights import initial_weights
from simulation.stations import open_station


def client_app(plan: Plan, stations: list[Path]) -> ClientApp:
    """A client as Flower's documentation has it: arrays in, arrays and a count out."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        station = open_station(stations[int(context.node_config["partition-id"])])
        trainer = resident_trainer(plan, "auto")
        weights = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        round_ = int(message.content.config_records["config"]["server-round"])
        since = sum(trainer.clock.seconds.values())
        trained = trainer.train(weights, station.cohort(plan), seed=0, site=station.name, round_=round_)
        spent = sum(trainer.clock.seconds.values()) - since
        arrays = ArrayRecord.from_numpy_ndarrays([weights[name] + trained.update[name] for name in weights])
        named = ArrayRecord(dict(zip(weights, arrays.values(), strict=True)))
        metrics = MetricRecord({"num-examples": trained.n_patients, "cpu": spent})
        return Message(RecordDict({"arrays": named, "metrics": metrics}), reply_to=message)

    return app


class Counted(FedAvg):
    """``FedAvg`` that notes CPU seconds after each round."""

    def __init__(self, tree_cpu_s: Callable[[], float]) -> None:
        super().__init__(fraction_evaluate=0.0, min_evaluate_nodes=0)
        self._tree_cpu_s, self._training = tree_cpu_s, 0.0
        self.marks: list[tuple[float, float]] = []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self._training += sum(reply.content.metric_records["metrics"]["cpu"] for reply in replies)
        combined = super().aggregate_train(server_round, replies)
        self.marks.append((self._tree_cpu_s(), self._training))
        return combined


def run_flower(plan: Plan, stations: list[Path], tree_cpu_s: Callable[[], float]) -> list[tuple[float, float]]:
    """CPU seconds of the process tree and of training inside the clients, after each round."""
    strategy = Counted(tree_cpu_s)
    weights = initial_weights(task_for(plan).build_network, 0)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord.from_numpy_ndarrays(list(weights.values()))
        named = ArrayRecord(dict(zip(weights, arrays.values(), strict=True)))
        strategy.start(grid, named, num_rounds=plan.rounds)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=app,
            client_app=client_app(plan, stations),
            num_supernodes=len(stations),
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False},
            },
        )
    return strategy.marks
