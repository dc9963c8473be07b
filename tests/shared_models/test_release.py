"""A release is used only if every byte of it is what the operator of this site's consortium signed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import laws
import pytest
from crashes import killed_at
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from releases import CONSORTIUM, plan_of, publish, weights_for

from server.registry import Registry
from shared_models import release as release_module
from shared_models.consortium import SignedRelease
from shared_models.errors import FederadError
from shared_models.release import (
    CARD,
    FILES,
    MANIFEST,
    MODEL,
    Manifest,
    Release,
    ReleasedFile,
    receive,
    verify_folder,
    verify_manifest,
    verify_model,
)
from shared_models.signing import fingerprint

KEY = Ed25519PrivateKey.generate()
PINNED = KEY.public_key()


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Release:
    """A release as the operator has it."""
    return publish(tmp_path_factory.mktemp("operator"), KEY)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy that a hospital got, in a folder of any name."""
    return shutil.copytree(original.folder, tmp_path / "fetched")


def refused(code: str, folder: Path, *, key=PINNED, consortium=CONSORTIUM) -> FederadError:
    """The folder is refused with this code, and the message says what to do."""
    with pytest.raises(FederadError) as caught:
        verify_folder(folder, key, consortium)
    assert caught.value.code == code
    assert caught.value.remedies
    return caught.value


