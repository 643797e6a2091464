"""Data -> one HTML page: the template with style sheet, scripts and data put in; nothing but these may run."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from data_utils.doctor.style import TOKENS
from dpo.files import write_atomically
from dpo.report.collect import Shards, document

REPORT_FILE = "report.html"
_FOLDER = Path(__file__).parent


def page(data: dict[str, Any]) -> str:
    """The whole page. Scripts and styles run by their hash; nothing can be loaded, sent or run beside them."""
    style = TOKENS + _file("style.css")
    script = _file("charts.js") + _file("page.js")
    names = ", ".join(run["name"] for run in data["runs"])
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy += "; base-uri 'none'; form-action 'none'"
    parts = {
        "policy": policy,
        "title": html.escape(_encodable(names)),
        "style": style,
        "script": script,
        "data": as_script(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("template.html"))


def as_script(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = _encodable(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    escapes = {letter: f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}
    return re.sub("[<>&\u2028\u2029]", lambda match: escapes[match[0]], text)


def write_report(run: Path, shards: Shards | None = None) -> Path:
    """Write `report.html` into a run directory.

    Raises:
        ConfigError: it is no run directory.
        OSError: it cannot be written.
    """
    return write(run / REPORT_FILE, document([run], lambda directory: shards))


def write(path: Path, data: dict[str, Any]) -> Path:
    """Write a page, complete or not at all."""
    write_atomically(path, page(data))
    return path


def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
