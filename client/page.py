"""The page of ``federad-site check``: one HTML file that opens without a network and holds no script.

It shows pictures of patients and stays in the station's folder; only its owner may read it.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.readiness import Look, Readiness

FILE = "check.html"

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f8; --surface: #fff; --ink: #1b2430; --muted: #5b6675; --line: #dfe3e8;
  --accent: #0b6e8f; --good: #1f7a4d; --poor: #b3402f;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #12161b; --surface: #1a2027; --ink: #e7ebf0;
  --muted: #9ba7b6; --line: #303944; --accent: #5cb9d6; --good: #6ccb97; --poor: #ee8f7e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font); overflow-wrap: anywhere; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: 0 0 .75rem; max-width: 46rem; } .small { color: var(--muted); font-size: .87rem; }
.lead { font-size: 1.15rem; margin: .9rem 0 1.5rem; }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .75rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { font-size: .87rem; color: var(--muted); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-size: .8rem; } td.n, th.n { text-align: right; white-space: nowrap; }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; }
.looks { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .75rem; }
.look { padding: .6rem; font-size: .8rem; line-height: 1.35; }
.look .frame { background: #000; border-radius: 6px; height: 10rem; display: flex; justify-content: center; }
.look img { max-width: 100%; height: 100%; object-fit: contain; } .look svg { width: 100%; height: 2.2rem; display: block; }
.look rect { fill: var(--accent); } .look b { display: block; margin-top: .4rem; }
.flag { color: var(--poor); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
"""


def write(folder: Path, found: Readiness) -> Path:
    """Write the page into ``folder``, readable by its owner only; its path."""
    path = folder / FILE
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(html(found))
    return path


def html(found: Readiness) -> str:
    """The page as text."""
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Check of {escape(found.site)}</title><style>{_STYLE}</style></head><body><main>",
            '<p class="small">federad-site check. This page shows patients: it stays here.</p>',
            f"<h1>{escape(found.site)}</h1>",
            f'<p class="lead">{_verdict(found)}</p>',
            _tiles(found),
            *_plan(found),
            "<h2>What was found</h2>",
            '<div class="pair">',
            _table("Scanner", ("patients", "studies"), [(name, *n) for name, n in found.scanners.items()]),
            _table("Modality", ("series",), sorted(found.modalities.items())),
            "</div>",
            "<h2>What was left out</h2>",
            _reasons(found.skipped_files, "files", "Every file below the data folder is used."),
            "<h2>Spacing and intensities</h2>",
            _spacings(found.looks),
            f"<h2>A closer look at {len(found.looks)} series</h2>",
            '<p class="small">The slice in the middle, from the 1st to the 99th percentile of its intensities, with their'
            " histogram. Suspected text and faces are suspicions: look at them.</p>",
            f'<div class="looks">{"".join(map(_look, found.looks))}</div>',
            _reasons(found.unread, "of the chosen series", "") if found.unread else "",
            "<h2>This machine</h2>",
            f'<div class="card"><p>Trains on <b>{escape(found.device)}</b>: {escape(found.device_reason)}.</p>'
            f"<p>{found.disk_free_gb:.0f} GB are free beside the images.</p></div>",
            "</main></body></html>",
        ]
    )


def _verdict(found: Readiness) -> str:
    if found.plan is not None:
        usable = sum(found.splits.values())
        word = f"{usable} of {found.n_patients} patients can be used by the plan {escape(found.plan)}."
    else:
        word = f"{found.n_patients} patients with {found.n_studies} studies were found in {escape(found.source)}."
    if found.n_suspected:
        return f'{word} <span class="flag">{found.n_suspected} series should be looked at.</span>'
    return f'{word} <span class="good">Nothing suspicious was seen.</span>'