def resigned(folder: Path, key=KEY, **changes) -> None:
    """Sign the manifest of a folder anew, with other values."""
    signed = SignedRelease.decode((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(signed.model_copy(update=changes).signed(key).encode())


def manifest_of(folder: Path) -> dict:
    return json.loads(json.loads((folder / MANIFEST).read_text())["release"])


class TestVerify:
    def test_release_is_taken_as_it_was_signed(self, folder, original):
        """
        A whole copy opens under another name and holds the operator's weights bit for bit.
        """
        release = verify_folder(folder, PINNED, CONSORTIUM)

        assert release.sha256 == original.sha256 == fingerprint((folder / MODEL).read_bytes())
        laws.assert_same_bits(release.weights(), weights_for(plan_of()))
        assert release.plan() == plan_of()
        assert (release.name, release.run) == ("lesions", "lesions-1")

    def test_network_predicts_with_the_released_weights(self, folder):
        """
        The network is the plan's, ready to predict.
        """
        network = verify_folder(folder, PINNED, CONSORTIUM).network()

        assert not network.training
        laws.assert_same_bits(
            {name: p.detach().numpy() for name, p in network.named_parameters()}, weights_for(plan_of())
        )

    @pytest.mark.parametrize("field", ["issued", "release", "sha256", "n_bytes"])
    def test_changed_manifest_is_refused(self, folder, field):
        """
        Whichever signed field is changed, the signature does not hold any more.
        """
        document = json.loads((folder / MANIFEST).read_text())
        document[field] = {
            "issued": "2031-01-01T00:00:00+00:00",
            "release": document["release"].replace('"lesions-1"', '"lesions-2"'),
            "sha256": "0" * 64,
            "n_bytes": 1,
        }[field]
        (folder / MANIFEST).write_text(json.dumps(document))

        refused("M212", folder)

    def test_signature_of_another_is_refused(self, folder):
        """
        A release that somebody else signed in the consortium's name is none.
        """
        resigned(folder, Ed25519PrivateKey.generate())

        refused("M212", folder)

    def test_missing_signature_is_refused(self, folder):
        """
        An unsigned release is no release.
        """
        document = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**document, "signature": ""}))

        refused("M212", folder)

    def test_release_of_another_consortium_is_refused(self, folder):
        """
        Both consortia are named, even if the same operator keeps both with one key.
        """
        error = refused("M214", folder, consortium="Retina Network")

        assert CONSORTIUM in error.happened
        assert "Retina Network" in error.happened

    @pytest.mark.parametrize("name", FILES)
    def test_changed_file_is_refused(self, folder, name):
        """
        One bit is enough, in the weights as in the card.
        """
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

        assert name in refused("M215", folder).happened

    @pytest.mark.parametrize("name", FILES)
    def test_file_of_another_length_is_refused(self, folder, name):
        """
        Cut short or added to.
        """
        data = (folder / name).read_bytes()
        for other in (data[:-1], data + b" ", b""):
            (folder / name).write_bytes(other)
            assert name in refused("M215", folder).happened

    @pytest.mark.parametrize("name", [MANIFEST, *FILES])
    def test_missing_file_is_named(self, folder, name):
        """
        The message names what is missing.
        """
        (folder / name).unlink()

        assert name in refused("M215", folder).happened

    def test_folder_in_place_of_a_file_is_refused(self, folder):
        """
        What cannot be read as a file counts as missing.
        """
        (folder / MODEL).unlink()
        (folder / MODEL).mkdir()

        refused("M215", folder)

    @pytest.mark.parametrize("text", ["", "{}", "[]", "{" * 100_000, '{"release": 1}', "\x00\xff"])
    def test_damaged_manifest_is_refused(self, folder, text):
        """
        Whatever stands in its place.
        """
        (folder / MANIFEST).write_text(text)

        refused("M211", folder)

    def test_endless_manifest_is_not_read_to_its_end(self, folder):
        """
        A file of a terabyte in place of the manifest costs no memory.
        """
        with (folder / MANIFEST).open("wb") as stream:
            stream.truncate(1 << 40)

        refused("M211", folder)

    @pytest.mark.parametrize("name", FILES)
    def test_endless_file_is_not_read_to_its_end(self, folder, name):
        """
        A terabyte in place of a file is refused by its length.
        """
        with (folder / name).open("wb") as stream:
            stream.truncate(1 << 40)

        refused("M215", folder)

    @pytest.mark.parametrize(
        "name", ["../model.safetensors", "/etc/passwd", "a/b.json", "..", ".lock", "model.safetensors\n"]
    )
    def test_manifest_cannot_lead_out_of_its_folder(self, folder, name):
        """
        Even a signed manifest names plain files only.
        """
        manifest = manifest_of(folder)
        manifest["files"][0]["name"] = name
        resigned(folder, release=json.dumps(manifest))

        refused("M211", folder)

    @pytest.mark.parametrize("change", ["without card", "twice", "other model"])
    def test_manifest_that_does_not_name_everything_once_is_refused(self, folder, change):
        """
        All three files, each once, and the model that the listing names.
        """
        manifest = manifest_of(folder)
        if change == "without card":
            manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != CARD]
        elif change == "twice":
            manifest["files"].append(manifest["files"][0])
        else:
            manifest["files"][0]["sha256"] = "0" * 64
        resigned(folder, release=json.dumps(manifest))

        refused("M215", folder)
        with pytest.raises(FederadError, match="M215"):
            verify_manifest(Release.open(folder).signed, PINNED, CONSORTIUM)

    def test_model_changed_after_the_check_is_not_used(self, folder):
        """
        Weights and card are checked in the very bytes that are read.
        """
        release = verify_folder(folder, PINNED, CONSORTIUM)
        for name in (MODEL, CARD):
            (folder / name).write_bytes(bytes(len((folder / name).read_bytes())))

        for use in (release.weights, release.card, release.network):
            with pytest.raises(FederadError, match="M215"):
                use()

    def test_single_file_is_checked_under_any_name(self, folder, original, tmp_path):
        """
        A model that was fetched alone needs its listing and no folder.
        """
        file = tmp_path / "downloaded.bin"
        shutil.copyfile(folder / MODEL, file)
        assert verify_model(file, original.signed, PINNED, CONSORTIUM) == original.manifest

        file.write_bytes(b"\x00" + file.read_bytes()[1:])
        with pytest.raises(FederadError, match="M215"):
            verify_model(file, original.signed, PINNED, CONSORTIUM)

    def test_plan_is_the_one_that_was_agreed_on(self, folder):
        """
        The card's plan has the hash that the manifest names.
        """
        release = verify_folder(folder, PINNED, CONSORTIUM)

        assert release.plan().sha256 == release.manifest.plan_sha256 == release.card().plan_sha256


