"""Predictions go to the hospital's archive, when somebody asks for it and nowhere else."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pydicom
import pytest
from archives import needs_orthanc, orthanc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from operators import free_port
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, SegmentationStorage
from pynetdicom import AE, evt
from releases import CONSORTIUM, plan_of, publish

from client.delivery import deliver
from client.folder import SiteFolder
from client.inference import predict
from client.plans import Plans
from client.site import Pacs, SiteConfig
from client.station import Station
from shared_models.errors import FederadError
from shared_models.signing import public_pem


@contextmanager
def archive(*, takes=SegmentationStorage, status: int = 0x0000, title: str = "PACS"):
    """A storage service of pynetdicom's own; gives how it is reached, and what it has taken."""
    taken: list[pydicom.Dataset] = []

    def store(event: evt.Event) -> int:
        taken.append(event.dataset)
        return status

    entity = AE(ae_title=title)
    entity.require_called_aet = True
    entity.add_supported_context(takes, ExplicitVRLittleEndian)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        port = server.socket.getsockname()[1]
        yield Pacs(host="127.0.0.1", port=port, ae_title=title), taken
    finally:
        server.shutdown()


def segmentation(folder: Path, write_series, write_seg) -> Path:
    series = write_series(folder, np.ones((2, 8, 8), int))
    return write_seg(series, {"lesion": np.ones((2, 8, 8), bool)})


def refused(work) -> str:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.code == "C126"
    assert caught.value.remedies
    return caught.value.happened


class TestStore:
    def test_object_arrives_as_it_was_written(self, tmp_path, write_series, write_seg):
        """
        Every attribute of it.
        """
        seg = segmentation(tmp_path, write_series, write_seg)
        with archive() as (pacs, taken):
            assert deliver([seg], pacs) == 1

        assert taken == [pydicom.dcmread(seg)]

    def test_archive_that_does_not_take_it_is_named(self, tmp_path, write_series, write_seg):
        """
        Nobody there, another title, another kind of object, a failure while storing: C126 and why; a warning is none.
        """
        seg = segmentation(tmp_path, write_series, write_seg)
        with archive() as (pacs, _):
            assert "refused to talk" in refused(lambda: deliver([seg], pacs.model_copy(update={"ae_title": "OTHER"})))
        assert "cannot be reached" in refused(lambda: deliver([seg], pacs))
        with archive(takes=MRImageStorage) as (pacs, _):
            assert "takes no objects" in refused(lambda: deliver([seg], pacs))
        with archive(status=0xA700) as (pacs, _):
            assert "0xA700" in refused(lambda: deliver([seg], pacs))
        with archive(status=0xB000) as (pacs, _):
            assert deliver([seg], pacs) == 1
        web = Pacs(dicomweb=f"http://127.0.0.1:{free_port()}/dicom-web")
        assert "did not take the objects" in refused(lambda: deliver([seg], web))


class TestConfiguration:
    @pytest.mark.parametrize(
        "text", ["", 'host = "a"\ndicomweb = "https://a/b"', 'host = "a b"', 'dicomweb = "ftp://a"']
    )
    def test_archive_that_is_none_is_refused(self, tmp_path, text):
        """
        Neither or both ways, or an address that is none: C146.
        """
        (tmp_path / "site.toml").write_text(f'name = "a"\ndata = "/data"\n[pacs]\n{text}\n')

        with pytest.raises(FederadError, match="C146"):
            SiteConfig.load(tmp_path)

    def test_nothing_is_sent_where_no_archive_is_named(self, tmp_path):
        """
        Asked to send, a site without [pacs] says so before it predicts.
        """
        folder = SiteFolder(tmp_path / "site")
        folder.make()
        Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path)))

        with pytest.raises(FederadError, match="names no archive"):
            predict(folder, "f00", tmp_path, tmp_path / "out", send=True)


@pytest.mark.system
@needs_orthanc
class TestOrthanc:
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory):
        """The address of Orthanc's REST service and its DICOM port."""
        with orthanc(tmp_path_factory.mktemp("orthanc")) as server:
            yield server

    @pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
    def test_prediction_is_found_in_the_archive_beside_its_images(self, server, way, write_series, tmp_path):
        """
        Images, segmentation and maps form one study there, and what was made comes back as it was written.
        """
        address, port = server
        pacs = Pacs(host="127.0.0.1", port=port, ae_title="ORTHANC")
        if way == "STOW-RS":
            pacs = Pacs(dicomweb=f"{address}/dicom-web")
        key, folder = Ed25519PrivateKey.generate(), SiteFolder(tmp_path / "site")
        folder.make()
        Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path), device="cpu", pacs=pacs))
        Plans(folder.station).trust(CONSORTIUM, public_pem(key.public_key()))
        series = write_series(tmp_path / "study", np.random.default_rng(0).integers(100, 1000, (3, 20, 24)))
        deliver(series.files, pacs)

        sha256 = publish(folder.releases, key, plan_of()).sha256
        made = predict(folder, sha256, series.folder, tmp_path / "out", maps="dicom", send=True)

        written = [pydicom.dcmread(file) for file in made.folder.glob("*.dcm")]
        assert made.summary["sent"] == len(written) == 3
        found = stored(address, written[0].StudyInstanceUID, tmp_path)
        assert len(found) == 3 + 3
        for one in written:
            assert found[one.SOPInstanceUID] == one

    @pytest.mark.parametrize("has_patient", [True, False])
    def test_reconstruction_is_found_in_the_archive(self, server, has_patient, write_series, tmp_path):
        """
        As MR images beside those it was made from, or as secondary capture of nobody where a file names nobody.
        """
        address, port = server
        pacs = Pacs(host="127.0.0.1", port=port, ae_title="ORTHANC")
        key, folder = Ed25519PrivateKey.generate(), SiteFolder(tmp_path / "site")
        folder.make()
        Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path), device="cpu", pacs=pacs))
        Plans(folder.station).trust(CONSORTIUM, public_pem(key.public_key()))
        values = np.random.default_rng(0).integers(100, 1000, (2, 32, 24))
        study = write_series(tmp_path / "study", values).folder
        if not has_patient:
            study = tmp_path / "scan.npz"
            np.savez(study, kspace=np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(values[0]))))
        task = {
            "kind": "reconstruction",
            "labels": [],
            "network": "cascade",
            "channels": [8, 8],
            "centre_fraction": 0.2,
        }
        plan = plan_of(task=task, data={"patch": [32, 24], "simulated": True})

        made = predict(folder, publish(folder.releases, key, plan).sha256, study, tmp_path / "out", send=True)

        written = [pydicom.dcmread(file) for file in made.folder.rglob("*.dcm")]
        assert made.summary["sent"] == len(written) == (2 if has_patient else 1)
        found = stored(address, written[0].StudyInstanceUID, tmp_path)
        for one in written:
            assert found[one.SOPInstanceUID] == one


def stored(address: str, study: str, folder: Path) -> dict[str, pydicom.Dataset]:
    """Objects of a study that Orthanc holds, by UID."""
    found = {}
    for instance in json.load(urlopen(f"{address}/instances?expand")):
        file = folder / instance["ID"]
        file.write_bytes(urlopen(f"{address}/instances/{instance['ID']}/file").read())
        one = pydicom.dcmread(file)
        if one.StudyInstanceUID == study:
            found[one.SOPInstanceUID] = one
    return found
