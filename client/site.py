"""What a hospital decides for itself: its name, where its data lies, on which device it trains.

``site.toml`` stands in the station's folder; nothing the server sends can change it.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared_models.errors import FederadError
from shared_models.messages import SITE_NAME

FILE = "site.toml"


class SiteConfig(BaseModel):
    """The contents of ``site.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=f"^{SITE_NAME}$")
    """The site's name in the consortium."""

    data: str
    """Folder with this site's images, absolute."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where to train: ``auto`` takes a GPU where there is one."""

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
            raise FederadError(
                "C146",
                happened=f"The site configuration {folder / FILE} cannot be used{where}.",
                because="Without it the station knows neither its name nor where its data lies.",
                remedies=("mend the key named above", f"the keys are: {', '.join(cls.model_fields)}"),
            ) from None

    def save(self, folder: Path) -> None:
        """Write ``folder/site.toml``."""
        lines = [f"{key} = {_toml_string(value)}" for key, value in self.model_dump().items()]
        (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml_string(text: str) -> str:
    """A TOML basic string: JSON's, but for characters beyond 16 bits and DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
