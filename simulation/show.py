"""What a person sees in the terminal while a run goes on: stages, sites, rounds, time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from server.rounds import Progress as Event
from simulation.run import Watcher


class Show(Watcher):
    """Progress bars and one line for each round, on the error stream so that output can be piped.

    Parameters
    ----------
    console
        Where to draw.
    headline
        Name of the metric that the lines show.
    """

    def __init__(self, console: Console, headline: str) -> None:
        self._console, self._headline = console, headline
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
        )
        self._bar: TaskID | None = None
        self._validation: dict[str, float] = {}

    def __enter__(self) -> Show:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """A new bar; the one before is left as it ended."""
        self._bar = self._bars.add_task(name, total=total, detail="")

    def step(self, done: int | None = None, total: int | None = None, detail: str = "") -> None:
        """Move the bar."""
        if self._bar is None:
            return
        if done is None:
            self._bars.update(self._bar, advance=1, detail=detail)
        else:
            self._bars.update(self._bar, completed=done, total=total, detail=detail)

    def progress(self, event: Event) -> None:
        """Move the bar by a site, and say what a round brought."""
        if event.what == "replied":
            self._replied(event)
        elif event.what == "left out":
            self._console.print(f"[yellow]round {event.round}: {event.site} left out: {event.detail}[/]")
            self._advance(event)
        elif event.what == "committed":
            self._committed(event)

    def _replied(self, event: Event) -> None:
        if self._headline in event.metrics:
            self._validation[event.site] = event.metrics[self._headline]
        self._advance(event)

    def _advance(self, event: Event) -> None:
        if self._bar is not None:
            self._bars.update(
                self._bar, advance=1 if event.kind == "train" else 0, detail=f"{event.kind} {event.round}: {event.site}"
            )

    def _committed(self, event: Event) -> None:
        """The replies of a round measured the weights it started from: those of the round before."""
        if event.round > 1 and self._validation:
            values = "  ".join(f"{site} {value:.3f}" for site, value in sorted(self._validation.items()))
            self._console.print(
                f"[dim]round {event.round - 1:>3}  validation {self._headline}:  {values}[/]", soft_wrap=True
            )
        self._validation = {}
