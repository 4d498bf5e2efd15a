"""What the files of a report hold. Nothing here knows a store or a database.

Data are scripts, for a page that was opened from a disk may load those and nothing else. All they hold is one string
of JSON, so that no text of a recipe is ever read as code or markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from kontext_batch.hashing import sha256_hex

INDEX, SHARED = "index.html", "shared.html"
GENERATOR = "kontext-batch report"
"""By which a folder is known that may be written again."""
SCRIPTS = ("core.js", "model.js", "grid.js", "compare.js", "detail.js", "app.js")
"""In the order in which they are run."""
STYLES, ICON = "report.css", "icon.svg"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of a report."""

    name: str
    """Relative to its folder."""
    data: bytes

    @property
    def media_type(self) -> str:
        return MEDIA_TYPES[self.name[self.name.rindex(".") :]]


def thumbnail_name(sha256: str) -> str:
    return f"pictures/{sha256}-s.webp"


def preview_name(sha256: str) -> str:
    return f"pictures/{sha256}-m.webp"


def data_file(kind: str, number: int, value: Any) -> File:
    """A script that hands `value` to the page. Its name tells its content: an old page keeps its old data."""
    text = f"kontext.take({json.dumps(kind)},{number},{json.dumps(json.dumps(value, separators=(',', ':')))});\n"
    data = text.replace("<", "\\u003c").encode("ascii")
    return File(f"data/{kind}-{number}-{sha256_hex(data)[:12]}.js", data)


@cache
def assets() -> tuple[File, ...]:
    """Icon, styles and scripts of the page, the same for every report of this version."""
    folder = files("kontext_batch.report") / "assets"
    found = []
    for name in (ICON, STYLES, *SCRIPTS):
        data = (folder / name).read_bytes()
        stem, _, ending = name.partition(".")
        found.append(File(f"assets/{stem}-{sha256_hex(data)[:12]}.{ending}", data))
    return tuple(found)


def page(title: str, data: Sequence[str], *, name: str = INDEX, links: Mapping[str, str] | None = None) -> File:
    """The page that loads the assets, then these data files. `links`: file name -> URL to load it from instead."""
    text = (files("kontext_batch.report") / "assets" / "index.html").read_text(encoding="utf-8")
    loaded = []
    for each in (*(file.name for file in assets()), *data):
        place = html.escape((links or {}).get(each, each))
        if each.endswith(".svg"):
            loaded.append(f'<link rel="icon" type="image/svg+xml" href="{place}">')
        elif each.endswith(".css"):
            loaded.append(f'<link rel="stylesheet" href="{place}">')
        else:
            loaded.append(f'<script defer src="{place}"></script>')
    filled = text.replace("{{generator}}", GENERATOR).replace("{{files}}", "\n".join(loaded))
    return File(name, filled.replace("{{title}}", html.escape(title)).encode("utf-8", "replace"))


def is_report(page: bytes) -> bool:
    """Whether that was written by `page`."""
    return f'<meta name="generator" content="{GENERATOR}">'.encode() in page
