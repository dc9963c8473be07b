"""``make fuzz``: break real DICOM files in many ways and see that each is read, or left out with a reason.

``python -m tests.fuzz --mutants 100000 --seed 0``. Seeds are the files that pydicom ships, with a planted patient. Held
for each mutant: no exception but ``UnusableError``, at most 5 s and 1 GB in the process that reads, nothing written, and no
word of the patient in any message or log line. The end status is 1 if one of these broke; what broke is listed by its
number, which with the seed makes the same mutant again.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import re
import resource
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import dcmread
from pydicom.data import get_testdata_files
from rich.progress import track

from client.data import dicom, reader
from client.data.records import Kind
from client.data.skips import UnusableError

NAME, NUMBER = "ZXQVNAME^FUZZED", "ZXQV-4711"
LIMIT_S, LIMIT_MB = 5.0, 1024.0
LARGEST = 300_000
IMAGES = 0.9
"""Share of mutants that are made of images."""

SECRET = b"the secret of the fuzz tests ..."

SYNTAXES = [
    *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"),
    *("1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.70"),
    *("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.8.1", "1.2.3"),
]
CHARSETS = ["ISO_IR 6", "ISO_IR 100", "ISO_IR 192", "GB18030", "ISO 2022 IR 87", "ISO 2022 IR 149", "nonsense"]


@dataclass
class Findings:
    """What became of the mutants."""

    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    peak_mb: float = 0.0


def seeds() -> tuple[list[bytes], list[bytes]]:
    """Images, and what is none: with a planted patient where pydicom can write them again, the others as they are."""
    images, others = [], []
    warnings.simplefilter("ignore")
    for name in sorted(get_testdata_files("**/*")):
        path = Path(name)
        if not path.is_file() or path.stat().st_size > LARGEST or path.suffix in (".json", ".txt", ".icc", ".dump"):
            continue
        is_image = False
        try:
            ds = dcmread(path)
            ds.PatientName, ds.PatientID = NAME, NUMBER
            planted = io.BytesIO()
            ds.save_as(planted)
            content, is_image = planted.getvalue(), "Rows" in ds
        except Exception:
            content = path.read_bytes()  # broken on purpose: it is a seed as it is
        (images if is_image else others).append(content)
    return images, others


def mutant(content: bytes, rng: random.Random) -> bytes:
    """The file with one to three things wrong."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        data = bytearray(rng.choice(MUTATORS)(data, rng))
    return bytes(data)


def elements(data: bytes) -> list[int]:
    """Where explicit elements seem to begin: a tag, then two letters that are a value representation."""
    head = bytes(data[:20_000])
    return [at - 4 for at in range(136, len(head) - 2, 2) if head[at : at + 2] in VRS] or [132]


VRS = set(
    re.findall(rb"[A-Z]+", b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OW PN SH SL SQ SS ST TM UI UL UN US UT")
)


def flip_bits(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 20)):
        if data:
            data[rng.randrange(min(len(data), rng.choice((400, 4000, len(data)))))] ^= 1 << rng.randrange(8)
    return data


def truncate(data: bytearray, rng: random.Random) -> bytes:
    return data[: rng.choice(elements(data)) + rng.randint(0, 12)]


def edit_length(data: bytearray, rng: random.Random) -> bytes:
    at = rng.choice(elements(data))
    wild = rng.choice((0, 1, 0x7FFF, 0xFFFE, 0xFFFF))
    if at + 8 <= len(data):
        data[at + 6 : at + 8] = struct.pack("<H", wild)
    if at + 12 <= len(data) and rng.random() < 0.3:
        data[at + 8 : at + 12] = struct.pack("<I", rng.choice((0, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE)))
    return data


def swap_vr(data: bytearray, rng: random.Random) -> bytes:
    at = rng.choice(elements(data))
    data[at + 4 : at + 6] = rng.choice(sorted(VRS))
    return data


def duplicate(data: bytearray, rng: random.Random) -> bytes:
    begin, end = sorted(rng.choices(elements(data), k=2))
    return data[:end] + data[begin:end] * rng.randint(1, 20) + data[end:]


def nest(data: bytearray, rng: random.Random) -> bytes:
    at = rng.choice(elements(data))
    content = bytes(data[at : at + 40])
    for _ in range(rng.choice((3, 60, 300))):
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
        content = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, len(item)) + item
    return data[:at] + content + data[at:]


def swap_syntax(data: bytearray, rng: random.Random) -> bytes:
    at = bytes(data).find(b"\x02\0\x10\0UI")
    if at < 0 or at + 8 > len(data):
        return data
    (length,) = struct.unpack_from("<H", data, at + 6)
    name = rng.choice(SYNTAXES).encode()
    data[at + 8 : at + 8 + length] = name[:length].ljust(length, b"\0")
    return data


