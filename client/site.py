"""What a hospital decides for itself: its name, where its data lies, on which device it trains, what it permits.

``site.toml`` stands in the station's folder; nothing the server sends can change it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from client.policy import Policy
from shared_models.errors import FederadError
from shared_models.messages import SITE_NAME
from shared_models.scanners import MAKERS, is_scanner

FILE = "site.toml"


class Pacs(BaseModel):
    """The hospital's archive, ``[pacs]`` in ``site.toml``: DICOM (host, port and names) or DICOMweb (an address)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._:-]{1,253}$")
    """Its name in the hospital's network."""

    port: int = Field(default=104, ge=1, le=65_535)
    """Where it listens for DICOM."""

    ae_title: str = Field(default="ANY-SCP", pattern=r"^[\x21-\x5b\x5d-\x7e]{1,16}$")
    """Its application entity title."""

    calling_ae_title: str = Field(default="FEDERAD", pattern=r"^[\x21-\x5b\x5d-\x7e]{1,16}$")
    """The title that this site calls itself; the archive must know it."""

    listen_port: int | None = Field(default=None, ge=1, le=65_535)
    """Where this site listens while it retrieves by C-MOVE; left out, images come by C-GET over the same connection."""

    dicomweb: str | None = Field(default=None, pattern=r"^https?://[^\s@]{1,500}$")
    """Address of its DICOMweb service, such as ``https://pacs.hospital.example/dicom-web``; then host is left out."""

    tls: bool = False
    """Whether DICOM goes over TLS: what this site sends, and what its listener takes."""

    ca_file: str | None = Field(default=None, pattern="^/")
    """Authority (PEM) that the archive's certificate must come from; left out, those that the system knows."""

    certificate: str | None = Field(default=None, pattern="^/")
    """Certificate (PEM) with which this site shows who it is, where the archive asks for one."""

    key: str | None = Field(default=None, pattern="^/")
    """Its private key (PEM); nobody else may read the file."""

    user: str | None = Field(default=None, pattern=r"^[^\x00-\x1f\x7f:]{1,200}$")
    """Name at the DICOMweb service (HTTP basic)."""

    password_file: str | None = Field(default=None, pattern="^/")
    """File with its password in one line; nobody else may read it."""

    token_file: str | None = Field(default=None, pattern="^/")
    """File with a token in one line, in place of name and password (HTTP bearer); nobody else may read it."""

    @property
    def where(self) -> str:
        """The archive, as messages name it."""
        return self.dicomweb or f"{self.ae_title} at {self.host}:{self.port}"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.host is None) == (self.dicomweb is None):
            raise ValueError("give either host or dicomweb")
        is_web = (self.dicomweb or "").startswith("https://")
        if self.tls and self.dicomweb is not None:
            raise ValueError("tls is for host; for dicomweb write https:// into its address")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if (self.ca_file or self.certificate) and not (self.tls or is_web):
            raise ValueError("ca_file, certificate and key need tls = true, or dicomweb with https://")
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file belong together")
        if self.user is not None and self.token_file is not None:
            raise ValueError("give either user and password_file, or token_file")
        if (self.user or self.token_file) and not is_web:
            raise ValueError(
                "user, password_file and token_file need dicomweb with https://: no secret goes unencrypted"
            )
        if self.tls and self.listen_port is not None and not (self.ca_file and self.certificate):
            raise ValueError("listen_port with tls needs ca_file, certificate and key")
        return self


class SiteConfig(BaseModel):
    """The contents of ``site.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=f"^{SITE_NAME}$")
    """The site's name in the consortium."""

    data: str
    """Folder with this site's images, absolute."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where to train: ``auto`` takes a GPU where there is one."""

    anchor: str | None = Field(default=None, pattern="^/")
    """File with the second copy of the ledger, absolute, best on another disk; left out, it lies beside the ledger."""

    scanners: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=100)
    """This hospital's scanners, typed by somebody here, such as ``["SIEMENS Aurora 1.5 T", "GE 3 T"]``: they are told to
    the operator, and decide under ``[privacy]`` whether a discriminator of scanners trains here."""

    emulated: bool = False
    """Whether the patients here are made up; only a simulation says so."""

    pacs: Pacs | None = None
    """The archive that studies come from and predictions are sent to, on demand; left out, none."""

    policy: Policy | None = None
    """What this hospital permits; left out, the defaults of ``policy``."""

    @field_validator("scanners")
    @classmethod
    def _from_the_vocabulary(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if not is_scanner(name):
                raise ValueError(
                    f"{name!r} is no scanner: begin with one of {', '.join(MAKERS)}, at most 64 characters"
                )
        return names

    @property
    def permits(self) -> Policy:
        """The policy in force."""
        return Policy.for_emulated(self.policy) if self.emulated else self.policy or Policy()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``folder/site.toml``.

        Raises
        ------
        FederadError
            C146 if it is missing or wrong.
        """
        try:
            return cls.model_validate_json(json.dumps(tomllib.loads((folder / FILE).read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            what = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
            where = f": {'.'.join(map(str, what['loc']))}: {what['msg']}" if what else f" ({type(error).__name__})"
            known = Policy.model_fields if what and what["loc"][:1] == ("policy",) else cls.model_fields
            raise FederadError(
                "C146",
                happened=f"The site configuration {folder / FILE} cannot be used{where}.",
                because="Without it the station knows neither its name, nor where its data lies, nor what it may do.",
                remedies=("mend the key named above", f"the keys are: {', '.join(known)}"),
            ) from None

    def save(self, folder: Path) -> None:
        """Write ``folder/site.toml``: what was said, and what could be said as comments."""
        tables = self.model_dump(exclude_unset=True, exclude_none=True)
        lines = list(_toml({"device": self.device, **tables}, ""))
        if self.policy is None and not self.emulated:
            lines += ["", "# What this hospital permits. Take the # away from a line to change it.", "#[policy]"]
            for key, field in Policy.model_fields.items():
                if isinstance(field.default, bool | int | float | str):
                    lines += [f"#{key} = {_toml_value(field.default)}  # {field.description}"]
        (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def is_emulated(data: Path) -> bool:
    """Whether a simulation wrote this folder of images, and says so in the manifest beside it."""
    try:
        manifest = json.loads((data.parent / "manifest.json").read_text(encoding="utf-8"))
        return bool(manifest["emulated"] is True)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _toml(table: Mapping[str, Any], name: str) -> Iterator[str]:
    """Lines of a table: its own keys first, then the tables in it."""
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{key} = {_toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield f"\n[{name}{key}]"
            yield from _toml(value, f"{name}{key}.")


def _toml_value(value: Any) -> str:
    """A value as TOML writes it: JSON, but for infinity, characters beyond 16 bits and DEL."""
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
