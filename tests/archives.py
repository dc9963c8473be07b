"""A real archive for tests: Orthanc, as Debian packages it, with its DICOMweb plugin."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from operators import free_port

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/bin")

needs_orthanc = pytest.mark.skipif(
    ORTHANC is None, reason="Orthanc is not installed: apt-get install orthanc orthanc-dicomweb"
)


@contextmanager
def orthanc(folder: Path, **more: Any) -> Iterator[tuple[str, int]]:
    """Orthanc with its files in ``folder``: the address of its REST service and its DICOM port."""
    http, dicom = free_port(), free_port()
    configuration = {
        "StorageDirectory": str(folder / "storage"),
        "HttpPort": http,
        "DicomPort": dicom,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": True,
        "AuthenticationEnabled": False,
        "Plugins": [str(p) for p in Path("/usr/share/orthanc/plugins").glob("libOrthancDicomWeb.so")],
        "DicomWeb": {"Enable": True},
        **more,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(ORTHANC), folder / "orthanc.json"], stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(150):
            time.sleep(0.2)
            try:
                urlopen(f"http://127.0.0.1:{http}/system").close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{http}", dicom
    finally:
        process.terminate()
        process.wait(30)
