"""A site is backed up while it works, and put back whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import math
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from deployed import ROOT, Operator, ask_of, make_site

from client.accounting import Event
from client.audit import FILE as AUDIT
from client.backup import MANIFEST, back_up, look_into, restore
from client.folder import SiteFolder
from client.ledger import ANCHOR, Caps, Ledger
from client.outbox import Outbox
from client.station import Station
from shared_models.errors import FederadError
from shared_models.messages import Question, decode_answer


@pytest.fixture(scope="module")
def worked(smoke_plan, hospitals, tmp_path_factory) -> SiteFolder:
    """A site that has approved a plan and answered one round."""
    folder = make_site(tmp_path_factory.mktemp("worked") / "site", hospitals[0].folder, Operator())
    station = Station(folder.station)
    station.approve(smoke_plan)
    station.answer(ask_of(smoke_plan))
    (folder.courier / "node.key").write_text("a key")
    return folder


@pytest.fixture(scope="module")
def backup(worked, tmp_path_factory) -> Path:
    return back_up(worked, tmp_path_factory.mktemp("backup") / "site.tar").file


def restored(backup: Path, root: Path, **how: object) -> SiteFolder:
    folder = SiteFolder(root)
    restore(backup, folder, **how)
    return folder


def names(backup: Path) -> list[str]:
    with tarfile.open(backup) as archive:
        return archive.getnames()


def rewritten(backup: Path, to: Path, change) -> Path:
    """A backup with other members: ``change`` takes and gives a list of (member, content)."""
    with tarfile.open(backup) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(to, "w") as archive:
        for member, content in change(members):
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return to


def back_at_work(worked: SiteFolder, backup: Path, root: Path) -> Station:
    """The restored site, with what its anchor knows taken over."""
    anchor = worked.station / ANCHOR
    folder = SiteFolder(root)
    restore(backup, folder, anchor=anchor if anchor.exists() else None)
    return Station(folder.station)


def secret_of(folder: SiteFolder) -> bytes:
    return (folder.station / "secret").read_bytes()


class TestRestored:
    def test_site_gives_its_stored_answer_again(self, smoke_plan, worked, backup, tmp_path):
        """
        A restored site answers a question that was answered before the backup with the same bytes.
        """
        before = Station(worked.station).answer(ask_of(smoke_plan))

        assert back_at_work(worked, backup, tmp_path / "new").answer(ask_of(smoke_plan)) == before

    def test_site_has_the_same_patients_in_each_split_once_the_plan_is_approved_again(
        self, smoke_plan, worked, backup, tmp_path
    ):
        """
        Images are not in a backup: a new question is declined until they were prepared again, with the same secret.
        """
        station = back_at_work(worked, backup, tmp_path / "new")
        assert decode_answer(station.answer(ask_of(smoke_plan, round_=2))).refusal == "declined"

        cohort = station.approve(smoke_plan)

        former = Station(worked.station).cohort(smoke_plan)
        for split in ("train", "validation", "test"):
            assert cohort.patients(split) == former.patients(split)

    def test_audit_goes_on_where_it_was(self, worked, backup, tmp_path):
        """
        The restored audit is whole, begins as the former one did, and goes on with the restore.
        """
        audit = Station(restored(backup, tmp_path / "new").station).audit
        *lines, last = audit.entries()
        assert last["event"] == "restored"
        assert lines == list(Station(worked.station).audit.entries())[: len(lines)]

    def test_images_may_lie_elsewhere_on_the_new_machine(self, backup, tmp_path):
        """
        --data changes the one key of the configuration, and leaves what the hospital wrote beside it.
        """
        config = Station(restored(backup, tmp_path / "new", data=tmp_path / "pictures").station).config

        assert config.data == str(tmp_path / "pictures")
        assert config.name == "site-1"

    def test_files_are_nobody_elses(self, backup, tmp_path):
        """
        Backup and restored files can be read by their owner alone.
        """
        new = restored(backup, tmp_path / "new")

        files = [backup, new.station / "secret", new.courier / "node.key", new.station / "answers"]
        assert all(stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 for file in files)


class TestSpent:
    """Rule 17: after a restore, everything that was anchored or reserved counts as spent."""

    @pytest.fixture
    def folder(self, worked, tmp_path) -> SiteFolder:
        """A site that was charged for one round, then backed up, then charged for another."""
        folder = make_site(tmp_path / "site", worked.root, Operator())
        ledger = Ledger.open(folder.station, secret_of(folder))
        charge(ledger, 1)
        back_up(folder, tmp_path / "site.tar")
        charge(ledger, 2)
        return folder

    def test_what_was_spent_after_the_backup_counts(self, folder, tmp_path):
        """
        The restored ledger has taken over from the anchor what the backup did not know.
        """
        new = SiteFolder(tmp_path / "new")

        back = restore(tmp_path / "site.tar", new, anchor=folder.station / ANCHOR)

        former = Ledger.open(folder.station, secret_of(folder)).spent()
        assert back.n_recovered == 1
        assert len(former.charges) == 2
        assert Ledger.open(new.station, secret_of(new)).spent() == former

    def test_without_the_anchor_everything_counts_as_spent(self, folder, tmp_path):
        """
        Nothing in a backup can stand in for the anchor, so nothing bounds what was spent.
        """
        new = SiteFolder(tmp_path / "new")

        back = restore(tmp_path / "site.tar", new)

        assert back.n_recovered is None
        assert Ledger.open(new.station, secret_of(new)).spent().lifetime_epsilon(1e-5) == math.inf

    def test_backup_from_before_the_first_charge_does_not_start_at_zero(self, worked, tmp_path):
        """
        A backup that knows of no spending says nothing about what came after it.
        """
        folder = make_site(tmp_path / "site", worked.root, Operator())
        Ledger.open(folder.station, secret_of(folder))
        back_up(folder, tmp_path / "site.tar")
        charge(Ledger.open(folder.station, secret_of(folder)), 1)
        new = SiteFolder(tmp_path / "new")

        restore(tmp_path / "site.tar", new)

        assert Ledger.open(new.station, secret_of(new)).spent().lifetime_epsilon(1e-5) == math.inf

    def test_anchor_elsewhere_is_neither_taken_along_nor_changed(self, folder, tmp_path):
        """
        An anchor that site.toml names stays where it is, as it is.
        """
        anchor = folder.station / "witness"
        (folder.station / ANCHOR).rename(anchor)
        config = folder.station / "site.toml"
        config.write_text(f'anchor = "{anchor}"\n{config.read_text()}')
        made = back_up(folder, tmp_path / "second.tar")
        charge(Ledger.open(folder.station, secret_of(folder), anchor), 3)
        before = anchor.read_bytes()

        back = restore(made.file, SiteFolder(tmp_path / "new"))

        assert "station/witness" not in made.manifest.files
        assert back.n_recovered == 1
        assert anchor.read_bytes() == before

    def test_anchor_of_another_site_makes_no_site(self, folder, tmp_path):
        """
        An anchor that does not go on where the ledger ends is refused, and nothing is restored.
        """
        other = make_site(tmp_path / "other", folder.root, Operator())
        charge(Ledger.open(other.station, secret_of(other)), 1)
        new = SiteFolder(tmp_path / "new")

        with pytest.raises(FederadError) as error:
            restore(tmp_path / "site.tar", new, anchor=other.station / ANCHOR)

        assert error.value.code == "C166"
        assert not new.is_made

    def test_second_anchor_is_not_put_over_the_first(self, folder, tmp_path):
        """
        Of two anchors that differ a person has to choose.
        """
        anchor = tmp_path / "witness"
        config = folder.station / "site.toml"
        config.write_text(f'anchor = "{anchor}"\n{config.read_text()}')
        made = back_up(folder, tmp_path / "second.tar")
        anchor.write_text("another\n")
        new = SiteFolder(tmp_path / "new")

        with pytest.raises(FederadError, match="another anchor"):
            restore(made.file, new, anchor=folder.station / ANCHOR)

        assert anchor.read_text() == "another\n"
        assert not new.is_made


def charge(ledger: Ledger, round_: int) -> None:
    """Reserve a round."""
    event = Event(noise_multiplier=1.0, sampling_rate=0.1, steps=10)
    ledger.reserve(
        Question("run-1", round_, "train", "a" * 64, f"{round_:064x}"),
        cohort="c",
        events=[event],
        whole_run=[event] * 2,
        caps=Caps(run=100.0, delta=1e-5, lifetime=100.0, lifetime_delta=1e-5),
    )


class TestWritten:
    def test_what_must_not_go_back_in_time_is_left_out(self, worked, tmp_path):
        """
        Anchor, locks, logs, prepared images, the salt of their key and Flower's own files are in no backup.
        """
        for name in ("station/ledger.anchor", "station/logs/station.log", "courier/flower/x", "courier/status.json"):
            path = worked.root / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")

        found = names(back_up(worked, tmp_path / "site.tar").file)

        assert not [
            name for name in found for word in ("anchor", "lock", "volumes", "salt", "logs", "flower") if word in name
        ]
        assert {"station/secret", "station/site.toml", "station/audit.jsonl", "courier/node.key"} <= set(found)
        assert any(name.startswith("station/cohorts/") for name in found)

    def test_working_site_is_backed_up_whole(self, smoke_plan, hospitals, tmp_path):
        """
        Lines and notices that are written meanwhile are in a backup wholly or not at all.
        """
        folder = make_site(tmp_path / "site", hospitals[0].folder, Operator())
        station, outbox, over = Station(folder.station), Outbox(folder.station), threading.Event()

        def work() -> None:
            while not over.is_set():
                station.audit.write("notice", word="started", filling="x" * 2000)
                outbox.put(b"y" * 2000)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            files = [back_up(folder, tmp_path / f"{i}.tar").file for i in range(8)]
        finally:
            over.set()
            worker.join()

        heads = []
        for i, file in enumerate(files):
            new = restored(file, tmp_path / f"new-{i}")
            heads.append(Station(new.station).audit.verify().n - 1)
            with sqlite3.connect(new.station / "outbox.sqlite") as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert heads == sorted(heads)
        assert heads[-1] > heads[0]

    def test_nothing_is_ahead_of_what_speaks_of_it(self, backup):
        """
        Databases stand before the files that they name, and the audit after all else and after the note of its last line.
        """
        station = [Path(name).name for name in names(backup) if name.startswith("station/")]
        databases = [name.endswith(".sqlite") for name in station]

        assert databases == sorted(databases, reverse=True)
        assert station[-2:] == [f"{AUDIT}.head", AUDIT]

    def test_database_that_was_left_in_the_middle_of_a_change_is_as_before_it(self, hospitals, tmp_path):
        """
        What a killed process had written of a change that it never finished is not in a backup.
        """
        folder = make_site(tmp_path / "site", hospitals[0].folder, Operator())
        outbox = Outbox(folder.station)
        for _ in range(40):
            outbox.put(b"kept" * 1000)
        subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, folder.station / "outbox.sqlite"], check=False)
        assert (folder.station / "outbox.sqlite-journal").exists()

        new = restored(back_up(folder, tmp_path / "site.tar").file, tmp_path / "new")

        assert Outbox(new.station).waiting()[1] == [b"kept" * 1000] * 40

    def test_no_file_is_ever_replaced(self, worked, backup):
        """
        A backup does not take the place of another one.
        """
        content = backup.read_bytes()
        with pytest.raises(FederadError, match="there already"):
            back_up(worked, backup)

        assert backup.read_bytes() == content

    def test_full_disk_leaves_no_half_backup(self, worked, tmp_path):
        """
        Where there is no room for all of it, nothing is left.
        """
        with longest_file(20_000), pytest.raises(FederadError) as error:
            back_up(worked, tmp_path / "site.tar")

        assert error.value.code == "C163"
        assert list(tmp_path.iterdir()) == []


class TestDamaged:
    def test_changed_or_cut_backup_is_put_back_exactly_or_not_at_all(self, backup, tmp_path):
        """
        Wherever a bit tips or the end is missing, the site is as it was or there is none.
        """
        content = backup.read_bytes()
        expected = files_of(restored(backup, tmp_path / "whole"))
        broken = tmp_path / "broken.tar"
        outcomes = Counter()
        for i in range(60):
            position = i * len(content) // 60
            tipped = bytearray(content)
            tipped[position] ^= 0x10
            for damaged in (bytes(tipped), content[:position]):
                broken.write_bytes(damaged)
                outcomes[outcome(broken, tmp_path / "new", expected)] += 1

        assert outcomes.keys() <= {"as it was", "C179"}
        assert outcomes["C179"] > 60

    @pytest.mark.parametrize("name", ["../outside", "/outside", "station/../../outside", "outside", "station/./x"])
    def test_nothing_is_written_outside_of_the_folder(self, backup, tmp_path, name):
        """
        A name that leads elsewhere makes the whole backup unusable.
        """
        forged = with_file(backup, tmp_path / "forged.tar", tarfile.TarInfo(name))

        with pytest.raises(FederadError) as error:
            restored(forged, tmp_path / "a" / "new")

        assert error.value.code == "C179"
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
    def test_only_plain_files_are_taken(self, backup, tmp_path, kind):
        """
        Links and devices are refused.
        """
        member = tarfile.TarInfo("station/link")
        member.type, member.linkname = kind, "/etc/passwd"

        with pytest.raises(FederadError) as error:
            look_into(with_file(backup, tmp_path / "forged.tar", member))

        assert error.value.code == "C179"

    def test_newer_version_is_named(self, backup, tmp_path):
        """
        A backup from a newer federad says which one.
        """

        def newer(members):
            fields = json.loads(members[-1][1]) | {"format": 2, "federad": "9.1.0"}
            return [*members[:-1], (members[-1][0], json.dumps(fields).encode())]

        with pytest.raises(FederadError, match=r"9\.1\.0, which is newer"):
            look_into(rewritten(backup, tmp_path / "newer.tar", newer))

    def test_site_that_is_there_is_never_overwritten(self, worked, backup):
        """
        A restore goes into an empty place.
        """
        before = files_of(worked)
        with pytest.raises(FederadError) as error:
            restore(backup, worked)

        assert error.value.code == "C163"
        assert files_of(worked) == before

    def test_restore_that_was_cut_off_leaves_no_site_and_is_done_again(self, backup, tmp_path):
        """
        Without room for all of it there is no site; with room, the same command makes it.
        """
        folder = SiteFolder(tmp_path / "new")
        with longest_file(20_000), pytest.raises(FederadError) as error:
            restore(backup, folder)
        assert error.value.code == "C163"
        assert any(folder.root.rglob("*.sqlite"))
        assert not folder.station.exists()

        restore(backup, folder)

        assert folder.is_made


def test_both_commands_say_what_they_did(worked, tmp_path):
    """
    backup into a folder names the file itself; restore makes the site from it.
    """
    made = command("backup", tmp_path, "--site", worked.root)
    back = command("restore", made["file"], "--site", tmp_path / "new", "--data", tmp_path)

    assert Path(made["file"]).parent == tmp_path
    assert back["site"] == made["site"] == "site-1"
    assert back["next"].startswith("federad-site check")
    assert Station(tmp_path / "new" / "station").config.data == str(tmp_path)


def outcome(backup: Path, root: Path, expected: dict[str, bytes]) -> str:
    """How a restore ends; the folder is removed again."""
    try:
        new = restored(backup, root)
    except FederadError as error:
        return error.code if not root.exists() else f"{error.code}, and something is there"
    found = files_of(new)
    shutil.rmtree(root)
    return "as it was" if found == expected else "otherwise"


def command(*arguments: object) -> dict:
    line = [sys.executable, "-m", "client.cli", *map(str, arguments), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


KILLED_WHILE_WRITING = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.execute("PRAGMA cache_size = 1")
database.execute("UPDATE notices SET body = zeroblob(4000)")
os.kill(os.getpid(), signal.SIGKILL)
"""


def files_of(folder: SiteFolder) -> dict[str, bytes]:
    """Every file; of the audit and the ledger, in which a restore is noted, only what was in the backup."""
    files = {
        path.relative_to(folder.root).as_posix(): path.read_bytes() for path in folder.root.rglob("*") if path.is_file()
    }
    lines = files[f"station/{AUDIT}"].splitlines(keepends=True)
    audit = b"".join(line for line in lines if b'"event":"restored"' not in line)
    begun = {name: b"" for name in files if "ledger" in name or name.endswith(f"{AUDIT}.head")}
    return {**files, f"station/{AUDIT}": audit, **begun}


def with_file(backup: Path, to: Path, member: tarfile.TarInfo) -> Path:
    """The backup with one more empty member, of which the manifest knows."""

    def more(members):
        manifest, text = members[-1]
        assert manifest.name == MANIFEST
        fields = json.loads(text)
        fields["files"][member.name] = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
        return [*members[:-1], (member, b""), (manifest, json.dumps(fields).encode())]

    return rewritten(backup, to, more)


@contextmanager
def longest_file(n_bytes: int):
    """No file may grow longer, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
