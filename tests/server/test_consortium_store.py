"""The consortium as the operator keeps it."""

from __future__ import annotations

import base64
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from cryptography import x509

import server.consortium as module
from client.enrolment import make_request
from server import pki
from server.consortium import Consortium, ConsortiumConfig
from shared_models.consortium import EnrolRequest, Notice, RenewRequest
from shared_models.errors import FederadError
from shared_models.signing import fingerprint

CONFIG = ConsortiumConfig(name="Demo", host="fl.example.org", port=443)


@pytest.fixture
def consortium(tmp_path) -> Consortium:
    return Consortium.create(tmp_path / "operator", CONFIG)


@pytest.fixture
def joined(consortium, tmp_path):
    """Let a site join; gives its request and the reply."""

    def join(site: str = "site-a"):
        request = make_request(consortium.invite(site), tmp_path / f"{site}-{time.monotonic_ns()}")
        return request, consortium.enrol(request)

    return join


@pytest.fixture
def later(monkeypatch):
    """Let the operator's clock be ahead by some seconds."""

    def shift(seconds: float) -> None:
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + seconds))

    return shift


def serial(reply) -> str:
    return pki.serial_of(x509.load_pem_x509_certificate(reply.certificate_pem.encode()))


class TestFolder:
    def test_keys_are_for_the_owner_alone(self, consortium):
        """
        Nobody else on the machine can read a key, nor look into the folder.
        """
        files = [consortium.folder, consortium.folder / "keys", *(consortium.folder / "keys").glob("*.key")]

        assert len(files) == 5
        assert not any(stat.S_IMODE(file.stat().st_mode) & 0o077 for file in files)

    def test_second_consortium_does_not_overwrite_the_first(self, consortium):
        """
        Its keys are what hospitals recognise it by.
        """
        before = (consortium.folder / "keys" / "ca.key").read_bytes()
        with pytest.raises(FederadError, match="S183"):
            Consortium.create(consortium.folder, CONFIG)

        assert (consortium.folder / "keys" / "ca.key").read_bytes() == before

    @pytest.mark.parametrize(
        "text", [None, "name =", 'name = "x"', 'name = "x"\nhost = "h"\nport = 0', 'name = "x"\nhost = "h"\nmore = 1']
    )
    def test_configuration_that_cannot_be_used_is_named(self, consortium, text):
        """
        Missing, half written, out of range, or with a key that nothing reads.
        """
        file = consortium.folder / "consortium.toml"
        file.unlink() if text is None else file.write_text(text)

        with pytest.raises(FederadError, match=r"consortium\.toml cannot be used") as error:
            Consortium(consortium.folder)
        assert error.value.code == "S183"

    @pytest.mark.parametrize("name", ["ca.key", "ca.crt", "plan.key"])
    @pytest.mark.parametrize("damage", [b"", b"-----BEGIN PRIVATE KEY-----\n", None])
    def test_damaged_key_is_named(self, consortium, name, damage):
        """
        A key file that is empty, cut or gone is found when it is needed.
        """
        path = consortium.folder / "keys" / name
        path.unlink() if damage is None else path.write_bytes(damage)
        again = Consortium(consortium.folder)

        with pytest.raises(FederadError, match=name.split(".")[0]) as error:
            _ = (again.authority, again.plan_key)
        assert error.value.code == "S183"

    def test_folder_of_a_newer_version_is_left_alone(self, consortium):
        """
        A database that this version could misread is not opened.
        """
        with sqlite3.connect(consortium.folder / "consortium.sqlite") as db:
            db.execute("PRAGMA user_version = 99")
        with pytest.raises(FederadError, match="newer"):
            Consortium(consortium.folder)

    def test_damaged_database_is_named(self, consortium):
        """
        Bytes that are no database are an error with a number.
        """
        (consortium.folder / "consortium.sqlite").write_bytes(b"not a database" * 100)
        with pytest.raises(FederadError, match="S183"):
            Consortium(consortium.folder)

    def test_server_certificate_is_renewed_in_time(self, consortium):
        """
        A new one comes when the old one is near its end or the host has another name, and not before.
        """
        path = consortium.folder / "keys" / "server.crt"
        assert not consortium.refresh_server_certificate()
        key = pki.new_key()
        (path.parent / "server.key").write_bytes(pki.key_pem(key))
        path.write_text(
            pki.certificate_pem(pki.server_certificate(consortium.authority, key.public_key(), CONFIG.host, 29))
        )

        assert consortium.refresh_server_certificate()
        assert not consortium.refresh_server_certificate()
        CONFIG.model_copy(update={"host": "192.0.2.1"}).save(consortium.folder)
        assert Consortium(consortium.folder).refresh_server_certificate()


