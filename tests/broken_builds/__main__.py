"""``python -m tests.broken_builds``: every broken build, or those that are named; exit code 0 if all were noticed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: a fork keeps no threads
    os.environ.setdefault(threads, "1")

from .patches import PATCHES  # noqa: E402
from .runner import audit  # noqa: E402


def main() -> int:
    """Print a line for each build."""
    parser = argparse.ArgumentParser(prog="python -m tests.broken_builds", description=__doc__)
    parser.add_argument("names", nargs="*", help="builds; all unless some are named")
    parser.add_argument("--nine", action="store_true", help="those that make test-system looks at")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of lines")
    given = parser.parse_args()
    unknown = set(given.names) - {patch.name for patch in PATCHES}
    if unknown:
        parser.error(f"no such build: {', '.join(sorted(unknown))}")
    chosen = [p for p in PATCHES if p.name in given.names or (p.is_of_the_nine if given.nine else not given.names)]
    results: dict[str, list[str]] = {}
    since = time.monotonic()
    for name, wrong in audit(chosen):
        results[name] = wrong
        if not given.json:
            word = "SURVIVED" if wrong else ("passes" if len(results) == 1 else "noticed")
            print(f"{word:9} {name}", *(f"\n          {line}" for line in wrong), flush=True)
    n_wrong = sum(bool(wrong) for wrong in results.values())
    if given.json:
        print(json.dumps(results))
    else:
        print(f"{len(chosen)} broken builds, {n_wrong} not noticed as they should be, {time.monotonic() - since:.0f} s")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
