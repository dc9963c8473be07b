"""One HTML page that tells what a run or an experiment found: open it offline, print it, send it.

The page is written from ``result.json`` and ``pictures.npz`` alone, so it can be written again at any time and says
nothing that is not in them. It loads nothing from anywhere: charts are inline SVG whose colours follow the reader's light
or dark scheme, pictures are embedded, and there is no script. What a run did not come to is named on the page rather
than left out in silence. Running, measuring and choosing the pictured patients happen elsewhere.
"""

from simulation.report.page import write_experiment_report, write_report

__all__ = ["write_experiment_report", "write_report"]