def _tiles(found: Readiness) -> str:
    tiles = [
        (found.n_patients, "patients"),
        (found.n_studies, "studies"),
        (found.n_files, "image files"),
        (sum(found.skipped_files.values()), "files left out"),
        (found.n_duplicates, "duplicates or disputed"),
        (found.n_says_burned_in, "series that say text is burned in"),
        (sum(look.is_text_suspected for look in found.looks), "shown, text suspected"),
        (sum(look.is_face_suspected for look in found.looks), "shown, face suspected"),
    ]
    cells = (f'<div class="card tile"><b>{n}</b><span>{escape(what)}</span></div>' for n, what in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _plan(found: Readiness) -> list[str]:
    if found.plan is None:
        return []
    unit = ("studies",) if found.labels_are_of_studies else ("% of voxels",)
    number = "{:.0f}" if found.labels_are_of_studies else "{:.3f}"
    labels = [(name, number.format(value)) for name, value in found.labels.items()]
    return [
        f"<h2>Against the plan {escape(found.plan)}</h2>",
        '<div class="pair">',
        _table("Split", ("usable patients",), list(found.splits.items())),
        _table("Label", unit, labels),
        "</div>",
        "<h2>Studies that the plan cannot use</h2>",
        _reasons(found.skipped_studies, "studies", "The plan can use every study."),
    ]


def _reasons(tally: Mapping[str, int], what: str, none: str) -> str:
    if not tally:
        return f'<p class="good">{escape(none)}</p>'
    most_first: list[tuple[str, int]] = sorted(tally.items(), key=lambda item: (-item[1], item[0]))
    return _table("Reason", (what,), most_first)


def _spacings(looks: Sequence[Look]) -> str:
    groups: dict[str, list[Look]] = {}
    for look in looks:
        groups.setdefault(look.modality or "not stated", []).append(look)
    rows = []
    for modality, members in sorted(groups.items()):
        spacing = np.array([look.spacing_mm for look in members if look.spacing_mm is not None])
        middle = np.array([look.percentiles for look in members])
        unit = next((look.unit for look in members if look.unit), "as stored")
        rows.append(
            (
                modality,
                *(_range(spacing[:, axis]) if len(spacing) else "unknown" for axis in range(3)),
                *(_range(middle[:, n]) for n in range(3)),
                unit,
            )
        )
    columns = ("slices mm", "rows mm", "columns mm", "1 % below", "median", "99 % below", "unit")
    return _table("Modality", columns, rows)


def _range(values: NDArray[np.float64]) -> str:
    low, high = float(values.min()) + 0.0, float(values.max()) + 0.0
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _table(first: str, others: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in others)
    lines = []
    for name, *values in rows:
        cells = "".join(f'<td class="n">{escape(str(value))}</td>' for value in values)
        lines.append(f"<tr><td>{escape(str(name))}</td>{cells}</tr>")
    body = "".join(lines)
    return f'<div class="card"><table><tr><th>{escape(first)}</th>{head}</tr>{body}</table></div>'


def _look(look: Look) -> str:
    flags = [
        *(["text suspected"] if look.is_text_suspected else []),
        *(["face suspected"] if look.is_face_suspected else []),
    ]
    slices, rows, columns = look.shape
    spacing = (
        "spacing unknown" if look.spacing_mm is None else " x ".join(f"{mm:.3g}" for mm in look.spacing_mm) + " mm"
    )
    return (
        f'<div class="card look"><div class="frame"><img alt="" src="data:image/png;base64,{_png(look.picture)}"></div>'
        f"{_bars(look.histogram)}<b>{escape(look.name)}</b>"
        f"<div>{escape(look.scanner or 'scanner not stated')}</div>"
        f'<div class="small">{slices} x {rows} x {columns}, {spacing}<br>study {escape(look.study)}</div>'
        f'<div class="flag">{escape(", ".join(flags))}</div></div>'
    )


def _bars(histogram: Sequence[int]) -> str:
    most = max(*histogram, 1)
    bars = "".join(
        f'<rect x="{n}" y="{20 - 20 * (count / most) ** 0.5:.1f}" width="0.9" height="{20 * (count / most) ** 0.5:.1f}"/>'
        for n, count in enumerate(histogram)
    )
    box = f'viewBox="0 0 {len(histogram)} 20" preserveAspectRatio="none"'
    return f'<svg {box} role="img" aria-label="histogram">{bars}</svg>'


def _png(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")