class TestInvitation:
    def test_site_joins(self, consortium, joined):
        """
        A certificate for the site, the authority, the key that signs plans, and the site on the list.
        """
        _, reply = joined()
        certificate = x509.load_pem_x509_certificate(reply.certificate_pem.encode())
        certificate.verify_directly_issued_by(consortium.authority.certificate)
        (site,) = consortium.sites()

        assert (reply.site, reply.consortium, reply.host, reply.port) == ("site-a", "Demo", "fl.example.org", 443)
        assert reply.is_signed_by(consortium.authority.key.public_key())
        assert (site.name, site.status, site.serial, site.node_id) == ("site-a", "enrolled", serial(reply), None)
        assert site.not_after == certificate.not_valid_after_utc

    def test_lost_reply_comes_again(self, consortium, joined, later):
        """
        The same keys with the same invitation get the same certificate, also after its time.
        """
        request, reply = joined()
        later(8 * 86_400)

        assert consortium.enrol(request).certificate_pem == reply.certificate_pem

    def test_expired_invitation_says_so(self, consortium, tmp_path, later):
        """
        After its time it does not count, however genuine.
        """
        request = make_request(consortium.invite("site-a", valid_s=60), tmp_path / "a")
        later(61)

        with pytest.raises(FederadError, match=r"S185.*expired at 20") as error:
            consortium.enrol(request)
        assert "federad-server invite site-a" in str(error.value)
        assert consortium.site("site-a").status == "invited"

    def test_used_invitation_says_so(self, consortium, tmp_path):
        """
        Other keys cannot enrol with an invitation that was used.
        """
        invitation = consortium.invite("site-a")
        consortium.enrol(make_request(invitation, tmp_path / "a"))

        with pytest.raises(FederadError, match=r"was used on 20.* with other keys"):
            consortium.enrol(make_request(invitation, tmp_path / "b"))

    def test_one_of_two_at_the_same_moment_is_taken(self, consortium, tmp_path):
        """
        Two holders of one invitation who enrol at once: one gets in, the other hears that it was used.
        """
        invitation = consortium.invite("site-a")
        requests = [make_request(invitation, tmp_path / str(n)) for n in range(6)]

        def attempt(request):
            try:
                return consortium.enrol(request).site
            except FederadError as error:
                return error.happened

        with ThreadPoolExecutor(6) as pool:
            outcomes = list(pool.map(attempt, requests))

        assert outcomes.count("site-a") == 1
        assert sum("was used" in outcome for outcome in outcomes) == 5

    def test_older_invitation_is_withdrawn_by_a_newer_one(self, consortium, tmp_path):
        """
        One way in at a time.
        """
        old, new = consortium.invite("site-a"), consortium.invite("site-a")

        with pytest.raises(FederadError, match="was withdrawn"):
            consortium.enrol(make_request(old, tmp_path / "old"))
        assert consortium.enrol(make_request(new, tmp_path / "new")).site == "site-a"

    def test_invitation_of_another_consortium_says_so(self, consortium, tmp_path):
        """
        The same names do not help: it pins another authority.
        """
        other = Consortium.create(tmp_path / "other", CONFIG)

        with pytest.raises(FederadError, match="from another consortium"):
            consortium.enrol(make_request(other.invite("site-a"), tmp_path / "a"))

    def test_invented_invitation_was_never_given_out(self, consortium, tmp_path):
        """
        Knowing the consortium's public parts is not enough to be invited.
        """
        genuine = consortium.invite("site-a")
        invented = genuine.model_copy(update={"secret": "B" * 43})

        with pytest.raises(FederadError, match="never given out"):
            consortium.enrol(make_request(invented, tmp_path / "a"))

    @pytest.mark.parametrize("change", ["site", "node_public_key_pem", "csr_pem", "proof"])
    def test_changed_request_is_called_forged(self, consortium, tmp_path, change):
        """
        Who reads a request on its way cannot put in a name or keys of their own.
        """
        theirs = make_request(consortium.invite("site-b"), tmp_path / "b")
        request = make_request(consortium.invite("site-a"), tmp_path / "a")
        update = {change: getattr(theirs, change)}
        if change in {"site", "csr_pem"}:  # the two go together, so that only the proof is wrong
            update = {"site": theirs.site, "csr_pem": theirs.csr_pem}

        with pytest.raises(FederadError, match="forged, or changed on the way"):
            consortium.enrol(request.model_copy(update=update))

    def test_database_does_not_let_its_reader_in(self, consortium, tmp_path):
        """
        Of an invitation the operator keeps what verifies it, and not what proves it.
        """
        invitation = consortium.invite("site-a")
        consortium.enrol(make_request(invitation, tmp_path / "a"))
        raw = (consortium.folder / "consortium.sqlite").read_bytes()
        secret = base64.urlsafe_b64decode(invitation.secret + "=")

        assert invitation.public_key in raw
        assert secret not in raw
        assert invitation.secret.encode() not in raw

    def test_key_of_another_node_cannot_be_taken_over(self, consortium, joined, tmp_path):
        """
        A SuperNode's key stands for one enrolment for ever.
        """
        first, _ = joined("site-a")
        invitation = consortium.invite("site-b")
        request = make_request(invitation, tmp_path / "b")
        stolen = request.model_copy(update={"node_public_key_pem": first.node_public_key_pem}).proven(invitation.secret)

        with pytest.raises(FederadError, match=r"S186.*used before"):
            consortium.enrol(stolen)
        assert consortium.site("site-b").status == "invited"

    @pytest.mark.parametrize("name", ["", "a b", "-a", "../a", "a" * 64, "a\n"])
    def test_name_that_cannot_be_a_file_is_refused(self, consortium, name):
        """
        Names appear in certificates, tables and file names.
        """
        with pytest.raises(FederadError, match="S184"):
            consortium.invite(name)

    def test_name_of_an_enrolled_site_is_taken(self, consortium, joined):
        """
        Also in other letters: the way to new keys is to revoke first, and the message says so.
        """
        joined("site-a")
        for name in ("site-a", "SITE-A"):
            with pytest.raises(FederadError, match="federad-server revoke site-a"):
                consortium.invite(name)

    @pytest.mark.parametrize("valid_s", [0, -1, 59, 91 * 86_400, float("nan"), float("inf")])
    def test_invitation_has_a_sensible_life(self, consortium, valid_s):
        """
        Neither over at once nor for ever.
        """
        with pytest.raises(FederadError, match="S184"):
            consortium.invite("site-a", valid_s)