class TestReceive:
    @pytest.fixture
    def registry(self, original) -> Registry:
        return Registry(original.folder.parent)

    def test_whole_release_arrives(self, original, registry, tmp_path):
        """
        Listing and files through a service are the release that the operator has.
        """
        release = receive(original.signed, registry.read, tmp_path, PINNED, CONSORTIUM)

        assert release.folder == tmp_path / original.sha256
        assert verify_folder(release.folder, PINNED, CONSORTIUM).manifest == original.manifest
        laws.assert_same_bits(release.weights(), original.weights())

    def test_nothing_is_fetched_before_the_signature_is_checked(self, original, tmp_path):
        """
        A forged listing causes no transfer.
        """

        def fetch(sha256):
            raise AssertionError("fetched")

        forged = original.signed.signed(Ed25519PrivateKey.generate())
        with pytest.raises(FederadError, match="M212"):
            receive(forged, fetch, tmp_path, PINNED, CONSORTIUM)

    def test_release_that_is_there_is_checked_and_not_fetched_again(self, original, registry, tmp_path):
        """
        Fetched twice, the second time costs no transfer; a damaged copy is refused all the same.
        """
        release = receive(original.signed, registry.read, tmp_path, PINNED, CONSORTIUM)
        receive(original.signed, lambda sha256: [], tmp_path, PINNED, CONSORTIUM)

        (release.folder / MODEL).write_bytes(b"")
        with pytest.raises(FederadError, match="M215"):
            receive(original.signed, registry.read, tmp_path, PINNED, CONSORTIUM)

    def test_other_bytes_are_not_kept(self, original, registry, tmp_path):
        """
        A service that sends something else, or less, leaves nothing behind.
        """
        for fetch in (
            lambda sha256: [bytes(reversed(b"".join(registry.read(sha256))))],
            lambda sha256: list(registry.read(sha256))[:-1],
        ):
            with pytest.raises(FederadError, match="M215"):
                receive(original.signed, fetch, tmp_path, PINNED, CONSORTIUM)
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    def test_endless_answer_is_cut_off(self, original, tmp_path):
        """
        No more is taken than the manifest says.
        """
        taken = 0

        def endless(sha256):
            nonlocal taken
            while True:
                taken += 1
                yield bytes(1 << 16)

        with pytest.raises(FederadError, match="M215"):
            receive(original.signed, endless, tmp_path, PINNED, CONSORTIUM)
        assert taken <= original.signed.n_bytes / (1 << 16) + 2

    def test_lost_connection_leaves_nothing(self, original, registry, tmp_path):
        """
        The error goes on to the caller and the folder is as before.
        """

        def lost(sha256):
            yield b"some"
            raise ConnectionError

        with pytest.raises(ConnectionError):
            receive(original.signed, lost, tmp_path, PINNED, CONSORTIUM)
        assert not list(tmp_path.glob("*"))[1:]

    def test_killed_before_any_line_it_is_whole_or_not_there(self, original, registry, tmp_path):
        """
        Wherever the hospital's process dies, the next try ends with one whole release and no remains.
        """
        seen = []
        for n_lines in range(1, 2000):
            folder = tmp_path / str(n_lines)
            killed = killed_at(
                n_lines,
                release_module,
                lambda folder=folder: receive(original.signed, registry.read, folder, PINNED, CONSORTIUM),
            )
            there = (folder / original.sha256).exists()
            if there:
                verify_folder(folder / original.sha256, PINNED, CONSORTIUM)
            seen.append(there)
            receive(original.signed, registry.read, folder, PINNED, CONSORTIUM)
            assert {path.name for path in folder.iterdir()} == {".lock", original.sha256}
            shutil.rmtree(folder)
            if not killed:
                break

        assert seen == sorted(seen)
        assert set(seen) == {False, True}


class TestManifest:
    def test_listing_alone_says_whether_it_can_be_trusted(self, original):
        """
        Before anything is fetched.
        """
        assert verify_manifest(original.signed, PINNED, CONSORTIUM) == original.manifest

    def test_card_longer_than_is_read_is_refused(self, original, tmp_path):
        """
        However long the manifest says it is.
        """
        files = tuple(
            ReleasedFile(name=e.name, n_bytes=1 << 40 if e.name == CARD else e.n_bytes, sha256=e.sha256)
            for e in original.manifest.files
        )
        manifest = Manifest(**{**dict(original.manifest), "files": files})
        with pytest.raises(FederadError, match="M215"):
            Release(original.folder, original.signed, manifest).card()
