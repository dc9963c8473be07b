"""``federad-site``: take part in a consortium with this hospital's data."""

from __future__ import annotations

import os

for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
}.items():  # nothing here calls home; set before the packages underneath are imported
    os.environ.setdefault(_name, _value)

import json  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import stat  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from datetime import timedelta  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Any, Literal  # noqa: E402

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from client.folder import SiteFolder, become_owner, cannot, name_of, owner_of  # noqa: E402
from client.processes import holder  # noqa: E402
from shared_models.commands import run_command, typed  # noqa: E402
from shared_models.errors import FederadError  # noqa: E402

UP_S = 90.0
"""How long ``start`` waits for both processes on a busy machine [s]."""

STOP_S = 60.0
"""How long ``stop`` waits before it stops being polite [s]."""

app = typer.Typer(
    help="Take part in a consortium with this hospital's data; scans stay here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
audit_app = typer.Typer(help="What has left this hospital, and what was refused.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")

Site = Annotated[
    Path | None,
    typer.Option("--site", help="The site's folder; else $FEDERAD_SITE, the current folder, or ./federad-site."),
]
Declared = Annotated[
    int | None,
    typer.Option(
        "--patients-declared",
        min=1,
        help="Rounded, public number of patients that training draws from (of images with unit = image).",
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with this site's images; it is only read.")]
PlanName = Annotated[str, typer.Argument(metavar="PLAN", help="Its name, or the first characters of its hash.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder.")],
    name: Annotated[str, typer.Option("--name", help="What this site is called in the consortium.")],
    data: Annotated[Path, typer.Option("--data", help="Folder with this site's images; it is only read.")],
    as_json: AsJson = False,
) -> None:
    """Make the site's folder without joining a consortium yet; enrol makes one too."""
    folder = SiteFolder(directory.absolute())
    _make_site(folder, name, data)
    _show(
        folder,
        {"site": name, "folder": str(folder.root)},
        f"The site {escape(name)} is in {escape(str(folder.root))}.",
        "enrol INVITATION",
        as_json,
    )


@app.command()
def enrol(
    invitation: Annotated[
        str | None, typer.Argument(metavar="INVITATION", help="The line from the operator, or a file that holds it.")
    ] = None,
    data: Data = None,
    site: Site = None,
    request: Annotated[
        Path | None, typer.Option("--request", help="Without a network: write the request for the operator here.")
    ] = None,
    reply: Annotated[Path | None, typer.Option("--reply", help="Without a network: the operator's reply.")] = None,
    as_json: AsJson = False,
) -> None:
    """Join a consortium; this site's keys are made here and never leave."""
    from client import enrolment

    folder = SiteFolder.find(site)
    if reply is not None:
        folder.require()
        _joined(folder, enrolment.take_reply(folder.courier, _read_reply(reply)), as_json)
        return
    if invitation is None:
        raise cannot("No invitation was given.", "It says where the consortium is.", "ask the operator for one")
    read = enrolment.read_invitation(invitation)
    _make_site(folder, read.site, data)
    if request is None:
        _joined(folder, enrolment.enrol(read, folder.courier), as_json)
        return
    _write(request, enrolment.make_request(read, folder.courier).encode())
    _show(
        folder,
        {"site": read.site, "folder": str(folder.root), "request": str(request)},
        f"Send {escape(str(request))} to the operator of {escape(read.consortium)}; no key is in it.",
        "enrol --reply FILE",
        as_json,
    )


@app.command()
def renew(site: Site = None, as_json: AsJson = False) -> None:
    """Renew this site's certificate now; while federad-site runs, that happens by itself in its last month."""
    from client import enrolment
    from client.link import Link

    folder = SiteFolder.find(site)
    folder.require()
    become_owner(folder.courier)
    with Link.open(folder.courier) as link:
        enrolment.renew(folder.courier, link, before=timedelta.max)
    ends = enrolment.certificate_ends(folder.courier)
    text = f"The certificate was renewed over the same key; it is good until {ends:%Y-%m-%d}."
    _show(folder, {"not_after": ends.isoformat()}, text, "status", as_json)


@app.command()
def check(
    plan: Annotated[
        str | None, typer.Argument(metavar="PLAN", help="Look at the data against this plan: a file, or one on offer.")
    ] = None,
    site: Site = None,
    part: Annotated[str | None, typer.Option("--part", hidden=True)] = None,
    as_json: AsJson = False,
) -> None:
    """Look whether all is in order: data, device, clock, connection, keys; writes a page with pictures that stays here."""
    from client.checks import Check, run_check, run_checks

    folder = SiteFolder.find(site)
    folder.require()
    if plan is not None and plan.endswith(".toml"):
        plan = str(Path(plan).absolute())
    if part is not None:
        become_owner(folder.root / part)
        print(json.dumps([one.as_json() for one in run_check(folder, part, plan)]))
        return
    results: list[Check] = run_checks(folder, plan)
    if as_json:
        print(json.dumps([one.as_json() for one in results]))
    else:
        for one in results:
            mark = "[green]ok[/]  " if one.error is None else f"[red]{one.error['error']}[/]"
            print_line(f"{mark}  {escape(one.name):<12} {escape(one.text)}")
    wrong = [one for one in results if one.error is not None]
    if wrong:
        raise _from_json(wrong[0].error or {})
    if not as_json:
        _next(folder, "plans" if holder(folder.courier / "process.lock") else "start")


@app.command("left-out")
def left_out(site: Site = None, as_json: AsJson = False) -> None:
    """Name the files that check left out, and why. Their names may be patients' names: they are kept nowhere."""
    folder = SiteFolder.find(site)
    named = _station(folder).skipped_files()
    if as_json:
        print(json.dumps([{"file": str(file), "reason": reason.value} for file, reason in named]))
        return
    for file, reason in named:
        print(f"{reason.value}\t{file}")
    if not named:
        print_line("Every file below the data folder is used.")


@app.command()
def start(
    site: Site = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay here until Ctrl-C; for containers.")] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Computing threads of the station; 0 for as many as there are.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Start the station and the courier."""
    from client.link import Membership
    from client.supervisor import supervise

    folder = SiteFolder.find(site)
    folder.require()
    member = Membership.load(folder.courier)
    _require_rights(folder)
    if foreground:
        _log_to_stderr()
        supervise(folder, threads=threads)
        return
    if (other := holder(folder.lock) or _part_that_runs(folder)) is not None:
        raise FederadError(
            "C156",
            happened=f"This site is started already: process {other}.",
            because="Two of it would answer the same questions.",
            remedies=("federad-site status shows how it is", "federad-site stop ends it"),
        )
    _start_in_background(folder, threads)
    state = _wait_until_up(folder)
    trouble = (state["courier"] or {}).get("trouble")
    text = f"The station of {escape(member.site)} and its courier are running."
    if trouble:
        text += f"\n[yellow]{_told(trouble)}[/] It is tried again by itself."
    else:
        text += f" {escape(member.name)} at {escape(member.host)}:{member.port} is reached."
    _show(folder, {**state, "site": member.site}, text, "plans", as_json)


@app.command()
def status(site: Site = None, as_json: AsJson = False) -> None:
    """Show what is running and how it is."""
    folder = SiteFolder.find(site)
    folder.require()
    state = _state(folder)
    if as_json:
        print(json.dumps(state))
        return
    station, courier = state["station"], state["courier"]
    if station is None:
        print_line("station   [red]not running[/]")
    else:
        busy = station.get("busy")
        doing = f"{busy['kind']}, round {busy['round']} of {busy['run']}" if busy else "waiting for questions"
        print_line(f"station   [green]running[/], {escape(doing)}")
    if courier is None:
        print_line("courier   [red]not running[/]")
    else:
        print_line(
            f"courier   [green]running[/], consortium last reached {escape(str(courier.get('connected') or 'never'))}"
        )
        if trouble := courier.get("trouble"):
            print_line(f"          [yellow]{_told(trouble)}[/]")
    _next(folder, "plans" if station else "start")


@app.command()
def stop(site: Site = None, as_json: AsJson = False) -> None:
    """Stop the station and the courier; a round in progress is given up, and asked for again later."""
    folder = SiteFolder.find(site)
    folder.require()
    pid = holder(folder.lock)
    if pid is not None:
        _end(folder, pid)
    elif (part := _part_that_runs(folder)) is not None:
        raise cannot(
            f"Process {part} of this site was not started by federad-site start.",
            "Whatever keeps it running would start it again.",
            "as services: sudo systemctl stop federad-courier federad-station",
            "as containers: docker compose down",
        )
    _show(folder, {"stopped": pid is not None}, "Stopped." if pid else "It was not running.", "start", as_json)


@app.command()
def plans(declared: Declared = None, site: Site = None, as_json: AsJson = False) -> None:
    """List the plans that the operator offers, what each would cost a patient, and what was decided here."""
    folder = SiteFolder.find(site)
    station = _station(folder)
    listed = station.plans()
    costs = {one.plan.sha256: _cost(station, one.plan, declared) for one in listed}
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": one.plan.name,
                        "sha256": one.plan.sha256,
                        "state": one.state,
                        "run": one.run,
                        "issued": one.issued,
                        "cost": costs[one.plan.sha256],
                        "plan": one.plan.model_dump(mode="json"),
                    }
                    for one in listed
                ]
            )
        )
        return
    if not listed:
        print_line("No plan has been offered yet.")
        _next(folder, "status")
        return
    table = Table()
    for column in ("plan", "hash", "task", "rounds", "costs a patient", "offered", "here"):
        table.add_column(column)
    for one in listed:
        kind = ": ".join(filter(None, (one.plan.task.kind, ", ".join(one.plan.task.named_labels))))
        if one.plan.asks is not None:
            kind = f"{one.plan.asks} of images; trains nothing"
        table.add_row(
            one.plan.name,
            one.plan.sha256[:12],
            kind,
            str(one.plan.rounds),
            costs[one.plan.sha256]["text"],
            one.issued[:16].replace("T", " "),
            one.state,
        )
    Console().print(table)
    waiting = [one.plan for one in listed if one.state == "offered"]
    if waiting:
        size = f" --patients-declared {declared or 'N'}" if waiting[0].privacy is not None else ""
        _next(folder, f"approve {waiting[0].name}{size}", f"refuse {waiting[0].name}")