class TestSites:
    def test_enrolled_site_is_admitted_and_seen(self, consortium, joined):
        """
        By its serial number, in whichever letters and with zeros ahead, as servers write it.
        """
        _, reply = joined()

        assert consortium.site("site-a").last_seen is None
        assert consortium.admit(serial(reply)) == consortium.admit("00" + serial(reply).lower()) == "site-a"
        assert consortium.site("site-a").last_seen is not None

    @pytest.mark.parametrize("given", ["", "0", "AB", "-1", "zz", "1" * 65, "' OR 1=1 --"])
    def test_other_serial_is_nobody(self, consortium, joined, given):
        """
        What is no serial of ours admits nobody.
        """
        joined()
        with pytest.raises(FederadError, match=r"C154.*not given out by this consortium"):
            consortium.admit(given)

    def test_revoked_site_is_out_at_once_and_for_good(self, consortium, joined):
        """
        Certificate, node and used invitation count no more; another site is not touched.
        """
        request, reply = joined("site-a")
        _, other = joined("site-b")
        consortium.set_node_id("site-a", 7)
        consortium.revoke("site-a")

        with pytest.raises(FederadError, match="revoked"):
            consortium.admit(serial(reply))
        with pytest.raises(FederadError, match="revoked since"):
            consortium.enrol(request)
        with pytest.raises(FederadError, match="no enrolled site"):
            consortium.renew("site-a", RenewRequest(csr_pem=request.csr_pem))
        assert consortium.site_of_node(7) is None
        assert consortium.admit(serial(other)) == "site-b"

    def test_revoking_withdraws_an_open_invitation(self, consortium, tmp_path):
        """
        A site that was invited and revoked before it came cannot come.
        """
        invitation = consortium.invite("site-a")
        consortium.revoke("site-a")

        with pytest.raises(FederadError, match="withdrawn"):
            consortium.enrol(make_request(invitation, tmp_path / "a"))

    def test_revoked_site_comes_back_with_other_keys(self, consortium, joined):
        """
        Invited again it takes part again; its old certificate stays dead.
        """
        _, old = joined("site-a")
        consortium.revoke("site-a")
        _, new = joined("site-a")

        assert consortium.admit(serial(new)) == "site-a"
        with pytest.raises(FederadError, match="revoked"):
            consortium.admit(serial(old))

    def test_certificate_ends(self, consortium, joined, later):
        """
        After its last day it admits nobody.
        """
        _, reply = joined()
        later(91 * 86_400)

        with pytest.raises(FederadError, match="has ended"):
            consortium.admit(serial(reply))

    def test_renewed_site_has_two_certificates_for_a_while(self, consortium, joined):
        """
        The old one holds until it ends, so that a lost reply shuts nobody out.
        """
        request, old = joined()
        new = consortium.renew("site-a", RenewRequest(csr_pem=request.csr_pem))

        assert consortium.admit(serial(old)) == consortium.admit(serial(new)) == "site-a"
        assert consortium.site("site-a").serial == serial(new)

    def test_request_of_another_site_renews_nothing(self, consortium, joined):
        """
        A site cannot renew under another's name.
        """
        joined("site-a")
        request, _ = joined("site-b")
        with pytest.raises(FederadError, match="S186"):
            consortium.renew("site-a", RenewRequest(csr_pem=request.csr_pem))

    @pytest.mark.parametrize("act", ["revoke", "site"])
    def test_unknown_site_is_named(self, consortium, act):
        """
        A typing mistake is no silent success.
        """
        with pytest.raises(FederadError, match="S184"):
            getattr(consortium, act)("site-z")


