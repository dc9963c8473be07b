"""Which parameters stay at a site: the normalisation layers of a network, under FedBN."""

from __future__ import annotations

from torch import nn

from shared_models.plan import Plan

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation
    nn.GroupNorm,
    nn.LayerNorm,
)


def norm_parameters(network: nn.Module) -> frozenset[str]:
    """Names of the learned scales and shifts of all normalisation layers."""
    return frozenset(
        f"{place}.{name}" if place else name
        for place, module in network.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    )


def staying(plan: Plan, network: nn.Module) -> frozenset[str]:
    """Names of the parameters of ``plan``'s network that no site sends."""
    return norm_parameters(network) if plan.strategy.name == "fedbn" else frozenset()
