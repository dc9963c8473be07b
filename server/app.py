"""The Flower ``ServerApp``: hands Flower's grid to our round loop."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.rounds import Outcome, Rounds


def make_server_app(rounds_on: Callable[[Grid], Rounds], on_outcome: Callable[[Outcome], None]) -> ServerApp:
    """A ``ServerApp`` that runs the rounds which ``rounds_on`` sets up on Flower's grid, and reports their outcome."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        on_outcome(rounds_on(grid).run())

    return app
