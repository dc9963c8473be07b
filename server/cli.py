"""``federad-server``: lead a consortium. Every command ends by telling the next one."""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import json
import logging
import re
import shlex
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared_models.commands import run_command, typed
from shared_models.errors import TITLES, FederadError

if TYPE_CHECKING:
    from server.consortium import Consortium
    from shared_models.plan import Plan

FOLDER_VARIABLE = "FEDERAD_SERVER"
DEFAULT_FOLDER = Path("consortium")
FILE = "consortium.toml"

START_S = 240.0
"""How long a detached start is waited for [s]."""

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}

app = typer.Typer(
    help="Lead a consortium: enrol hospitals, run plans, publish models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Dir = Annotated[
    Path | None,
    typer.Option("--dir", help="The operator's folder; else $FEDERAD_SERVER, the current one, or ./consortium."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run; federad-server status lists them.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; everything is kept there.")],
    host: Annotated[
        str, typer.Option("--host", metavar="NAME[:PORT]", help="Under which name sites reach this server.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="What the consortium is called; DIR's name else.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a consortium: its folder, its certificate authority, its keys."""
    from pydantic import ValidationError

    from server.consortium import Consortium, ConsortiumConfig

    hostname, port = split_host(host)
    called = name or re.sub(r"[^A-Za-z0-9 _.-]+", "-", folder.resolve().name).strip("-. ") or "consortium"
    try:
        config = ConsortiumConfig(name=called, host=hostname, port=port)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise misunderstood(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "--host NAME or --host NAME:PORT", '--name "..."'
        ) from None
    consortium = Consortium.create(folder, config)
    from shared_models.signing import fingerprint  # the authority's certificate in DER, as openssl shows it

    ca = fingerprint(der(consortium))
    told = {"folder": str(folder.resolve()), "name": called, "host": hostname, "port": port, "ca_sha256": ca}
    text = (
        f"Consortium {called!r} in {folder}: sites reach it at {hostname}:{port}.\n"
        f"Back up {folder / 'keys'}: who has these keys is the operator. Authority: {ca}"
    )
    done(told, text, as_json, hint(folder, "start --detach"), hint(folder, "invite SITE"))


@app.command()
def invite(
    site: Annotated[str, typer.Argument(metavar="SITE", help="What the hospital is called in the consortium.")],
    to: Annotated[Path | None, typer.Option("--to", help="Write the invitation to this file.")] = None,
    valid: Annotated[str, typer.Option("--valid", help="How long it can be used: 30m, 12h, 7d, 2w.")] = "7d",
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Invite a hospital: one line to hand over as you would a password."""
    consortium = opened(folder)
    invitation = consortium.invite(site, duration_s(valid))
    expires = invitation.expires_at.isoformat(timespec="minutes")
    told: dict[str, Any] = {"site": site, "expires": expires, "ca_sha256": invitation.ca_sha256}
    if to is None:
        told["invitation"] = invitation.line()
        text = f"{invitation.line()}\n\nThe line above lets {site} enrol once, until {expires}."
        given = "INVITATION"
    else:
        write_private(to, invitation.line() + "\n")
        told["file"] = str(to)
        text = f"{to} lets {site} enrol once, until {expires}."
        given = to.name
    done(told, text, as_json, f"at {site}:  federad-site enrol {given} --data DIR", hint(consortium.folder, "sites"))


@app.command("enrol-file")
def enrol_file(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="The file that the hospital sent.")],
    to: Annotated[Path, typer.Option("--to", help="Where to write the reply for the hospital.")],
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Enrol a hospital that exchanges files by mail."""
    from shared_models.consortium import EnrolRequest

    consortium = opened(folder)
    try:
        data = request.read_bytes()
    except OSError as error:
        raise misunderstood(f"{request} cannot be read ({error.strerror})", "give the request file") from None
    asked = EnrolRequest.decode(data)
    reply = consortium.enrol(asked)
    write_private(to, reply.encode().decode("ascii") + "\n")
    told = {"site": asked.site, "reply": str(to)}
    next_step = f"send {to.name} to {asked.site}; there:  federad-site enrol --reply {to.name}"
    done(told, f"{asked.site} has enrolled.", as_json, next_step, hint(consortium.folder, "sites"))


@app.command()
def sites(folder: Dir = None, as_json: AsJson = False) -> None:
    """List the hospitals and whether they are connected."""
    consortium = opened(folder)
    rows = describe_sites(consortium)
    if as_json:
        print(json.dumps(rows))
        return
    Console().print(sites_table(rows))
    show_next(hint(consortium.folder, "invite SITE"), hint(consortium.folder, "run PLAN.toml"))


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Whose part ends.")],
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """End a hospital's part: nothing it sends counts from now on."""
    consortium = opened(folder)
    row = consortium.revoke(site)
    text = f"{site} is out: its certificate is refused, and its answers count no longer."
    told = {"site": site, "status": row.status, "told_superlink": row.node_id is None}
    done(told, text, as_json, f"to let it back in with new keys:  {hint(consortium.folder, f'invite {site}')}")


@app.command()
def start(
    detach: Annotated[bool, typer.Option("--detach", help="Return when everything runs.")] = False,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Start the server and keep it running; Ctrl-C ends it in good order."""
    consortium = opened(folder)
    if detach:
        start_detached(consortium.folder)
        tell_started(consortium, as_json)
        return
    from server.operator import Operator

    console = Console(stderr=True, quiet=as_json)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    logging.getLogger("server").setLevel(logging.INFO)

    def say(text: str) -> None:
        console.print(f"[dim]{datetime.now().astimezone():%H:%M:%S}  {text}[/]", highlight=False)

    Operator(consortium.folder, say).run(ended, lambda: tell_started(consortium, as_json))
    say("the server has ended; runs that were going on are taken up at the next start")


@app.command()
def stop(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="The run to stop; the whole server else.")] = None,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Stop a run, or the server if no run is named."""
    from server.operator import stop_server
    from server.runs import RunFolder, stop_run
    from server.superlink import SuperLink

    consortium = opened(folder)
    if run is not None:
        stop_run(consortium, SuperLink(consortium.folder), run)
        n_rounds = len(RunFolder(consortium.folder, run).records())
        text = f"Run {run} is stopped; {n_rounds} rounds are committed."
        done({"run": run, "rounds": n_rounds}, text, as_json, hint(consortium.folder, f"resume {run}"))
        return
    if not stop_server(consortium.folder):
        raise not_running()
    done({"stopped": True}, "The server has ended.", as_json, hint(consortium.folder, "start"))


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.toml", help="The plan; examples lie in simulation/plans.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="From which the sites derive their randomness.")] = 0,
    n_sites: Annotated[
        int | None, typer.Option("--sites", min=1, help="Sites to wait for; the plan's minimum_sites unless given.")
    ] = None,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Sign a plan, offer it to all hospitals, and run it when enough have approved."""
    from shared_models.plan import Plan

    order(opened(folder), Plan.load(plan), seed, n_sites, as_json)


@app.command()
def fingerprint(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.toml", help="The plan that is to be configured.")],
    noise: Annotated[
        float | None,
        typer.Option(
            "--noise", min=0.01, max=1000, help="Noise over what a patient gives; 4 with [privacy], else none."
        ),
    ] = None,
    n_sites: Annotated[
        int | None, typer.Option("--sites", min=1, help="Sites to wait for; the plan's minimum_sites unless given.")
    ] = None,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Ask all hospitals how finely their images are sampled and how large they are; each has to approve."""
    from shared_models.fingerprint import fingerprint_plan
    from shared_models.plan import Plan

    order(opened(folder), fingerprint_plan(Plan.load(plan), noise), 0, n_sites, as_json)


@app.command()
def configure(
    name: RunName,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.toml", help="The plan that is to be configured.")],
    to: Annotated[Path, typer.Option("--to", help="File for the configured plan.")],
    memory_gb: Annotated[
        float, typer.Option("--memory-gb", min=0.001, help="What a training step may take at a site [10^9 bytes].")
    ] = 8.0,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Write a plan with spacing, patch, depth and batch as the fingerprint of a run asks for; sites approve it like any."""
    from server.runs import fingerprint_of
    from shared_models.plan import Plan
    from shared_models.self_configuration import configured, derived, write_plan

    consortium = opened(folder)
    wanted = Plan.load(plan)
    found = configured(wanted, fingerprint_of(consortium, name), memory_gb)
    write_plan(to, found, f"{wanted.name}, configured from the fingerprint of run {name}")
    values = derived(found)
    told = {"plan": str(to), "plan_sha256": found.sha256, **values}
    text = "\n".join([f"Plan {to}  {found.sha256}", *(f"  {key:<20} {value}" for key, value in values.items())])
    done(told, text, as_json, hint(consortium.folder, f"run {shlex.quote(str(to))}"))


@app.command()
def resume(name: RunName, folder: Dir = None, as_json: AsJson = False) -> None:
    """Go on with a run from its last committed round."""
    from server.runs import resume_run
    from server.superlink import SuperLink

    consortium = opened(folder)
    n_rounds = resume_run(consortium, SuperLink(consortium.folder), name)
    text = f"Run {name} goes on after round {n_rounds} of {consortium.run(name).plan.rounds}."
    done({"run": name, "rounds": n_rounds}, text, as_json, hint(consortium.folder, f"watch {name}"))


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; all of them else.")] = None,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Show the server, its hospitals and its runs."""
    from server.show import describe_run, run_view, runs_table

    consortium = opened(folder)
    if run is not None:
        described = describe_run(consortium, consortium.run(run))
        if as_json:
            print(json.dumps(described))
        else:
            Console().print(run_view(described))
            show_next(*next_of_run(consortium.folder, described))
        return
    told = describe_server(consortium)
    if as_json:
        print(json.dumps(told))
        return
    console = Console()
    console.print(server_line(told), highlight=False)
    console.print(sites_table(told["sites"]))
    console.print(runs_table(told["runs"]))
    if not told["running"]:
        show_next(hint(consortium.folder, "start"))
    elif not told["sites"]:
        show_next(hint(consortium.folder, "invite SITE"))
    else:
        show_next(hint(consortium.folder, "run PLAN.toml"), hint(consortium.folder, "watch [RUN]"))


@app.command()
def watch(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; the newest else.")] = None,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Follow a run as it goes on; Ctrl-C ends the watching and not the run."""
    from server.show import follow

    consortium = opened(folder)
    rows = consortium.runs()
    if run is None and not rows:
        raise FederadError(
            "S184",
            happened="There is no run yet.",
            because="Watching begins with a run.",
            remedies=(hint(consortium.folder, "run PLAN.toml"),),
        )
    name = run or rows[-1].run
    consortium.run(name)
    described = follow(consortium, name, as_json=as_json)
    if not as_json:
        show_next(*next_of_run(consortium.folder, described))


@app.command()
def releases(folder: Dir = None, as_json: AsJson = False) -> None:
    """List the models that were released; hospitals of the consortium can fetch each of them."""
    from server.registry import FOLDER, Registry

    consortium = opened(folder)
    cards = [release.card() for release in Registry(consortium.folder / FOLDER).list()]
    if as_json:
        print(json.dumps([card.model_dump(mode="json") for card in cards]))
        return
    table = Table(title="releases" if cards else "nothing has been released yet")
    for column in ("release", "run", "issued", "round", "sites", "test"):
        table.add_column(column)
    for card in cards:
        around = {name: f" ({low:.3f} to {high:.3f})" for name, (low, high) in (card.test_interval or {}).items()}
        test = ", ".join(f"{name} {value:.3f}{around.get(name, '')}" for name, value in (card.test or {}).items())
        taking_part = sum(site.rounds > 0 for site in card.sites)
        when = card.issued[:16].replace("T", " ")
        table.add_row(card.model_sha256[:12], card.run, when, str(card.released_round), str(taking_part), test)
    Console().print(table)
    if cards:
        show_next(hint(consortium.folder, f"export {cards[-1].model_sha256[:12]} --to MODEL.onnx"))
    else:
        show_next(hint(consortium.folder, "run PLAN.toml"))


@app.command()
def export(
    release: Annotated[
        str, typer.Argument(metavar="RELEASE", help="The first digits of its SHA-256, its run, or its plan.")
    ],
    to: Annotated[Path, typer.Option("--to", help="FILE.onnx for ONNX; any other name becomes a MONAI bundle.")],
    with_pickle: Annotated[
        bool,
        typer.Option("--with-pickle", help="Add model.pt to the bundle, for monai.bundle.load on this machine alone."),
    ] = False,
    folder: Dir = None,
    as_json: AsJson = False,
) -> None:
    """Write a released model for other software, checked to give the same output."""
    from server.export import export as export_release
    from server.registry import FOLDER, Registry

    consortium = opened(folder)
    found = Registry(consortium.folder / FOLDER).find(release)
    with Console(stderr=True, quiet=as_json).status("writing the model and comparing its output with our own"):
        error = export_release(found, to, with_pickle=with_pickle)
    told = {"release": found.sha256, "to": str(to), "largest_error": error}
    text = f"{to} holds release {found.sha256[:12]} of {found.name}. Largest error of its output: {error:.1e}."
    done(told, text, as_json, hint(consortium.folder, "releases"))


@app.command("serve-consortium", hidden=True)
def serve(folder: Dir = None) -> None:
    """Run the consortium service, as a process that the server keeps running."""
    from server.operator import serve_consortium

    logging.getLogger().setLevel(logging.INFO)
    serve_consortium(find_folder(folder))


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(name)s: %(message)s")
    stopped = FederadError(
        "S199",
        happened="Stopped by the user.",
        because="The server and its runs go on; only this command ended.",
        remedies=("federad-server status",),
    )
    run_command(app, stopped=stopped, misunderstood=lambda happened: misunderstood(happened, "federad-server --help"))


def order(consortium: Consortium, agreed: Plan, seed: int, n_sites: int | None, as_json: bool) -> None:
    """Order a run of a plan, and say what the hospitals have to do."""
    from server.bundle import make_bundle
    from server.runs import RunFolder, order_run
    from server.superlink import SuperLink

    name = order_run(consortium, SuperLink(consortium.folder), agreed, seed, n_sites)
    wait_for = RunFolder(consortium.folder, name).order.wait_for
    told = {
        "run": name,
        "plan": agreed.name,
        "plan_sha256": agreed.sha256,
        "seed": seed,
        "wait_for": wait_for,
        "bundle_sha256": make_bundle().sha256,
    }
    text = (
        f"Run {name}\n  plan    {agreed.name}  {agreed.sha256}\n  bundle  {told['bundle_sha256']}\n"
        f"It begins when {wait_for} sites have approved the plan and are connected."
    )
    at_site = f"at each site:  federad-site approve {agreed.sha256[:12]}"
    done(told, text, as_json, at_site, hint(consortium.folder, f"watch {name}"))


# Words and folders ----------------------------------------------------------------------------------------------------


def find_folder(given: Path | None) -> Path:
    """The operator's folder: ``--dir``, else the environment's, else the current one, else ``./consortium``."""
    if given is not None:
        return given
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    return Path() if Path(FILE).exists() else DEFAULT_FOLDER


def opened(given: Path | None) -> Consortium:
    """The consortium in the operator's folder, which tells the SuperLink of its sites."""
    from server.operator import open_consortium

    return open_consortium(find_folder(given).absolute())


def hint(folder: Path, command: str) -> str:
    """A command as it can be typed here and now."""
    if find_folder(None).absolute() == folder.absolute():
        return typed("federad-server", command)
    return f"federad-server {command} --dir {shlex.quote(str(folder))}"


def split_host(text: str) -> tuple[str, int]:
    """Name and port; 443 unless given. An IPv6 address stands in brackets where a port follows."""
    match = re.fullmatch(
        r"\[(?P<v6>[0-9a-fA-F:.]+)\](:(?P<port6>\d{1,5}))?|(?P<name>[^:\s]+)(:(?P<port>\d{1,5}))?", text
    )
    if match is None:
        raise misunderstood(f"--host {text} is not NAME or NAME:PORT", "--host server.example.org:443")
    name = match["v6"] or match["name"]
    return name.lower(), int(match["port6"] or match["port"] or 443)


def duration_s(text: str) -> float:
    """Seconds of a duration such as ``12h``."""
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if match is None:
        raise misunderstood(f"--valid {text} is no duration", "--valid 30m, 12h, 7d or 2w")
    return float(int(match[1]) * _UNITS[match[2]])


def misunderstood(happened: str, *remedies: str) -> FederadError:
    """A mistake on the command line as a numbered error."""
    return FederadError(
        "S199",
        happened=f"{happened[:1].upper()}{happened[1:].rstrip('.')}.",
        because="The command cannot tell what is wanted, and has changed nothing.",
        remedies=(*remedies, "federad-server COMMAND --help"),
    )


def not_running() -> FederadError:
    """S190 for a server that should run."""
    return FederadError(
        "S190",
        happened="No server runs in this operator's folder.",
        because="There is nothing to stop.",
        remedies=("federad-server start", "or say which folder: --dir DIR, or FEDERAD_SERVER in the environment"),
    )


def done(told: dict[str, Any], text: str, as_json: bool, *next_steps: str) -> None:
    """Say what was done and what comes next."""
    if as_json:
        print(json.dumps(told | {"next": list(next_steps)}))
        return
    print(text)
    show_next(*next_steps)


def show_next(*steps: str) -> None:
    """The next command, or the choice there is."""
    for i, step in enumerate(steps):
        print(f"{'next: ' if i == 0 else '   or '} {step}")


def write_private(path: Path, text: str) -> None:
    """Write a file for one pair of eyes."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as stream:
            stream.write(text)
    except OSError as error:
        raise misunderstood(f"{path} cannot be written ({error.strerror})", "--to FILE in a folder of yours") from None


def der(consortium: Consortium) -> bytes:
    """The authority's certificate."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return consortium.authority.certificate.public_bytes(Encoding.DER)


# What is shown --------------------------------------------------------------------------------------------------------


def describe_server(consortium: Consortium) -> dict[str, Any]:
    """Server, sites and runs."""
    from server.operator import server_status
    from server.show import describe_run

    running = server_status(consortium.folder)
    return {
        "name": consortium.config.name,
        "host": consortium.config.host,
        "port": consortium.config.port,
        "running": bool(running and running["ready"]),
        "server": running,
        "sites": describe_sites(consortium),
        "runs": [describe_run(consortium, row) for row in consortium.runs()],
    }


def describe_sites(consortium: Consortium) -> list[dict[str, Any]]:
    """Each site, and whether its node is connected as far as the SuperLink can be asked."""
    from server.superlink import SuperLink

    try:
        online = {node.node_id for node in SuperLink(consortium.folder).list_nodes() if node.is_online}
        known = True
    except FederadError:
        online, known = set(), False
    return [
        {
            "name": site.name,
            "status": site.status,
            "online": site.node_id in online if known else None,
            "node_id": str(site.node_id) if site.node_id is not None else None,
            "certificate_until": site.not_after.isoformat(timespec="seconds") if site.not_after else None,
            "last_seen": site.last_seen.isoformat(timespec="seconds") if site.last_seen else None,
            "word": site.word,
            "scanners": list(site.scanners),
        }
        for site in consortium.sites()
    ]


def sites_table(rows: list[dict[str, Any]]) -> Table:
    """The hospitals."""
    table = Table(title="sites" if rows else "no site has been invited")
    for column in ("site", "status", "connected", "last seen", "certificate until", "says", "scanners"):
        table.add_column(column)
    for row in rows:
        connected = (
            {True: "[green]yes[/]", False: "no", None: "?"}[row["online"]] if row["status"] == "enrolled" else ""
        )
        until = (row["certificate_until"] or "")[:10]
        table.add_row(
            row["name"], row["status"], connected, ago(row["last_seen"]), until, row["word"], ", ".join(row["scanners"])
        )
    return table


def server_line(told: dict[str, Any]) -> str:
    """One line about the server."""
    state = "[green]running[/]" if told["running"] else "[yellow]not running[/]"
    since = f" since {told['server']['since']}" if told["server"] else ""
    return f"{told['name']} at {told['host']}:{told['port']}: {state}{since}"


def ago(moment: str | None) -> str:
    """How long ago, in the largest unit that fits."""
    if not moment:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def next_of_run(folder: Path, described: dict[str, Any]) -> tuple[str, ...]:
    """What can be done with a run that stands where this one does."""
    name, state = described["run"], described["state"]
    if state in ("paused", "interrupted", "stopped", "failed", "offered"):
        return (hint(folder, f"resume {name}"),)
    if state == "finished" and described["asks"] == "fingerprint":
        return (hint(folder, f"configure {name} PLAN.toml --to PLAN2.toml"),)
    if state == "finished":
        return (hint(folder, f"export {name} --to MODEL.onnx"), f"see {described['folder']}/result.json")
    return (hint(folder, f"watch {name}"), hint(folder, f"stop {name}"))


def start_detached(folder: Path) -> None:
    """Start the server as a process of its own and wait until all of it answers."""
    from server.operator import server_status
    from server.processes import environment, wait_until

    (folder / "logs").mkdir(mode=0o700, exist_ok=True)
    log_file, told_file = folder / "logs" / "server.log", folder / "logs" / "start.json"
    with log_file.open("ab") as log_stream, told_file.open("wb") as told_stream:
        process = subprocess.Popen(  # noqa: S603  the command is ours
            [sys.executable, "-m", "server.cli", "start", "--dir", str(folder), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=told_stream,
            stderr=log_stream,
            env=environment(),
            start_new_session=True,
        )

    def is_ready() -> bool:
        running = server_status(folder)
        return bool(running and running["ready"] and running["pid"] == process.pid)

    if wait_until(is_ready, START_S, unless=lambda: process.poll() is not None):
        return
    if process.poll() is None:
        process.terminate()
    process.wait()
    told = told_file.read_text(encoding="utf-8").strip().splitlines()
    raise error_told(told[-1] if told else "", log_file)


def error_told(line: str, log_file: Path) -> FederadError:
    """The numbered error that another federad-server printed as JSON."""
    try:
        told = json.loads(line)
        code = told["error"] if told["error"] in TITLES else "S192"
        return FederadError(code, happened=told["happened"], because=told["because"], remedies=told["remedies"])
    except (ValueError, KeyError, TypeError):
        return FederadError(
            "S192",
            happened="The server ended before it was ready.",
            because="Nothing was left running.",
            remedies=(f"look into {log_file}", "or start it without --detach to see what it says"),
        )


def tell_started(consortium: Consortium, as_json: bool) -> None:
    """Say that the server runs."""
    from server.bundle import make_bundle

    config, bundle = consortium.config, make_bundle().sha256
    told = {"name": config.name, "host": config.host, "port": config.port, "bundle_sha256": bundle}
    text = f"{config.name} is running; sites reach it at {config.host}:{config.port}.\n  bundle  {bundle}"
    steps = (hint(consortium.folder, "invite SITE"), hint(consortium.folder, "run PLAN.toml"))
    done(told | {"ready": True}, text, as_json, *steps)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
