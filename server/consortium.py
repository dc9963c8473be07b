"""The consortium as the operator keeps it: sites, invitations, certificates, plans on offer and runs.

One folder, opened by every process of the operator at once; what must not be lost stands in one SQLite file. What a site
may do is looked up here at each call, so that a revoked site is out before its next message::

    consortium.toml      name, host, port
    keys/                the authority, the server's certificate, the key that signs plans; readable by the owner alone
    consortium.sqlite    everything that happened
    depot/               parcels too long for Flower's own channel, by hash
    releases/            released models (``registry``)

Flower's SuperLink has its own list of keys. The two hooks ``register`` and ``unregister`` keep it in step; while it is not
running, what is left to do waits for :meth:`Consortium.settle`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import sqlite3
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from server import pki
from server.depot import Depot
from shared_models.consortium import (
    CONSORTIUM_NAME,
    RUN,
    SITE_NAME,
    Document,
    EnrolReply,
    EnrolRequest,
    Host,
    Invitation,
    Notice,
    Port,
    RenewReply,
    RenewRequest,
    SignedPlan,
    encode_url,
    invitation_id,
    utc_now,
)
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.signing import fingerprint, private_pem, public_pem

log = logging.getLogger(__name__)

FILE = "consortium.toml"
DATABASE = "consortium.sqlite"

INVITED_S = 7 * 86_400.0
"""How long an invitation is taken unless the operator says otherwise [s]."""

MAX_INVITED_S = 90 * 86_400.0
SEEN_EVERY_S = 5.0
"""A site's last contact is written down no more often than this [s]."""

_RENEW_SERVER = timedelta(days=30)

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    id TEXT PRIMARY KEY, site TEXT NOT NULL, public_key BLOB NOT NULL, expires INTEGER NOT NULL,
    withdrawn INTEGER NOT NULL DEFAULT 0, used TEXT, site_key TEXT, node_key TEXT, certificate TEXT);
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY COLLATE NOCASE, status TEXT NOT NULL, last_seen REAL, word TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY, site TEXT NOT NULL, not_after REAL NOT NULL, revoked INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS nodes (
    public_key TEXT PRIMARY KEY, site TEXT NOT NULL, node_id TEXT, wanted INTEGER NOT NULL DEFAULT 1);
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, plan_sha256 TEXT NOT NULL, signed TEXT NOT NULL, seed INTEGER NOT NULL, state TEXT NOT NULL,
    flower_run_id TEXT, is_open INTEGER NOT NULL DEFAULT 1);
CREATE TABLE IF NOT EXISTS approvals (
    site TEXT NOT NULL, plan_sha256 TEXT NOT NULL, kind TEXT NOT NULL, word TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (site, plan_sha256));
CREATE TABLE IF NOT EXISTS progress (
    run TEXT NOT NULL, site TEXT NOT NULL, round INTEGER NOT NULL, done INTEGER NOT NULL, total INTEGER NOT NULL,
    PRIMARY KEY (run, site));
CREATE TABLE IF NOT EXISTS scanners (
    site TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (site, name));