class SuperLink:
    """Flower's list of keys, which can be away."""

    def __init__(self) -> None:
        self.nodes: dict[int, str] = {}
        self.is_away = False

    def register(self, site) -> int:
        self._reach()
        node = 2**64 - 1 - len(self.nodes)
        self.nodes[node] = site.node_public_key_pem
        return node

    def unregister(self, site) -> None:
        self._reach()
        del self.nodes[site.node_id]

    def _reach(self) -> None:
        if self.is_away:
            raise ConnectionRefusedError("no SuperLink")


class TestNodes:
    @pytest.fixture
    def superlink(self, consortium):
        superlink = SuperLink()
        consortium.register, consortium.unregister = superlink.register, superlink.unregister
        return superlink

    def test_enrolled_node_is_registered_under_its_key(self, consortium, joined, superlink):
        """
        Flower's id, of all 64 bits, leads back to the site.
        """
        request, _ = joined()
        node = consortium.site("site-a").node_id

        assert superlink.nodes == {node: request.node_public_key_pem}
        assert node == 2**64 - 1
        assert consortium.site_of_node(node) == "site-a"

    def test_registration_waits_for_the_superlink(self, consortium, joined, superlink):
        """
        Enrolment does not depend on it; what is left to do is done later, once.
        """
        superlink.is_away = True
        joined()
        assert consortium.site("site-a").node_id is None

        superlink.is_away = False
        consortium.settle()
        consortium.settle()
        assert len(superlink.nodes) == 1

    def test_revoked_node_is_taken_away_even_later(self, consortium, joined, superlink):
        """
        While the SuperLink is away the site is out all the same, and its node goes as soon as that can be.
        """
        joined()
        node = consortium.site("site-a").node_id
        superlink.is_away = True

        assert consortium.revoke("site-a").node_id == node
        assert consortium.site_of_node(node) is None
        superlink.is_away = False
        consortium.settle()
        assert superlink.nodes == {}

    def test_site_that_came_back_has_one_node(self, consortium, joined, superlink):
        """
        The old key goes and the new one comes, also if the SuperLink was away for both.
        """
        joined()
        superlink.is_away = True
        consortium.revoke("site-a")
        request, _ = joined()
        superlink.is_away = False
        consortium.settle()

        assert list(superlink.nodes.values()) == [request.node_public_key_pem]
        assert consortium.site("site-a").node_id in superlink.nodes