@app.command()
def approve(
    plan: PlanName,
    declared: Declared = None,
    start_is_foreign: Annotated[
        bool,
        typer.Option(
            "--start-is-foreign", help="No patient of this hospital was used for the model at which the plan begins."
        ),
    ] = False,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Let a plan train here: looks through the data, prepares it, and agrees on what it may cost."""
    folder = SiteFolder.find(site)
    station = _station(folder)
    chosen = station.plan_named(plan)
    with _bar(f"preparing images for {chosen.plan.name}", as_json) as step:
        cohort = station.approve(chosen.plan, step, declared_size=declared, start_is_foreign=start_is_foreign)
    patients = {split: len(cohort.patients(split)) for split in ("train", "validation", "test")}
    text = (
        f"may train here, on {patients['train']} patients, with {patients['validation']} for validation and "
        f"{patients['test']} for test."
        if chosen.plan.asks is None
        else f"may count spacings and sizes of the images of {patients['train']} patients, once."
    )
    _show(
        folder,
        {"plan": chosen.plan.name, "sha256": chosen.plan.sha256, "state": "approved", "patients": patients},
        f"{chosen.plan.name} ({chosen.plan.sha256[:12]}) {text}",
        "status",
        as_json,
    )


@app.command()
def refuse(plan: PlanName, site: Site = None, as_json: AsJson = False) -> None:
    """Do not let a plan train here, or no more."""
    folder = SiteFolder.find(site)
    station = _station(folder)
    chosen = station.plan_named(plan)
    station.refuse(chosen.plan)
    _show(
        folder,
        {"plan": chosen.plan.name, "sha256": chosen.plan.sha256, "state": "refused"},
        f"{chosen.plan.name} ({chosen.plan.sha256[:12]}) does not train here.",
        "plans",
        as_json,
    )


@app.command()
def exclude(
    patients: Annotated[
        list[str] | None, typer.Argument(metavar="PATIENT...", help="PatientIDs, or names of subjects' folders.")
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--from", help="A file with one on each line; keeps them out of the shell's history.")
    ] = None,
    take_back: Annotated[bool, typer.Option("--take-back", help="Let them take part again.")] = False,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Let patients take part no more, because they withdrew their consent; holds for every plan from now on."""
    folder = SiteFolder.find(site)
    names = [*(patients or []), *(_lines(listed) if listed is not None else [])]
    if not names:
        raise cannot("No patient was named.", "The list holds those who are.", "exclude PATIENT", "exclude --from FILE")
    done = _station(folder).exclude(names, take_back=take_back)
    text = (
        f"{done.changed} of {done.named} were {'taken back' if take_back else 'excluded'}; {done.in_all} patients are "
    )
    text += f"excluded now. {done.volumes_removed} prepared volumes were removed."
    if done.in_catalogue is not None and done.in_catalogue < done.named:
        n_unknown = done.named - done.in_catalogue
        text += f" [yellow]{n_unknown} of those named have no images here: check how they are spelt.[/]"
    _show(folder, done.as_json(), text, "audit show", as_json)


@app.command()
def wipe(plan: PlanName, site: Site = None, as_json: AsJson = False) -> None:
    """Remove what a refused plan has left here, and list what is gone; ledger and audit stay."""
    from client.wiping import KEPT

    folder = SiteFolder.find(site)
    station = _station(folder)
    chosen = station.plan_named(plan)
    gone = station.wipe(chosen.plan)
    told = {
        "plan": chosen.plan.name,
        "sha256": chosen.plan.sha256,
        "gone": [one.as_json() for one in gone],
        "kept": KEPT,
    }
    if as_json:
        print(json.dumps(told))
        return
    table = Table(title=f"gone of {chosen.plan.name} ({chosen.plan.sha256[:12]})")
    for column in ("what", "files", "bytes"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for one in gone:
        table.add_row(one.what, f"{one.files:,}", f"{one.n_bytes:,}")
    Console().print(table)
    for what, why in KEPT.items():
        print_line(f"The {what} stays: {why}.")
    _next(folder, "audit verify")


@app.command()
def ledger(
    site: Site = None,
    after_restore: Annotated[
        bool, typer.Option("--after-restore", help="An older copy was put back: count all that was anchored as spent.")
    ] = False,
    begin_anew: Annotated[
        bool, typer.Option("--begin-anew", help="The history is lost: count it as spent without bound.")
    ] = False,
    new_anchor: Annotated[
        bool,
        typer.Option("--new-anchor", help="The anchor moved or is lost, and the ledger is the newest: write it anew."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what every run has cost a patient here, and how that is reckoned."""
    from client.statement import shown, statement

    folder = SiteFolder.find(site)
    station = _station(folder)
    if after_restore:
        print_line(f"{station.recover_ledger()} entries were missing and count as spent.")
    if begin_anew:
        station.begin_ledger_anew()
    if new_anchor:
        station.renew_anchor()
    told = statement(station)
    if as_json:
        print(json.dumps(told))
        return
    Console().print(shown(told))
    _next(folder, "audit verify")


@app.command()
def releases(site: Site = None, as_json: AsJson = False) -> None:
    """List the consortium's models, and which of them are here."""
    from client.releases import listed

    folder = SiteFolder.find(site)
    folder.require()
    become_owner(folder.courier)
    offers = listed(folder)
    if as_json:
        print(json.dumps([one.as_json() for one in offers]))
        return
    table = Table(title="releases" if offers else "the consortium has not released a model yet")
    for column in ("release", "plan", "run", "issued", "here"):
        table.add_column(column)
    for one in offers:
        issued = one.signed.issued[:16].replace("T", " ")
        table.add_row(one.sha256[:12], one.manifest.name, one.manifest.run, issued, "yes" if one.is_here else "no")
    Console().print(table)
    waiting = [one.sha256[:12] for one in offers if not one.is_here]
    _next(folder, *([f"fetch {waiting[-1]}"] if waiting else ["status"]))


@app.command()
def fetch(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="The first digits of its SHA-256, or its run.")],
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a released model and check that the operator signed every byte of it."""
    from client.releases import fetch as fetch_release

    folder = SiteFolder.find(site)
    folder.require()
    become_owner(folder.courier)
    with _bar(f"fetching {release}", as_json) as told:
        fetched = fetch_release(folder, release, told)
    card = fetched.folder / "card.md"
    where = escape(str(fetched.folder))
    text = f"Release {fetched.sha256[:12]} of {escape(fetched.name)} is in {where}: every file is as it was signed."
    _show(
        folder, {"release": fetched.sha256, "folder": str(fetched.folder), "card": str(card)}, text, "releases", as_json
    )


@app.command()
def predict(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="The first digits of its SHA-256, or its run.")],
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A folder with one DICOM study or series, or an image.")
    ],
    to: Annotated[Path, typer.Option("--to", help="The folder to be made for what was found.")],
    deidentified: Annotated[
        bool,
        typer.Option("--deidentified", help="Write mapped identifiers and dates in place of the hospital's own."),
    ] = False,
    send: Annotated[
        bool, typer.Option("--send", help="Also send the DICOM objects to the archive in site.toml.")
    ] = False,
    maps: Annotated[
        Literal["nifti", "dicom", "both"],
        typer.Option("--maps", help="Write maps as NIfTI, as DICOM parametric maps, or both."),
    ] = "nifti",
    passes: Annotated[
        int,
        typer.Option(
            "--passes", min=0, max=100, help="Read uncertainty off this many passes with dropout, such as 20."
        ),
    ] = 0,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Let a fetched model look at a study; writes DICOM that refers to it, maps, measures and a page. For research."""
    from client.inference import predict as predict_study

    folder = SiteFolder.find(site)
    folder.require()
    become_owner(folder.station)
    with _bar("predicting", as_json) as told:
        made = predict_study(
            folder,
            release,
            study.absolute(),
            to.absolute(),
            deidentified=deidentified,
            send=send,
            maps=maps,
            passes=passes,
            on_progress=told,
        )
    text = f"{escape(str(made.page))} shows what was found. Not for clinical use."
    if "sent" in made.summary:
        text += f" {made.summary['sent']} objects are in the archive."
    result = {**made.summary, "folder": str(made.folder), "page": str(made.page)}
    _show(folder, result, text, "releases", as_json)


@app.command()
def echo(site: Site = None, as_json: AsJson = False) -> None:
    """Ask the hospital's archive, [pacs] in site.toml, whether it lets this site in; nothing is sent or fetched."""
    from client.archive import greet
    from client.retrieval import archive_of

    folder = SiteFolder.find(site)
    folder.require()
    become_owner(folder.station)
    pacs = archive_of(folder)
    greet(pacs)
    is_encrypted = pacs.tls or (pacs.dicomweb or "").startswith("https://")
    how = "over TLS" if is_encrypted else "unencrypted"
    _show(
        folder,
        {"archive": pacs.where, "encrypted": is_encrypted},
        f"{escape(pacs.where)} lets this site in, {how}.",
        "retrieve --modality MR --dry-run",
        as_json,
    )


@app.command()
def retrieve(
    since: Annotated[str | None, typer.Option("--since", help="Studies from this date on, such as 2024-03-15.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Studies up to this date.")] = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="Studies with a series of this modality, such as MR.")
    ] = None,
    description: Annotated[
        str | None, typer.Option("--description", help="Study Description; * and ? stand for anything.")
    ] = None,
    patients: Annotated[Path | None, typer.Option("--patients", help="A file with one PatientID on each line.")] = None,
    accessions: Annotated[
        Path | None, typer.Option("--accessions", help="A file with one accession number on each line.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how many studies and series would come, and fetch none.")
    ] = False,
    most_gb: Annotated[float, typer.Option("--most-gb", min=0.001, help="Take no more than this [GB].")] = 100.0,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Fetch studies from the hospital's archive, [pacs] in site.toml, into this site's folder of images."""
    from client.retrieval import query
    from client.retrieval import retrieve as fetch_studies

    folder = SiteFolder.find(site)
    folder.require()
    asked = query(
        since=since,
        until=until,
        modality=modality,
        description=description,
        patients=_lines(patients) if patients is not None else (),
        accessions=_lines(accessions) if accessions is not None else (),
    )
    become_owner(folder.station)
    with _bar("series", as_json) as told:
        done = fetch_studies(folder, asked, dry_run=dry_run, most_bytes=round(most_gb * 1e9), on_progress=told)
    if done.failed and not dry_run and as_json:
        print(json.dumps(done.as_json()))
    if done.failed and not dry_run:
        raise done.trouble()
    _show(folder, {**done.as_json(), "dry_run": dry_run}, escape(done.told(dry_run=dry_run)), "check", as_json)


@app.command()
def backup(
    to: Annotated[
        Path, typer.Argument(metavar="FILE", help="A new file outside the site's folder, or a folder for it.")
    ],
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Write all of this site but its prepared images to one file; it may go on working meanwhile."""
    from client.backup import back_up

    folder = SiteFolder.find(site)
    folder.require()
    _require_rights(folder)
    made = back_up(folder, to)
    told = {
        "file": str(made.file),
        "site": made.manifest.site,
        "files": len(made.manifest.files),
        "bytes": made.n_bytes,
    }
    text = (
        f"{made.file} holds {told['files']} files of {made.manifest.site}, {made.n_bytes / 1e6:.1f} MB. "
        "Keep it inside the hospital: this site's keys are in it."
    )
    _show(folder, told, escape(text), "status", as_json)


@app.command()
def restore(
    backup_file: Annotated[Path, typer.Argument(metavar="FILE", help="What federad-site backup wrote.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Where the images lie on this machine, if elsewhere than before.")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option("--anchor", help="The ledger's anchor, from the former folder or machine.")
    ] = None,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Make this site's folder from a backup, where there is none."""
    from client.backup import restore as put_back

    folder = SiteFolder.find(site)
    back = put_back(backup_file, folder, data=data, anchor=anchor)
    told = {
        "site": back.manifest.site,
        "made": back.manifest.made,
        "folder": str(folder.root),
        "files": len(back.manifest.files),
        "recovered": back.n_recovered,
    }
    text = f"{back.manifest.site} is back in {folder.root}, as it was at {back.manifest.made}. " + (
        "The anchor of its ledger was not there: nobody knows what was spent since, so everything counts as spent. If the "
        "anchor can be found, restore again into another folder, with --anchor."
        if back.n_recovered is None
        else f"{back.n_recovered} later entries of its ledger were taken from the anchor."
    )
    text += " Images are prepared again when its plans are approved again."
    _show(folder, told, escape(text), "check", as_json)


@audit_app.command("verify")
def audit_verify(site: Site = None, as_json: AsJson = False) -> None:
    """Check that no line of the audits was changed, taken out or moved."""
    from client.audit import FILE, AuditLog

    folder = SiteFolder.find(site)
    folder.require()
    heads = {}
    for name in ("station", "courier"):
        head = _reading(folder.root / name, AuditLog(folder.root / name / FILE).verify)
        heads[name] = {"lines": head.n, "head": head.hash}
    lines = ["Note the heads down elsewhere: with them, a rewritten audit is found out later."]
    lines += [f"{name:<8} {head['lines']:>6} lines, whole; head {head['head']}" for name, head in heads.items()]
    _show(folder, heads, "\n".join(lines), "status", as_json)


@audit_app.command("show")
def audit_show(
    site: Site = None,
    run: Annotated[str | None, typer.Option("--run", help="Only of this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show every answer that has left, round by round: kinds, names, sizes, norm and cost, never values."""
    from client.egress import egress, told

    folder = SiteFolder.find(site)
    folder.require()
    entries = _reading(folder.station, lambda: list(egress(folder.station, run)))
    table = Table(title="what has left" if entries else "nothing has left yet")
    for column in ("time", "run", "round", "question", "what left"):
        table.add_column(column)
    for entry in entries:
        asked = (str(entry.get(key, "")) for key in ("run", "round", "kind"))
        table.add_row(entry["time"][:16].replace("T", " "), *asked, told(entry))
    if as_json:
        print(json.dumps(entries))
        return
    Console().print(table)
    _next(folder, "audit verify")


@app.command(hidden=True)
def station(site: Site = None, threads: Annotated[int, typer.Option("--threads", min=0)] = 0) -> None:
    """Be the station, until SIGTERM; for systemd."""
    folder = SiteFolder.find(site)
    folder.require()
    become_owner(folder.station)
    _log_to_file(folder.station / "logs" / "station.log")
    if threads:
        import torch

        torch.set_num_threads(threads)
    from client.service import serve

    serve(folder.station, folder.socket)


@app.command(hidden=True)
def courier(site: Site = None) -> None:
    """Be the courier, until SIGTERM; for systemd."""
    from client.courier import carry

    folder = SiteFolder.find(site)
    become_owner(folder.courier)
    _log_to_file(folder.courier / "logs" / "courier.log")
    carry(folder.courier, folder.socket)


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    stopped = FederadError(
        "R233",
        happened="Stopped by the user.",
        because="What was done until then is kept; processes that were started go on.",
        remedies=("run the same command again: it goes on from there", "federad-site status shows what is running"),
    )
    run_command(app, stopped=stopped, misunderstood=misunderstood)


def misunderstood(happened: str) -> FederadError:
    """A mistake on the command line as a numbered error."""
    return cannot(
        happened, "The command cannot tell what is wanted.", "federad-site --help", "federad-site COMMAND --help"
    )


def print_line(text: str) -> None:
    """A line for the terminal, as long as it is."""
    Console(soft_wrap=True, highlight=False).print(text)


def _show(folder: SiteFolder, result: dict[str, Any], text: str, then: str, as_json: bool) -> None:
    """What a command did, and which comes next."""
    if as_json:
        print(json.dumps({**result, "next": _command(folder, then)}))
        return
    print_line(text)
    _next(folder, then)


def _next(folder: SiteFolder, *then: str) -> None:
    """The commands that may come next, as they are typed here."""
    for number, command in enumerate(then):
        print_line(f"[dim]{'or' if number else 'next':>5}:[/]  {escape(_command(folder, command))}")


def _command(folder: SiteFolder, command: str) -> str:
    """A command about this folder: it says where that is, unless it would be found."""
    found = SiteFolder.find(None).root == folder.root
    return typed("federad-site", command) if found else f"federad-site {command} --site {shlex.quote(str(folder.root))}"


@contextmanager
def _bar(title: str, quiet: bool) -> Iterator[Any]:
    """A progress bar on the error stream; gives what is to be told (done, in all)."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, quiet=quiet),
    )
    with bars:
        bar = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _make_site(folder: SiteFolder, name: str, data: Path | None) -> None:
    """The site's folder, with its configuration; what is there already stays."""
    from client.site import SiteConfig, is_emulated

    if folder.is_made:
        _require_rights(folder)
        config = SiteConfig.load(folder.station)
        if config.name != name:
            raise cannot(
                f"{folder.root} is the folder of {config.name}, and this is about {name}.",
                "A folder belongs to one site for ever, since its secret decides which patients are in the test.",
                "for a second site, choose a second folder: --site FOLDER, or set FEDERAD_SITE",
            )
        return
    if data is None or not data.is_dir():
        raise cannot(
            "--data is missing." if data is None else f"There is no folder {data}.",
            "This site's images are read from there.",
            "--data DIR, the folder with DICOM files",
        )
    try:
        config = SiteConfig(name=name, data=str(data.absolute()))
        if is_emulated(data.absolute()):
            config = config.model_copy(update={"emulated": True})
    except ValueError:
        raise cannot(
            f"{name!a} cannot be the name of a site.",
            "It appears in logs, tables and file names.",
            "use letters, digits, points, hyphens and underscores, and begin with a letter or digit",
        ) from None
    from client.station import Station

    folder.make()
    Station.create(folder.station, config)
    folder.hand_over(folder.station)


def _joined(folder: SiteFolder, member: Any, as_json: bool) -> None:
    from client.plans import Plans

    Plans(folder.station).trust(member.name, member.plan_key_pem)
    _show(
        folder,
        {"site": member.site, "consortium": member.name, "folder": str(folder.root)},
        f"{escape(member.site)} has joined {escape(member.name)} at {escape(member.host)}:{member.port}.",
        "start",
        as_json,
    )


def _cost(station: Any, plan: Any, declared: int | None) -> dict[str, Any]:
    """What a plan would cost a patient here, for ``plans``."""
    if plan.privacy is None:
        return {"epsilon": None, "text": "no privacy: nothing bounds it"}
    cost = station.cost(plan, declared)
    if cost is None:
        return {"epsilon": plan.privacy.epsilon, "text": "say how many: --patients-declared N"}
    figures = {
        "declared_size": cost.declared_size,
        "epsilon": cost.epsilon,
        "delta": cost.delta,
        "noise_multiplier": cost.noise_multiplier,
        "sampling_rate": cost.sampling_rate,
        "lifetime_before": _finite(cost.lifetime_before),
        "lifetime_after": _finite(cost.lifetime_after),
    }
    text = f"epsilon {cost.epsilon:.3g}, delta {cost.delta:g} ({cost.declared_size} patients)"
    if plan.privacy.unit == "image":
        text += f"; {cost.image_epsilon:.3g} for an image alone"
    return figures | {"text": text}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise cannot(
            f"{path} cannot be read ({type(error).__name__}).", "It names patients.", "check the path"
        ) from None


def _read_reply(path: Path) -> Any:
    from shared_models.consortium import EnrolReply

    try:
        return EnrolReply.decode(path.read_bytes())
    except OSError as error:
        raise cannot(
            f"{path} cannot be read ({error.strerror}).", "It should hold the reply.", "check the path"
        ) from None


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise cannot(
            f"{path} cannot be written ({error.strerror}).", "The request goes there.", "choose another"
        ) from None


def _station(folder: SiteFolder) -> Any:
    """The station, opened under its own account."""
    from client.station import Station

    folder.require()
    become_owner(folder.station)
    return Station(folder.station)


def _require_rights(folder: SiteFolder) -> None:
    """This process can start both others under their accounts; C163 if not."""
    for part in (folder.station, folder.courier):
        if os.geteuid() not in (0, owner_of(part)):
            raise cannot(
                f"{part} belongs to {name_of(owner_of(part))}, and this command runs as {name_of(os.geteuid())}.",
                "The station and the courier each work under the account that their folder belongs to.",
                "run it as root: sudo federad-site ...",
            )


def _reading(folder: Path, read: Any) -> Any:
    try:
        return read()
    except FederadError:
        if not os.access(folder, os.R_OK | os.X_OK):
            raise cannot(
                f"{folder} may not be looked into by {name_of(os.geteuid())}.",
                "Its audit is for this hospital's own people.",
                "run it as root: sudo federad-site audit verify",
            ) from None
        raise


def _start_in_background(folder: SiteFolder, threads: int) -> None:
    from client.supervisor import command

    folder.logs.mkdir(exist_ok=True)
    with (folder.logs / "site.log").open("ab") as log_file:
        subprocess.Popen(  # noqa: S603  # our own command
            [*command(), "start", "--foreground", "--site", str(folder.root), "--threads", str(threads)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            cwd=folder.root,
            start_new_session=True,
        )


def _wait_until_up(folder: SiteFolder) -> dict[str, Any]:
    """Until the station answers and the courier has been to the consortium, or knows why it cannot."""
    from client.stub import not_answering

    deadline = time.monotonic() + UP_S
    with Console(stderr=True).status("starting"):
        while time.monotonic() < deadline:
            time.sleep(0.3)
            state = _state(folder)
            courier = state["courier"]
            if state["station"] and courier and (courier["connected"] or _lasting(courier["trouble"])):
                return state
    if state["station"] is None:
        raise not_answering(folder.socket)
    return state


def _lasting(trouble: dict[str, Any] | None) -> bool:
    """Trouble that does not come from the station still being on its way."""
    return trouble is not None and trouble["error"] != "C158"


def _state(folder: SiteFolder) -> dict[str, Any]:
    return {"folder": str(folder.root), "station": _station_state(folder), "courier": _courier_state(folder)}


def _station_state(folder: SiteFolder) -> dict[str, Any] | None:
    from client.stub import StationAwayError, StationStub

    if not folder.socket.exists():
        return None
    try:
        with StationStub(folder.socket) as stub:
            return stub.status()
    except (StationAwayError, FederadError, OSError):
        return None


def _courier_state(folder: SiteFolder) -> dict[str, Any] | None:
    from client.courier import LOCK, STATUS

    try:
        pid = holder(folder.courier / LOCK)
        state = json.loads((folder.courier / STATUS).read_bytes())
        return state if isinstance(state, dict) and state.get("pid") == pid else None
    except (OSError, ValueError):
        return None


def _part_that_runs(folder: SiteFolder) -> int | None:
    """The process of the courier, or of the station; None if neither runs."""
    return holder(folder.courier / "process.lock") or holder(folder.station / "process.lock")


def _end(folder: SiteFolder, pid: int) -> None:
    for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        except PermissionError:
            raise cannot(
                f"Process {pid} belongs to somebody else.", "Only its owner may end it.", "sudo federad-site stop"
            ) from None
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if holder(folder.lock) != pid:
                return
            time.sleep(0.1)


def _told(trouble: dict[str, Any]) -> str:
    return escape(f"{trouble['error']}  {trouble['happened']}")


def _from_json(parts: dict[str, Any]) -> FederadError:
    return FederadError(
        parts["error"], happened=parts["happened"], because=parts["because"], remedies=parts["remedies"]
    )


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format=_FORMAT, force=True)


def _log_to_file(path: Path) -> None:
    """This process's log: a file of limited size, and the error stream for whoever watches."""
    from logging.handlers import RotatingFileHandler

    path.parent.mkdir(mode=0o700, exist_ok=True)
    handlers: list[logging.Handler] = [RotatingFileHandler(path, maxBytes=10 * 2**20, backupCount=3, encoding="utf-8")]
    if not stat.S_ISREG(os.fstat(sys.stderr.fileno()).st_mode):  # a file would grow without end
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=handlers, force=True)
    logging.Formatter.converter = time.gmtime
    logging.getLogger("flwr").setLevel(logging.WARNING)


_FORMAT = "%(asctime)sZ %(levelname)s %(name)s: %(message)s"


if __name__ == "__main__":
    main()