"""


class ConsortiumConfig(Document):
    """The contents of ``consortium.toml``."""

    name: str = Field(pattern=f"^{CONSORTIUM_NAME}$")
    """What the consortium is called; it stands in every certificate."""

    host: Host
    """Under which name sites reach this server."""

    port: Port = 443
    """At which port they reach it."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``folder/consortium.toml``; S183 if it is missing or wrong."""
        try:
            return cls.model_validate_json(json.dumps(tomllib.loads((folder / FILE).read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            what = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
            where = f": {'.'.join(map(str, what['loc']))}: {what['msg']}" if what else f" ({type(error).__name__})"
            raise FederadError(
                "S183",
                happened=f"{folder / FILE} cannot be used{where}.",
                because="It says what the consortium is called and where sites find it.",
                remedies=(
                    "make the folder with federad-server init DIR --host NAME",
                    "or say which folder it is: --dir DIR, or FEDERAD_SERVER in the environment",
                    f"if the file was edited, the keys are: {', '.join(cls.model_fields)}",
                ),
            ) from None

    def save(self, folder: Path) -> None:
        """Write ``folder/consortium.toml``."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.model_dump().items()]
        (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


Status = Literal["invited", "enrolled", "revoked"]


@dataclass(frozen=True)
class Site:
    """A hospital, as the operator knows it."""

    name: str
    status: Status
    node_public_key_pem: str | None = None
    """Public half of the SuperNode's key, PEM; None until the site has enrolled."""

    serial: str | None = None
    """Of its newest certificate, upper-case hex."""

    not_after: datetime | None = None
    """When that certificate ends."""

    last_seen: datetime | None = None
    """When the site last called."""

    node_id: int | None = None
    """Flower's id of its node; None while it waits for registration at the SuperLink."""

    word: str = ""
    """What the site last told of its status."""

    scanners: tuple[str, ...] = ()
    """The scanners that somebody there has typed."""


@dataclass(frozen=True)
class RunRow:
    """A run, as the operator ordered it."""

    run: str
    plan: Plan
    seed: int
    state: str
    flower_run_id: str | None
    """Flower's id of the newest attempt."""

    is_open: bool
    """Whether sites are still offered its plan."""


Register = Callable[[Site], int]
Unregister = Callable[[Site], None]


class Consortium:
    """One consortium, opened from the operator's folder.

    Parameters
    ----------
    folder
        A folder made by :meth:`create`.
    register, unregister
        Tell the SuperLink of a site's node and give its id, or take it away. They raise ``OSError`` or
        ``FederadError`` while the SuperLink does not run. Without them nodes wait for :meth:`settle`.

    Raises
    ------
    FederadError
        S183 if the folder holds no consortium.
    """

    def __init__(self, folder: Path, *, register: Register | None = None, unregister: Unregister | None = None) -> None:
        self.folder = folder
        self.config = ConsortiumConfig.load(folder)
        self.depot = Depot(folder / "depot")
        self.register, self.unregister = register, unregister
        with self._open() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA_VERSION:
                raise _not_ready(f"{DATABASE} was written by a newer federad", "this one could misread it")
            if version < _SCHEMA_VERSION:
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")

    @classmethod
    def create(cls, folder: Path, config: ConsortiumConfig) -> Self:
        """Make the folder, its keys and its database.

        Raises
        ------
        FederadError
            S183 if it holds a consortium already, or cannot be written.
        """
        try:
            if (folder / FILE).exists():
                raise _not_ready(f"{folder} holds a consortium already", "its keys are never overwritten")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("keys", "runs", "depot", "releases"):
                (folder / name).mkdir(exist_ok=True, mode=0o700)
            authority, plan_key = pki.new_authority(config.name), Ed25519PrivateKey.generate()
            _write_key(folder / "keys" / "ca.key", authority.key_pem)
            _write_key(folder / "keys" / "ca.crt", authority.pem.encode())
            _write_key(folder / "keys" / "plan.key", private_pem(plan_key))
            config.save(folder)
        except OSError as error:
            raise _not_ready(f"{folder} cannot be written ({error.strerror})", "everything is kept there") from None
        consortium = cls(folder)
        consortium.refresh_server_certificate()
        return consortium

    # Keys -----------------------------------------------------------------------------------------------------------

    @cached_property
    def authority(self) -> pki.Authority:
        """The consortium's certificate authority; S183 if its files are damaged."""
        try:
            return pki.load_authority(self._key_file("ca.key").read_bytes(), self._key_file("ca.crt").read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise _not_ready(f"keys/ca.key or keys/ca.crt cannot be used ({type(error).__name__})", _KEYS) from None

    @cached_property
    def plan_key(self) -> Ed25519PrivateKey:
        """The key that signs plans and releases; S183 if its file is damaged."""
        try:
            key = serialization.load_pem_private_key(self._key_file("plan.key").read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise _not_ready(f"keys/plan.key cannot be used ({type(error).__name__})", _KEYS) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise _not_ready("keys/plan.key holds a key of another kind", _KEYS)
        return key

    def refresh_server_certificate(self) -> bool:
        """Make the server's key and certificate where they are missing, end within 30 days or name another host.

        Returns
        -------
        bool
            Whether there are new ones, so that the front must read them again.
        """
        with self._alone("keys.lock"):
            if self._server_certificate_holds():
                return False
            key = pki.new_key()
            certificate = pki.server_certificate(self.authority, key.public_key(), self.config.host)
            _write_key(self._key_file("server.key"), pki.key_pem(key))
            _write_key(self._key_file("server.crt"), pki.certificate_pem(certificate).encode())
            return True

    def _server_certificate_holds(self) -> bool:
        try:
            key = serialization.load_pem_private_key(self._key_file("server.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(self._key_file("server.crt").read_bytes())
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, TypeError, x509.ExtensionNotFound):
            return False
        return (
            key.public_key() == certificate.public_key()
            and self.config.host in {str(name.value) for name in names}
            and certificate.issuer == self.authority.certificate.subject
            and certificate.not_valid_after_utc - datetime.now(UTC) > _RENEW_SERVER
        )

    def _key_file(self, name: str) -> Path:
        return self.folder / "keys" / name

    # Sites ----------------------------------------------------------------------------------------------------------

    def invite(self, site: str, valid_s: float = INVITED_S) -> Invitation:
        """A new invitation for ``site``; an older one of the same site that was not used is withdrawn.

        Raises
        ------
        FederadError
            S184 if the name cannot be used, the site has enrolled, or the time is not between a minute and 90 days.
        """
        if not re.fullmatch(SITE_NAME, site):
            raise _no_such(
                f"{site!a} cannot be the name of a site",
                "It appears in certificates, tables and file names.",
                "use letters, digits, dots, hyphens and underscores, at most 63, beginning with a letter or digit",
            )
        if not 60 <= valid_s <= MAX_INVITED_S:
            raise _no_such(
                f"an invitation cannot be valid for {valid_s:g} s",
                "One that lies about for long is found by somebody else.",
                "choose between one minute and 90 days",
            )
        key = Ed25519PrivateKey.generate()
        invitation = Invitation(
            consortium=self.config.name,
            host=self.config.host,
            port=self.config.port,
            site=site,
            expires=int(time.time() + valid_s),
            secret=encode_url(key.private_bytes_raw()),
            ca=encode_url(self.authority.certificate.public_bytes(serialization.Encoding.DER)),
        )
        with self._change() as db:
            known = db.execute("SELECT name, status FROM sites WHERE name = ?", (site,)).fetchone()
            if known and (known[1] == "enrolled" or known[0] != site):
                raise _no_such(
                    f"there is a site {known[0]} already" + (" and it has enrolled" if known[1] == "enrolled" else ""),
                    "A name stands for one hospital.",
                    f"to let it enrol anew, with other keys: federad-server revoke {known[0]}, then invite {known[0]}",
                )
            db.execute("UPDATE invitations SET withdrawn = 1 WHERE site = ? AND used IS NULL", (site,))
            db.execute(
                "INSERT INTO invitations (id, site, public_key, expires) VALUES (?, ?, ?, ?)",
                (invitation.id, site, invitation.public_key, invitation.expires),
            )
            db.execute("INSERT OR IGNORE INTO sites (name, status) VALUES (?, 'invited')", (site,))
        return invitation

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Take a site in: check its invitation, give it a certificate, tell the SuperLink of its node.

        Promise
            An invitation makes one certificate for one pair of keys. The same request, or another with the same keys,
            gets the same certificate again, so a lost reply costs nothing.

        Raises
        ------
        FederadError
            S185 if the invitation does not count, S186 if the keys do not.
        """
        node_key = pki.node_key(request.node_public_key_pem)
        site_key = pki.public_pem(pki.requested_key(request.csr_pem, request.site))
        with self._change() as db:
            row = self._invitation(db, request)
            if row["used"]:
                self._same_again(db, row, request.site, site_key, node_key)
                certificate = str(row["certificate"])
            else:
                certificate = self._take_in(db, row, request, site_key, node_key)
        self.settle()
        return EnrolReply(
            site=request.site,
            consortium=self.config.name,
            host=self.config.host,
            port=self.config.port,
            certificate_pem=certificate,
            ca_pem=self.authority.pem,
            plan_key_pem=public_pem(self.plan_key.public_key()),
        ).signed(self.authority.key)

    def _invitation(self, db: sqlite3.Connection, request: EnrolRequest) -> sqlite3.Row:
        """The invitation that a request answers, once it is known to be genuine."""
        if request.ca_sha256 != fingerprint(self.authority.certificate.public_bytes(serialization.Encoding.DER)):
            raise _refused(
                request.site,
                "is from another consortium, or from before this one was set up anew",
                "It pins a certificate authority that is not the one here.",
            )
        row: sqlite3.Row | None = db.execute("SELECT * FROM invitations WHERE id = ?", (request.invitation,)).fetchone()
        key = Ed25519PublicKey.from_public_bytes(bytes(row["public_key"])) if row else None
        if row is None or key is None or row["id"] != invitation_id(key):
            raise _refused(request.site, "was never given out here", "Nobody can invite but the operator.")
        if row["site"] != request.site or not request.is_proven_by(key):
            raise _refused(
                request.site,
                "does not prove this request: it was forged, or changed on the way",
                "The request must be signed with the invitation and name the site that was invited.",
            )
        return row

    def _same_again(self, db: sqlite3.Connection, row: sqlite3.Row, site: str, site_key: str, node_key: str) -> None:
        """Raise S185 unless a used invitation is answered by those who used it."""
        if (row["site_key"], row["node_key"]) != (site_key, node_key):
            raise _refused(site, f"was used on {row['used']}, with other keys", "It can be used once.")
        serial = pki.serial_of(x509.load_pem_x509_certificate(str(row["certificate"]).encode()))
        revoked = db.execute("SELECT revoked FROM certificates WHERE serial = ?", (serial,)).fetchone()
        if revoked is None or revoked[0]:
            raise _refused(site, "was used, and the site was revoked since", "It can be used once.")

    def _take_in(
        self, db: sqlite3.Connection, row: sqlite3.Row, request: EnrolRequest, site_key: str, node_key: str
    ) -> str:
        site = request.site
        if row["withdrawn"]:
            raise _refused(site, "was withdrawn", "The operator gave out a newer one, or revoked the site.")
        if row["expires"] <= time.time():
            when = datetime.fromtimestamp(row["expires"], UTC).isoformat(timespec="minutes")
            raise _refused(site, f"expired at {when}", "One that lies about for long is found by somebody else.")
        if db.execute("SELECT 1 FROM nodes WHERE public_key = ?", (node_key,)).fetchone():
            raise FederadError(
                "S186",
                happened=f"The SuperNode's key that {site} sent has been used before.",
                because="A key stands for one enrolment of one site.",
                remedies=("enrol in a fresh folder: federad-site enrol makes new keys there",),
            )
        certificate = pki.site_certificate(self.authority, request.csr_pem, site)
        pem = pki.certificate_pem(certificate)
        db.execute(
            "UPDATE invitations SET used = ?, site_key = ?, node_key = ?, certificate = ? WHERE id = ?",
            (utc_now(), site_key, node_key, pem, row["id"]),
        )
        db.execute("UPDATE sites SET status = 'enrolled' WHERE name = ?", (site,))
        db.execute("INSERT INTO nodes (public_key, site) VALUES (?, ?)", (node_key, site))
        _note_certificate(db, certificate, site)
        return pem

    def renew(self, site: str, request: RenewRequest) -> RenewReply:
        """A further certificate for an enrolled site; the older ones hold until they end.

        Raises
        ------
        FederadError
            S184 if the site is not enrolled, S186 if the request does not hold.
        """
        certificate = pki.site_certificate(self.authority, request.csr_pem, site)
        with self._change() as db:
            if _status(db, site) != "enrolled":
                raise _no_site(site)
            _note_certificate(db, certificate, site)
        return RenewReply(certificate_pem=pki.certificate_pem(certificate))

    def revoke(self, site: str) -> Site:
        """End a site's part in the consortium: nothing it sends counts from now on.

        Its invitations are withdrawn, its certificates refused, and its node taken off the SuperLink. If that one does not
        run, the node's id stays until :meth:`settle`; :meth:`site_of_node` no longer knows it either way.

        Raises
        ------
        FederadError
            S184 if there is no such site.
        """
        with self._change() as db:
            if _status(db, site) is None:
                raise _no_site(site)
            db.execute("UPDATE sites SET status = 'revoked' WHERE name = ?", (site,))
            db.execute("UPDATE certificates SET revoked = 1 WHERE site = ?", (site,))
            db.execute("UPDATE invitations SET withdrawn = 1 WHERE site = ? AND used IS NULL", (site,))
            db.execute("UPDATE nodes SET wanted = 0 WHERE site = ?", (site,))
        self.settle()
        return self.site(site)

    def sites(self) -> list[Site]:
        """Every site that was ever invited, by name."""
        with self._read() as db:
            names = [str(row["name"]) for row in db.execute("SELECT name FROM sites ORDER BY name")]
            return [_site(db, name) for name in names]

    def site(self, name: str) -> Site:
        """One site; S184 if there is none of that name."""
        with self._read() as db:
            if _status(db, name) is None:
                raise _no_site(name)
            return _site(db, name)

    def admit(self, serial: str) -> str:
        """The name of the site that calls with the certificate ``serial``, and a note that it was seen.

        Parameters
        ----------
        serial
            In hex, as nginx gives it.

        Raises
        ------
        FederadError
            C154 if the certificate is unknown, has ended, or its site was revoked.
        """
        with self._read() as db:
            row = db.execute(
                "SELECT c.site, c.not_after, c.revoked, s.status, s.last_seen FROM certificates c"
                " JOIN sites s ON s.name = c.site WHERE c.serial = ?",
                (_plain_serial(serial),),
            ).fetchone()
        if row is None:
            raise _not_admitted("its certificate was not given out by this consortium")
        if row["revoked"] or row["status"] != "enrolled":
            raise _not_admitted("the operator has revoked it")
        now = time.time()
        if row["not_after"] <= now:
            raise _not_admitted("its certificate has ended")
        if row["last_seen"] is None or now - row["last_seen"] > SEEN_EVERY_S:
            with self._change() as db:
                db.execute("UPDATE sites SET last_seen = ? WHERE name = ?", (now, row["site"]))
        return str(row["site"])

    # Flower's nodes -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring the SuperLink's list of nodes in step with the sites, as far as it can be reached."""
        with self._alone("nodes.lock"):
            for node in self._unsettled():
                try:
                    if node.status == "enrolled" and self.register is not None:
                        self.set_node_id(node.name, self.register(node))
                    elif node.status == "revoked" and self.unregister is not None:
                        self.unregister(node)
                        self._forget_node(node)
                except (OSError, FederadError) as error:
                    log.warning("the SuperLink was not told that %s is %s: %s", node.name, node.status, error)

    def _unsettled(self) -> list[Site]:
        """Nodes to register (status ``enrolled``) and to take away (status ``revoked``)."""
        with self._read() as db:
            rows = db.execute(
                "SELECT * FROM nodes WHERE (wanted AND node_id IS NULL) OR (NOT wanted AND node_id IS NOT NULL)"
                " ORDER BY wanted, site"
            ).fetchall()
        return [
            Site(
                row["site"],
                "enrolled" if row["wanted"] else "revoked",
                node_public_key_pem=row["public_key"],
                node_id=None if row["node_id"] is None else int(row["node_id"]),
            )
            for row in rows
        ]

    def set_node_id(self, site: str, node_id: int | None) -> None:
        """Note under which id the SuperLink knows a site's node; None to have it registered again."""
        with self._change() as db:
            text = None if node_id is None else str(node_id)  # 64 bits without a sign do not fit an SQLite integer
            db.execute("UPDATE nodes SET node_id = ? WHERE site = ? AND wanted", (text, site))

    def _forget_node(self, node: Site) -> None:
        with self._change() as db:
            db.execute("UPDATE nodes SET node_id = NULL WHERE public_key = ?", (node.node_public_key_pem,))

    def site_of_node(self, node_id: int) -> str | None:
        """The enrolled site behind a node of Flower's; None for any other, a revoked site's included."""
        with self._read() as db:
            row = db.execute("SELECT site FROM nodes WHERE node_id = ? AND wanted", (str(node_id),)).fetchone()
        return str(row["site"]) if row else None

    # Plans and runs -------------------------------------------------------------------------------------------------

    def offer(self, plan: Plan, run: str, seed: int) -> SignedPlan:
        """Sign a plan and offer it to all sites as ``run``.

        Raises
        ------
        FederadError
            S184 if there is such a run already or its name cannot be used.
        """
        if not re.fullmatch(RUN, run):
            raise _no_such(
                f"{run!a} cannot be the name of a run",
                "It appears in tables and file names.",
                "use letters, digits, dots, hyphens and underscores, at most 63, beginning with a letter or digit",
            )
        signed = SignedPlan(plan=plan.canonical_json(), consortium=self.config.name, run=run, issued=utc_now()).signed(
            self.plan_key
        )
        try:
            with self._change() as db:
                db.execute(
                    "INSERT INTO runs (run, plan_sha256, signed, seed, state) VALUES (?, ?, ?, ?, 'offered')",
                    (run, plan.sha256, signed.encode().decode(), seed),
                )
        except sqlite3.IntegrityError:
            raise _no_such(
                f"there is a run {run} already",
                "Sites answer a run's rounds once.",
                f"go on with it: federad-server resume {run}",
            ) from None
        return signed

    def offered(self) -> list[SignedPlan]:
        """The signed plans of all open runs, oldest first."""
        with self._read() as db:
            rows = db.execute("SELECT signed FROM runs WHERE is_open ORDER BY rowid").fetchall()
        return [SignedPlan.decode(row["signed"]) for row in rows]

    def close_run(self, run: str) -> None:
        """Offer a run's plan no longer; S184 if there is no such run."""
        self._update_run(run, "is_open = 0", ())

    def set_run_state(self, run: str, state: str, flower_run_id: int | str | None = None) -> None:
        """Note where a run stands, and Flower's id of the newest attempt if given; S184 if there is no such run."""
        if flower_run_id is None:
            self._update_run(run, "state = ?", (state,))
        else:
            self._update_run(run, "state = ?, flower_run_id = ?", (state, str(flower_run_id)))

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        with self._read() as db:
            return [_run(row) for row in db.execute("SELECT * FROM runs ORDER BY rowid")]

    def run(self, run: str) -> RunRow:
        """One run; S184 if there is none of that name."""
        with self._read() as db:
            row = db.execute("SELECT * FROM runs WHERE run = ?", (run,)).fetchone()
        if row is None:
            raise _no_run(run)
        return _run(row)

    def _update_run(self, run: str, change: str, values: tuple[str, ...]) -> None:
        with self._change() as db:
            if not db.execute(f"UPDATE runs SET {change} WHERE run = ?", (*values, run)).rowcount:  # noqa: S608
                raise _no_run(run)

    def tell(self, site: str, notices: Iterable[Notice]) -> None:
        """Take in what a site says of itself; what concerns no run or plan that it was offered is dropped."""
        with self._change() as db:
            for notice in notices:
                if notice.kind == "status":
                    db.execute("UPDATE sites SET word = ? WHERE name = ?", (notice.word, site))
                elif notice.kind == "scanners":
                    db.execute("DELETE FROM scanners WHERE site = ?", (site,))
                    rows = [(site, name) for name in dict.fromkeys(notice.scanners)]
                    db.executemany("INSERT INTO scanners VALUES (?, ?)", rows)
                elif notice.kind == "progress":
                    db.execute(
                        "INSERT OR REPLACE INTO progress SELECT run, ?, ?, ?, ? FROM runs WHERE run = ?",
                        (site, notice.round, notice.done, notice.total, notice.run),
                    )
                else:
                    db.execute(
                        "INSERT OR REPLACE INTO approvals SELECT ?, plan_sha256, ?, ?, ? FROM runs"
                        " WHERE plan_sha256 = ? LIMIT 1",
                        (site, notice.kind, notice.word, utc_now(), notice.plan_sha256),
                    )

    def approvals(self, plan_sha256: str) -> set[str]:
        """Names of the enrolled sites whose last word on a plan was yes."""
        return set(self._said(plan_sha256, "approved"))

    def refusals(self, plan_sha256: str) -> dict[str, str]:
        """Names of the enrolled sites whose last word on a plan was no, with the word they gave."""
        return self._said(plan_sha256, "refused")

    def _said(self, plan_sha256: str, kind: str) -> dict[str, str]:
        with self._read() as db:
            rows = db.execute(
                "SELECT a.site, a.word FROM approvals a JOIN sites s ON s.name = a.site"
                " WHERE a.plan_sha256 = ? AND a.kind = ? AND s.status = 'enrolled' ORDER BY a.site",
                (plan_sha256, kind),
            ).fetchall()
        return {str(row["site"]): str(row["word"]) for row in rows}

    def progress(self, run: str) -> dict[str, dict[str, int]]:
        """The newest ``round``, ``done`` and ``total`` that each site told of a run."""
        with self._read() as db:
            rows = db.execute("SELECT site, round, done, total FROM progress WHERE run = ? ORDER BY site", (run,))
            return {str(row["site"]): {key: int(row[key]) for key in ("round", "done", "total")} for row in rows}

    # SQLite ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else writes beside; all of it or nothing."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:
                    db.rollback()
                raise
            if db.in_transaction:
                db.commit()

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db:
            yield db

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The database; S183 if it cannot be read or written, on a full disk for instance."""
        db: sqlite3.Connection | None = None
        try:
            db = sqlite3.connect(self.folder / DATABASE, timeout=30, isolation_level=None)
            db.row_factory = sqlite3.Row
            yield db
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise _not_ready(f"{DATABASE} cannot be used ({error})", "everything that happened stands in it") from None
        finally:
            if db is not None:
                db.close()

    @contextmanager
    def _alone(self, lock: str) -> Iterator[None]:
        with (self.folder / "keys" / lock).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


_KEYS = "without its keys nobody can recognise the consortium"


def _site(db: sqlite3.Connection, name: str) -> Site:
    site = db.execute("SELECT * FROM sites WHERE name = ?", (name,)).fetchone()
    node = db.execute("SELECT * FROM nodes WHERE site = ? ORDER BY rowid DESC LIMIT 1", (name,)).fetchone()
    certificate = db.execute(
        "SELECT * FROM certificates WHERE site = ? ORDER BY not_after DESC, rowid DESC LIMIT 1", (name,)
    ).fetchone()
    return Site(
        name=site["name"],
        status=site["status"],
        node_public_key_pem=node["public_key"] if node else None,
        serial=certificate["serial"] if certificate else None,
        not_after=_moment(certificate["not_after"]) if certificate else None,
        last_seen=_moment(site["last_seen"]),
        node_id=int(node["node_id"]) if node and node["node_id"] is not None else None,
        word=site["word"],
        scanners=tuple(
            row["name"] for row in db.execute("SELECT name FROM scanners WHERE site = ? ORDER BY 1", (name,))
        ),
    )


def _run(row: sqlite3.Row) -> RunRow:
    plan = Plan.model_validate_json(SignedPlan.decode(row["signed"]).plan)
    return RunRow(row["run"], plan, row["seed"], row["state"], row["flower_run_id"], bool(row["is_open"]))


def _status(db: sqlite3.Connection, site: str) -> str | None:
    row = db.execute("SELECT status FROM sites WHERE name = ?", (site,)).fetchone()
    return str(row["status"]) if row else None


def _note_certificate(db: sqlite3.Connection, certificate: x509.Certificate, site: str) -> None:
    db.execute(
        "INSERT INTO certificates (serial, site, not_after) VALUES (?, ?, ?)",
        (pki.serial_of(certificate), site, certificate.not_valid_after_utc.timestamp()),
    )


def _plain_serial(serial: str) -> str:
    """Upper-case hex without leading zeros; a serial of another form is nobody's."""
    return serial.upper().lstrip("0") if re.fullmatch("[0-9A-Fa-f]{1,64}", serial) else ""


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _write_key(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, all of it or nothing."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _not_ready(happened: str, because: str) -> FederadError:
    return FederadError(
        "S183",
        happened=f"{happened[0].upper()}{happened[1:]}.",
        because=f"{because[0].upper()}{because[1:]}.",
        remedies=(
            "say which folder it is: --dir DIR, or FEDERAD_SERVER in the environment",
            "or restore it from your backup; a new one is made with federad-server init DIR --host NAME",
        ),
    )


def _no_such(happened: str, because: str, remedy: str) -> FederadError:
    return FederadError("S184", happened=f"{happened[0].upper()}{happened[1:]}.", because=because, remedies=(remedy,))


def _no_site(site: str) -> FederadError:
    return _no_such(
        f"there is no enrolled site {site!a}",
        "Only who was invited and enrolled takes part.",
        "see federad-server sites",
    )


def _no_run(run: str) -> FederadError:
    return _no_such(f"there is no run {run!a}", "Every run begins with a plan.", "see federad-server status")


def _refused(site: str, why: str, because: str) -> FederadError:
    return FederadError(
        "S185",
        happened=f"The invitation of {site} {why}.",
        because=because,
        remedies=(f"ask the operator for a new invitation (federad-server invite {site}) and enrol with that one",),
    )


def _not_admitted(why: str) -> FederadError:
    return FederadError(
        "C154",
        happened=f"The consortium did not let this site in: {why}.",
        because="The operator decides who takes part, and looks it up at every call.",
        remedies=(
            "ask the operator why, or for a new invitation",
            "then enrol again: federad-site enrol INVITATION --data DIR",
        ),
    )
