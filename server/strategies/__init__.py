"""Aggregation rules: how the mean of the updates becomes the next weights.

A rule sees exact weighted means alone, so memory does not depend on the number of sites. FedProx, FedBN and Ditto are
FedAvg here: what they add happens at the sites (``client/side.py``). What a rule remembers from round to round is in the
journal with the weights.
"""

from __future__ import annotations

from server.strategies.rule import Strategy
from shared_models.plan import Plan
from shared_models.registry import look_up

STRATEGIES = {
    "fedavg": "server.strategies.fedavg:FedAvg",
    "fedprox": "server.strategies.fedavg:FedAvg",
    "fedbn": "server.strategies.fedavg:FedAvg",
    "ditto": "server.strategies.fedavg:FedAvg",
    "fedadam": "server.strategies.adaptive:FedAdam",
    "fedyogi": "server.strategies.adaptive:FedYogi",
    "scaffold": "server.strategies.scaffold:Scaffold",
}
"""Rules by the name a plan uses."""

__all__ = ["STRATEGIES", "Strategy", "strategy_for"]


def strategy_for(plan: Plan) -> Strategy:
    """The rule that ``plan`` names."""
    rule: Strategy = look_up(STRATEGIES, plan.strategy.name)(plan)
    return rule