def swap_charset(data: bytearray, rng: random.Random) -> bytes:
    at = bytes(data).find(b"\x08\0\x05\0CS")
    name = rng.choice(CHARSETS).encode()
    name += b" " * (len(name) % 2)
    element = b"\x08\0\x05\0CS" + struct.pack("<H", len(name)) + name
    if 0 <= at <= len(data) - 8:
        (length,) = struct.unpack_from("<H", data, at + 6)
        return data[:at] + element + data[at + 8 + length :]
    return data


def claim(data: bytearray, rng: random.Random) -> bytes:
    """Sizes and depths that are not so."""
    group = rng.choice((0x0010, 0x0011, 0x0002, 0x0100, 0x0101, 0x0103))
    at = bytes(data).find(struct.pack("<HH2s", 0x0028, group, b"US"))
    if 0 <= at <= len(data) - 10:
        data[at + 8 : at + 10] = struct.pack("<H", rng.choice((0, 1, 3, 7, 64, 4096, 16384, 65535)))
    return data


MUTATORS = (flip_bits, truncate, edit_length, swap_vr, duplicate, nest, swap_syntax, swap_charset, claim)


def read_all(path: Path) -> str:
    """Everything that the station would do with a file; what became of it."""
    outcome = "read"
    try:
        kind = dicom.inspect(path, SECRET).kind
        if kind is Kind.STRUCTURES:
            reader.ask("structures", path)
        if kind is Kind.REPORT:
            dicom.report(path, ["lesion"])
    except UnusableError as error:
        outcome = error.reason.value
    try:
        dicom.read_volumes([path])
    except UnusableError as error:
        outcome = error.reason.value
    with suppress(UnusableError):
        reader.ask("segmentation", path)
    return outcome


def peak_mb() -> float:
    """The most memory that a living reader has had."""
    most = 0.0
    for one in reader.living():
        status = Path(f"/proc/{one}/status").read_text(encoding="ascii")
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")] or ["VmHWM: 0 kB"]
        most = max(most, float(line.split()[1]) / 1024)
    return most


def cpu_s() -> float:
    """Computing time of all readers so far, of those that have ended too."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = (int(Path(f"/proc/{one}/schedstat").read_text(encoding="ascii").split()[0]) for one in reader.living())
    return ended.ru_utime + ended.ru_stime + sum(living) / 1e9


def fuzz(numbers: Iterator[int], seed: int, folder: Path, findings: Findings) -> None:
    """Read the mutants with these numbers, one file after the other in a folder of their own."""
    originals = seeds()
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    path = folder / "mutant.dcm"
    try:
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            of_images, others = originals
            path.write_bytes(mutant(rng.choice(of_images if rng.random() < IMAGES else others), rng))
            began = cpu_s()
            with redirect_stdout(said), redirect_stderr(said):
                try:
                    findings.outcomes[read_all(path)] += 1
                except Exception as error:
                    findings.broken.append((number, type(error).__name__))
                    said.write(str(error))
            seconds = cpu_s() - began
            findings.slowest_s = max(findings.slowest_s, seconds)
            if seconds > 6 * LIMIT_S:  # three looks, each of which may take its limit twice
                findings.broken.append((number, f"{seconds:.1f} s"))
            if "ZXQV" in said.getvalue().upper():
                findings.broken.append((number, "the patient was named"))
            said.seek(0)
            said.truncate()
            if sorted(folder.iterdir()) != [path]:
                findings.broken.append((number, "something was written"))
            if number % 20 == 0:
                findings.peak_mb = max(findings.peak_mb, peak_mb())
    finally:
        logging.getLogger().removeHandler(handler)
    findings.peak_mb = max(findings.peak_mb, peak_mb())
    if findings.peak_mb > LIMIT_MB:
        findings.broken.append((-1, f"{findings.peak_mb:.0f} MB"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        numbers = track(range(options.mutants), "fuzz", disable=not sys.stderr.isatty())
        fuzz(iter(numbers), options.seed, Path(folder), findings)
    for outcome, n in findings.outcomes.most_common():
        print(f"{n:8d}  {outcome}")
    print(json.dumps({
        "mutants": options.mutants, "seed": options.seed, "broken": findings.broken,
        "slowest_s": round(findings.slowest_s, 2), "peak_mb": round(findings.peak_mb),
    }))  # fmt: skip
    raise SystemExit(bool(findings.broken))


if __name__ == "__main__":
    main()