class TestRuns:
    def test_plan_is_offered_signed(self, consortium, smoke_plan):
        """
        Every site can tell that the operator offers exactly this plan as this run.
        """
        signed = consortium.offer(smoke_plan, "r1", seed=3)
        signed.verify(consortium.plan_key.public_key())
        row = consortium.run("r1")

        assert consortium.offered() == [signed]
        assert signed.plan_sha256 == smoke_plan.sha256 == fingerprint(signed.plan.encode())
        assert (row.plan, row.seed, row.state, row.is_open) == (smoke_plan, 3, "offered", True)

    def test_run_keeps_its_name(self, consortium, smoke_plan):
        """
        A second run under the same name would get the first one's answers.
        """
        consortium.offer(smoke_plan, "r1", seed=0)
        with pytest.raises(FederadError, match="federad-server resume r1"):
            consortium.offer(smoke_plan, "r1", seed=1)

    def test_closed_run_is_offered_no_more(self, consortium, smoke_plan):
        """
        It stays on the operator's list.
        """
        consortium.offer(smoke_plan, "r1", seed=0)
        consortium.set_run_state("r1", "running", flower_run_id=2**64 - 1)
        consortium.close_run("r1")
        consortium.set_run_state("r1", "done")

        assert consortium.offered() == []
        assert [(r.run, r.state, r.flower_run_id, r.is_open) for r in consortium.runs()] == [
            ("r1", "done", str(2**64 - 1), False)
        ]

    def test_unknown_run_is_named(self, consortium, smoke_plan):
        """
        Neither read, nor changed, nor made up.
        """
        for act in (consortium.run, consortium.close_run, lambda run: consortium.set_run_state(run, "done")):
            with pytest.raises(FederadError, match="S184"):
                act("r9")
        with pytest.raises(FederadError, match="S184"):
            consortium.offer(smoke_plan, "../r", seed=0)

    def test_last_word_of_a_site_counts(self, consortium, smoke_plan, joined):
        """
        Approved, refused, approved again; and only the sites that take part are counted.
        """
        joined("site-a")
        joined("site-b")
        consortium.offer(smoke_plan, "r1", seed=0)
        yes = Notice(kind="approved", plan_sha256=smoke_plan.sha256)
        no = Notice(kind="refused", plan_sha256=smoke_plan.sha256, word="policy")
        consortium.tell("site-a", [yes, no])
        consortium.tell("site-b", [no, yes])

        assert consortium.approvals(smoke_plan.sha256) == {"site-b"}
        assert consortium.refusals(smoke_plan.sha256) == {"site-a": "policy"}
        consortium.revoke("site-b")
        assert consortium.approvals(smoke_plan.sha256) == set()

    def test_newest_progress_is_kept(self, consortium, smoke_plan, joined):
        """
        One line for each site and run.
        """
        joined("site-a")
        consortium.offer(smoke_plan, "r1", seed=0)
        ticks = [Notice(kind="progress", run="r1", round=2, done=n, total=10) for n in (1, 5)]
        consortium.tell("site-a", [*ticks, Notice(kind="status", word="training")])

        assert consortium.progress("r1") == {"site-a": {"round": 2, "done": 5, "total": 10}}
        assert consortium.site("site-a").word == "training"

    def test_words_on_what_was_never_offered_are_dropped(self, consortium, joined):
        """
        A site cannot fill the operator's disk with runs and plans of its own making.
        """
        joined("site-a")
        consortium.tell(
            "site-a",
            [Notice(kind="approved", plan_sha256="0" * 64), Notice(kind="progress", run="x", round=1, done=1, total=1)],
        )

        assert consortium.approvals("0" * 64) == set()
        assert consortium.progress("x") == {}


def test_request_survives_being_a_file(consortium, tmp_path):
    """
    By mail or over the network, a request is the same, and so is the certificate it gets.
    """
    request = make_request(consortium.invite("site-a"), tmp_path / "a")
    mailed = consortium.enrol(EnrolRequest.decode(request.encode()))

    assert mailed.certificate_pem == consortium.enrol(request).certificate_pem
