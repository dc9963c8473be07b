"""The page of a prediction: one file that opens offline, with what was found, the model it comes from and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from client.data.records import Kind

if TYPE_CHECKING:
    from client.findings import Findings
    from client.inference import Case

COLUMNS = {
    "label": "",
    "probability": "probability",
    "count": "number",
    "proportion": "share of the image, 0 to 1",
    "volume_ml": "volume [ml]",
    "pixels": "voxels",
    "lesions": "separate parts",
    "diameter_mm": "largest diameter [mm]",
    "mean_probability": "mean probability inside",
    "acceleration": "acceleration",
    "psnr": "PSNR [dB]",
    "ssim": "SSIM",
}
"""Measures that the page shows, with their heading."""


def page(case: Case, found: Findings, summary: dict[str, Any]) -> str:
    """The page as HTML; it names no patient."""
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = _figure
    columns = {
        key: heading for key, heading in COLUMNS.items() if any(row.get(key) is not None for row in found.measures)
    }
    text: str = environment.get_template("prediction.html").render(
        case=case,
        card=case.model.card,
        plan=case.model.plan,
        release=case.model.release,
        found=found,
        columns=columns,
        summary=summary,
        grid=_grid(case),
    )
    return text


def _grid(case: Case) -> str:
    """The study's images in words."""
    n_slices, n_rows, n_columns = case.scan.shape
    if case.kind is Kind.PICTURE:
        return f"a picture of {n_columns} x {n_rows} pixels"
    kind = {Kind.DICOM: "DICOM", Kind.KSPACE: "k-space"}.get(case.kind, "NIfTI")
    return f"{n_slices} slice{'s' if n_slices > 1 else ''} of {n_columns} x {n_rows} pixels, {kind}"


def _figure(value: Any) -> str:
    """A number with as many digits as mean something."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
