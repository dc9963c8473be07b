"""``federad-sim``: try a plan on many hospitals on one machine."""

from __future__ import annotations

from simulation.offline import stay_offline

stay_offline()

import json  # noqa: E402
import logging  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Any, cast, get_args  # noqa: E402

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from shared_models.commands import run_command  # noqa: E402
from shared_models.errors import FederadError  # noqa: E402

app = typer.Typer(
    help="Try a plan on many emulated hospitals and scanners, on one machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.toml", help="The plan; examples lie in simulation/plans.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for everything the command makes.")]
Sites = Annotated[int | None, typer.Option("--sites", help="Number of sites; 4 unless --data says otherwise.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="All randomness of a simulation derives from it.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Worker processes; one for each processor unless given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def run(
    plan: PlanFile,
    out: Out,
    sites: Sites = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Real data: one folder of images for each site, or a MedMNIST file.")
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            "--leave-out", help="A folder of --data that trains nothing: the model is tested there. Repeatable."
        ),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="in-process, ray or deployment.")] = "in-process",
    workers: Workers = None,
    seed: Seed = 0,
    start: Annotated[
        Path | None, typer.Option("--start", help="The model.safetensors at which the plan begins, if it names one.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Train the central and the local models too.")] = True,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Look at how sure the models are, and with what right.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a plan on emulated hospitals, or on real images, and write a report."""
    from shared_models.plan import Plan
    from simulation.engine import Engine, Execution, usable_cpus
    from simulation.run import Request, impossible, simulate

    if engine not in get_args(Engine):
        raise impossible(
            f"There is no engine {engine!r}.",
            "An engine is a way to execute a plan.",
            f"--engine {', --engine '.join(get_args(Engine))}",
        )
    request = Request(
        plan=Plan.load(plan),
        folder=out,
        n_sites=sites,
        data=data,
        left_out=tuple(leave_out or ()),
        seed=seed,
        execution=Execution(cast("Engine", engine), workers or usable_cpus(), out.absolute() / "deployment"),
        start=start,
        compare=compare,
        uncertainty=uncertainty,
        command=command_line(),
    )
    with watching(request.plan, as_json) as watcher:
        result = simulate(request, watcher)
    if as_json:
        print(json.dumps(result))
    else:
        show_result(result, out)


@app.command()
def data(
    plan: PlanFile, out: Out, sites: Sites = None, seed: Seed = 0, workers: Workers = None, as_json: AsJson = False
) -> None:
    """Write the emulated hospitals' DICOM folders."""
    from shared_models.plan import Plan
    from simulation.engine import Execution, usable_cpus
    from simulation.run import Request, emulate_for, use_folder

    request = Request(
        Plan.load(plan), use_folder(out), sites, seed=seed, execution=Execution(workers=workers or usable_cpus())
    )
    with watching(request.plan, as_json) as watcher:
        hospitals = emulate_for(request, watcher)
    written = [{"name": h.name, "scanner": h.scanner, "folder": str(h.folder)} for h in hospitals]
    if as_json:
        print(json.dumps(written))
    else:
        for hospital in written:
            print(f"{hospital['name']}  {hospital['scanner']}  {hospital['folder']}")


