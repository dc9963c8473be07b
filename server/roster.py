"""Who may be asked, and under which name an answer counts.

In a simulation every node of the grid takes part, and its first answer says which site it is. In a consortium the store
decides: a node belongs to the site that enrolled with its key, and only sites that approved the plan are asked. What an
answer claims about its sender is compared with that, never believed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol

from flwr.serverapp import Grid

if TYPE_CHECKING:
    from server.consortium import Consortium


class Roster(Protocol):
    """The sites of one run."""

    asks_again: bool
    """Whether a site that was lost is asked again when it is back within the deadline."""

    look_s: float
    """Pause between two looks at who is present [s]."""

    def present(self) -> Mapping[int, str]:
        """Nodes that may be asked now, each with a word that changes when it has been away."""

    def absent(self, seen: Collection[int]) -> list[str]:
        """Names of sites that take part and whose node is not among ``seen``."""

    def n_most(self) -> int:
        """The largest number of sites that could answer one question: a public number."""

    def name_of(self, node: int) -> str:
        """The site behind a node, or what else it can be called."""

    def fault_of(self, node: int, site: str) -> str | None:
        """Why an answer from ``node`` under the name ``site`` does not count; None if it does."""


class LearntRoster:
    """All nodes of a grid, named by their first answer.

    Parameters
    ----------
    grid
        Flower's way to the sites, or the simulation's.
    """

    asks_again = False
    look_s = 0.0

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._names: dict[int, str] = {}

    def present(self) -> Mapping[int, str]:
        """Every node."""
        return dict.fromkeys(self._grid.get_node_ids(), "")

    def absent(self, seen: Collection[int]) -> list[str]:
        """Nobody: who is not on the grid is not known."""
        return []

    def n_most(self) -> int:
        """Every node."""
        return len(list(self._grid.get_node_ids()))

    def name_of(self, node: int) -> str:
        """The site's name once it has given it."""
        return self._names.get(node, f"node {node}")

    def fault_of(self, node: int, site: str) -> str | None:
        """None; the first name is remembered."""
        self._names.setdefault(node, site)
        return None


class ApprovedRoster:
    """The enrolled sites that approved a plan.

    Parameters
    ----------
    grid
        Flower's way to the sites.
    consortium
        The store, which is asked at every look: a site that was revoked is out before its next answer.
    plan_sha256
        The plan.
    n_starts
        How often the SuperLink was started: one that was killed may have lost a reply, so everybody is asked again.
    """

    asks_again = True
    look_s = 2.0

    def __init__(
        self, grid: Grid, consortium: Consortium, plan_sha256: str, n_starts: Callable[[], int] = lambda: 0
    ) -> None:
        self._grid, self._consortium, self._plan_sha256, self._n_starts = grid, consortium, plan_sha256, n_starts
        self._names: dict[int, str] = {}

    def present(self) -> Mapping[int, str]:
        """Online nodes of sites that approved the plan."""
        approved, starts = self._consortium.approvals(self._plan_sha256), self._n_starts()
        present = {}
        for node in self._grid.get_nodes():
            site = self._consortium.site_of_node(node.node_id)
            if site is not None and site in approved:
                self._names[node.node_id] = site
                present[node.node_id] = f"{node.last_activated_at} {starts}"
        return present

    def absent(self, seen: Collection[int]) -> list[str]:
        """Sites that approved the plan and were not seen."""
        names = {self._consortium.site_of_node(node) for node in seen}
        return sorted(set(self._consortium.approvals(self._plan_sha256)) - names)

    def n_most(self) -> int:
        """Every enrolled site."""
        return sum(site.status == "enrolled" for site in self._consortium.sites())

    def name_of(self, node: int) -> str:
        """The site that enrolled with the node's key."""
        known = self._names.get(node, f"node {node}")  # a site that was revoked keeps its name in this run's records
        return self._consortium.site_of_node(node) or known

    def fault_of(self, node: int, site: str) -> str | None:
        """Whether the node is the site's, and the site still takes part."""
        owner = self._consortium.site_of_node(node)
        if owner is None:
            return "no longer takes part"
        if owner != site:
            return "another site's name"
        if owner not in self._consortium.approvals(self._plan_sha256):
            return "its approval was withdrawn"
        return None
