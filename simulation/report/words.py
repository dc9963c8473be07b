"""Numbers as they are printed, and the sentences of a page."""

from __future__ import annotations

from collections.abc import Iterable

from simulation.report.results import Run

METRICS = {
    "dice": ("Dice", "Dice is the overlap of outline and reference: 0 none, 1 perfect."),
    "hd95_mm": ("HD95 (mm)", "HD95 is the distance from the reference that 95 % of the outline keep within."),
    "hd95_px": ("HD95 (px)", "HD95 is the distance from the reference that 95 % of the outline keep within."),
    "surface_mm": ("surface (mm)", "The surface distance is the mean one between outline and reference."),
    "surface_px": ("surface (px)", "The surface distance is the mean one between outline and reference."),
    "auc": ("AUC", "AUC is the chance that of two patients the right one is ranked higher: 0.5 guesses, 1 is perfect."),
    "average_precision": ("AP", "AP is the mean share of true cases among those ranked as high as each of them."),
    "balanced_accuracy": ("balanced accuracy", "Balanced accuracy is the share recognised, averaged over labels."),
    "f1": ("F1", "F1 is the harmonic mean of precision and recall."),
    "sensitivity": ("sensitivity", "Sensitivity is the share found where 90 % of the others are told apart."),
    "quadratic_kappa": ("kappa", "Kappa is agreement beyond chance, the further off the worse: 1 is perfect."),
    "rank_error": ("rank error", "The rank error is how many places a prediction is off, on average."),
    "localisation": ("localisation", "Localisation is how often the hottest point of the map lies in the outline."),
    "froc": (
        "FROC",
        "FROC is the mean share of lesions that peaks of the map lie in, at 1/8 to 8 false peaks a study.",
    ),
    "log_likelihood": (
        "log-likelihood",
        "Log-likelihood is the logarithm of the true label's probability: 0 is perfect.",
    ),
    "icc": ("ICC", "ICC is the agreement of the numbers with the reference, ICC(A,1): 1 is perfect, 0 none."),
    "ratio": ("ratio", "The ratio is the smaller of predicted and true number over the larger: 1 is perfect."),
    "absolute_error": ("absolute error", "The absolute error is how far a number is off, on average."),
    "probability": ("probability of the true label", ""),
    "psnr": (
        "PSNR (dB)",
        "PSNR sets the largest magnitude of a study against its mean error: 6 dB more is half the error.",
    ),
    "gain_db": ("gain (dB)", "Gain is PSNR above that of the zero-filled image."),
    "magnitude_psnr": ("magnitude PSNR (dB)", ""),
    "ssim": ("SSIM", "SSIM is the likeness of structures: 1 is perfect."),
    "nmse": ("NMSE", "NMSE is the squared error over the square of the reference."),
    "ece": (
        "calibration error",
        "The expected calibration error is how far confidence is from the share that is right: 0 is honest.",
    ),
    "entropy": ("entropy", "Entropy is how undecided models are: 0 sure, 1 as undecided as can be."),
    "mutual_information": ("mutual information", "Mutual information is the part of entropy in which models differ."),
    "disagreement": ("disagreement", "Disagreement is how far the answers of models part: 0 not at all, 1 altogether."),
    "flag_auroc": ("AUC for poor patients", "It is the chance that of two patients the one who does badly is flagged."),
    "amplification": (
        "amplification",
        "Amplification is how much larger the image's change is than that of the samples, at the worst that was found.",
    ),
    "structure": ("structure", "Structure is the share of an inserted disc that the image shows."),
}
"""Each metric's name in a heading and what it says; any other is shown with its underscores as spaces."""

NOTHING = "–"
"""Stands where there is no number."""


def figures(values: Iterable[float | None], *, signed: bool = False) -> list[str]:
    """Numbers that stand together, with a true minus and enough decimals for three digits of the largest."""
    values = list(values)
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    decimals = 3 if largest <= 1 else 2 if largest < 10 else 1 if largest < 100 else 0
    return [NOTHING if v is None else f"{v:{'+' if signed else ''}.{decimals}f}".replace("-", "−") for v in values]


def figure(value: float | None, *, signed: bool = False) -> str:
    """A number to three digits."""
    return figures([value], signed=signed)[0]


def metric_name(metric: str) -> str:
    """How a metric is called in a heading."""
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ")


def meanings(metrics: Iterable[str]) -> str:
    """What metrics say, for a reader who meets them here for the first time."""
    return " ".join(METRICS[metric][1] for metric in metrics if metric in METRICS).strip()


def duration(seconds: float) -> str:
    """A time span in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def counted(n: int, word: str, plural: str = "") -> str:
    """A number with its noun."""
    return f"{n:,} {word if n == 1 else plural or word + 's'}".replace(",", "\u2009")


def summary(run: Run) -> str:
    """The whole run in one sentence of plain words."""
    hospitals = counted(len(run.sites), "hospital")
    if not run.rounds:
        return f"{hospitals} took part, and no round was completed."
    together = " together" if len(run.sites) > 1 else ""
    rounds = counted(len(run.rounds), "round")
    if run.status == "finished":
        parts = [f"{hospitals} trained{together} for {rounds}"]
    else:
        verb = "paused" if run.status == "paused" else "ended early"
        parts = [f"{hospitals} trained{together}; the run {verb} after {rounds}"]
    means = run.comparison.mean if run.comparison else None
    reached = means.shared if means else run.test.mean.get(run.headline) if run.test else None
    if reached is None:
        parts.append("the shared model was not measured on test patients")
    else:
        parts.append(f"the shared model reaches a test {metric_name(run.headline)} of {reached:.2f}")
    if means and means.own is not None and means.elsewhere is not None:
        parts.append(f"the hospitals' own models reach {means.own:.2f} at home and {means.elsewhere:.2f} elsewhere")
    return "; ".join(parts) + "."


def absences(run: Run) -> str:
    """Who did not reply, in one sentence."""
    missing = [site for r in run.rounds for site in r.missing]
    refused = [refusal["site"] for r in run.rounds for refusal in r.refused]
    words = []
    if missing:
        words.append(f"{counted(len(missing), 'reply', 'replies')} did not arrive in time ({_names(missing)})")
    if refused:
        words.append(f"{counted(len(refused), 'reply was', 'replies were')} refused ({_names(refused)})")
    if not words:
        return "Every hospital replied in every round, and every reply was accepted."
    return "; ".join(words) + ". The other hospitals' rounds went on without them."


def _names(sites: Iterable[str]) -> str:
    *others, last = sorted(set(sites))
    return f"{', '.join(others)} and {last}" if others else last