@app.command()
def experiment(
    name: Annotated[str | None, typer.Argument(help="Which one; leave it out to list them.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for everything it makes.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Real data, for an experiment that asks for it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, smaller: an answer within ten minutes.")] = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Run a named comparison, or list them."""
    from simulation.engine import usable_cpus
    from simulation.experiments import EXPERIMENTS
    from simulation.experiments.harness import run_experiment
    from simulation.run import impossible

    if name is None:
        listed = {key: experiment.title for key, experiment in EXPERIMENTS.items()}
        print(json.dumps(listed) if as_json else "\n".join(f"{key}  {title}" for key, title in listed.items()))
        return
    if name not in EXPERIMENTS:
        raise impossible(
            f"There is no experiment {name!r}.",
            "An experiment is a named comparison.",
            f"one of: {', '.join(EXPERIMENTS)}",
        )
    if out is None:
        raise impossible("--out is missing.", "An experiment keeps its partial results there.", "--out DIR")
    chosen = EXPERIMENTS[name]
    with watching(next(iter(chosen.arms(quick=quick).values())), as_json) as watcher:
        result = run_experiment(
            chosen,
            out,
            quick=quick,
            workers=workers or usable_cpus(),
            watcher=watcher,
            command=command_line(),
            data=data,
        )
    if as_json:
        print(json.dumps(result))
    else:
        show_experiment(result, out)


@app.command()
def configure(
    plan: PlanFile,
    out: Annotated[Path, typer.Option("--out", metavar="PLAN2.toml", help="File for the configured plan.")],
    sites: Sites = None,
    data: Annotated[Path | None, typer.Option("--data", help="Real data: one folder of images for each site.")] = None,
    memory_gb: Annotated[
        float, typer.Option("--memory-gb", min=0.001, help="What a training step may take at a site [10^9 bytes].")
    ] = 8.0,
    noise: Annotated[
        float | None,
        typer.Option(
            "--noise", min=0.01, max=1000, help="Noise over what a patient gives; 4 with [privacy], else none."
        ),
    ] = None,
    seed: Seed = 0,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Ask the sites for the fingerprint of their images, and write the plan that follows from it."""
    from tempfile import TemporaryDirectory

    from shared_models.plan import Plan
    from shared_models.self_configuration import derived, write_plan
    from simulation.configure import configure as configure_at
    from simulation.engine import Execution, usable_cpus
    from simulation.run import Request

    wanted = Plan.load(plan)
    with TemporaryDirectory() as folder, watching(wanted, as_json) as watcher:
        request = Request(
            wanted, Path(folder), sites, data, seed=seed, execution=Execution(workers=workers or usable_cpus())
        )
        found = configure_at(request, watcher, memory_gb=memory_gb, noise=noise)
    n_sites = found.fingerprint.n_sites
    write_plan(out, found.plan, f"{wanted.name}, configured from the fingerprint of {n_sites} sites")
    values = derived(found.plan)
    if as_json:
        print(json.dumps({"plan": str(out), "plan_sha256": found.plan.sha256, "n_sites": n_sites, **values}))
        return
    print(f"{out}  {found.plan.sha256}")
    for key, value in values.items():
        print(f"  {key:<20} {value}")


@app.command()
def sweep(
    plan: PlanFile,
    out: Out,
    settings: Annotated[
        list[str], typer.Option("--set", help="TABLE.KEY=VALUE,VALUE,... of the plan; give it once for each key.")
    ],
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of the runs, separated by commas.")] = "100",
    sites: Sites = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Run a plan with every combination of some keys' values; the same command goes on where it was."""
    from simulation.engine import usable_cpus
    from simulation.experiments.harness import run_experiment
    from simulation.run import DEFAULT_SITES, impossible
    from simulation.sweep import sweep_of

    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise impossible(f"--seeds {seeds} are no numbers.", "Randomness derives from them.", "--seeds 100,101")
    chosen = sweep_of(plan, settings, seeds=[int(seed) for seed in seeds.split(",")], n_sites=sites or DEFAULT_SITES)
    with watching(next(iter(chosen.arms(quick=False).values())), as_json) as watcher:
        result = run_experiment(
            chosen, out, quick=False, workers=workers or usable_cpus(), watcher=watcher, command=command_line()
        )
    if as_json:
        print(json.dumps(result))
    else:
        show_rows(result, out)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Write the HTML report of a run or an experiment again."""
    from simulation.report import write_experiment_report, write_report

    is_experiment = "experiment" in read_result(folder)
    path = write_experiment_report(folder) if is_experiment else write_report(folder)
    print(json.dumps({"report": str(path)}) if as_json else path)


@app.command()
def log(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What run, experiment or sweep has made.")],
    to: Annotated[str, typer.Option("--to", help="MLflow: http://SERVER, or sqlite:///FILE.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Experiment there; the plan's or experiment's own unless given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a run, or every run of an experiment, to MLflow; what is there already is not sent twice."""
    from simulation.tracking import finished_runs, log_results

    result = read_result(folder)
    into = name or str(result.get("experiment") or result["plan"])
    runs = finished_runs(folder, result)
    n_new = log_results(runs, into, to)
    print(json.dumps({"experiment": into, "sent": n_new}) if as_json else f"{into}: {n_new} of {len(runs)} runs sent")


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    stopped = FederadError(
        "R233",
        happened="Stopped by the user.",
        because="What was done until then is kept in the result folder.",
        remedies=("look at report.html there", "run the same command again: experiments go on, runs start afresh"),
    )
    run_command(app, stopped=stopped, misunderstood=misunderstood)


def misunderstood(happened: str) -> FederadError:
    """A mistake on the command line as a numbered error."""
    return FederadError(
        "R230",
        happened=happened,
        because="The command cannot tell what is wanted.",
        remedies=("federad-sim --help", "federad-sim COMMAND --help"),
    )


def watching(plan: Any, as_json: bool) -> Any:
    """Progress on the error stream."""
    from shared_models.task import task_for
    from simulation.show import Show

    return Show(Console(stderr=True, quiet=as_json), task_for(plan).headline)


def command_line() -> str:
    """The command as it was typed, for the result."""
    return shlex.join(["federad-sim", *sys.argv[1:]])


def read_result(folder: Path) -> dict[str, Any]:
    """``result.json`` of a folder; R231 if there is none."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FederadError(
            "R231",
            happened=f"{folder / 'result.json'} cannot be read ({type(error).__name__}).",
            because="A report is made from it.",
            remedies=("give the folder of a finished run", "or run the plan again"),
        ) from None
    return result


def show_result(result: dict[str, Any], out: Path) -> None:
    """A table for the terminal."""
    table = Table(title=f"{result['plan']}: test {result['headline']}")
    table.add_column("model")
    comparison = result["comparison"]
    rows = comparison["rows"] if comparison else []
    if not rows and result["test"]:
        metric, tested = result["headline"], result["test"]
        values = {site: figures.get(metric) for site, figures in tested["per_site"].items()}
        rows = [{"method": "federated", "per_site": values, "mean": tested.get(metric)}]
    rows = [*result.get("classical", []), *rows]
    sites = [site["name"] for site in result["sites"]]
    for site in [*sites, "mean"]:
        table.add_column(site, justify="right")
    for row in rows:
        cells = [row["per_site"].get(site) for site in sites] + [row["mean"]]
        table.add_row(row["method"], *map(_shown, cells))
    console = Console()
    if rows:
        console.print(table)
    else:
        console.print("No test patient was measured: metrics_every under [privacy] asks for that.", markup=False)
    console.print(f"weights {result['weights_sha256'][:16]}  {result['seconds']:.0f} s  {out / 'report.html'}")


def _shown(figure: float | dict[str, Any] | None) -> str:
    """A figure of ``test`` or of a comparison; one with noise stands with its interval."""
    if isinstance(figure, dict):
        low, high = figure["interval"]
        return f"{figure['value']:.3f} ({low:.3f} to {high:.3f})"
    return "–" if figure is None else f"{figure:.3f}"


def show_experiment(result: dict[str, Any], out: Path) -> None:
    """The claims for the terminal."""
    table = Table(title=result["experiment"])
    for column in ("claim", "value", "expected", "holds"):
        table.add_column(column)
    for claim in result["claims"]:
        expected = f"{claim['bound']} {claim['expected']:g}"
        table.add_row(claim["claim"], f"{claim['value']:.3f}", expected, "yes" if claim["holds"] else "no")
    console = Console()
    console.print(table)
    console.print(out / "report.html")


def show_rows(result: dict[str, Any], out: Path) -> None:
    """The rows of a sweep for the terminal."""
    table = Table(title=result["title"])
    for column in ("values", "measured on", "metric", "mean", "sd"):
        table.add_column(column)
    for one in result["rows"]:
        table.add_row(one["method"], one["split"], one["metric"], f"{one['mean']:.3f}", f"{one['sd']:.3f}")
    console = Console()
    console.print(table)
    console.print(out / "report.html")


if __name__ == "__main__":
    main()
