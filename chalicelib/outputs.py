"""What a worker's answer contains: the picture in it, inline or as a link."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

import filetype

from chalicelib.errors import PermanentError

MAX_DEPTH = 8

# Where workers put their picture, in the order in which they are believed; `parameters` and `input` are never looked
# at, because some workers send the pictures they were given back in there.
KEYS = (
    "images",
    "image",
    "image_base64",
    "image_url",
    "data_url",
    "data",
    "base64",
    "url",
    "output",
    "result",
    "message",
)

DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,")


@dataclass(frozen=True)
class Picture:
    """A picture that came in the answer itself."""

    content: bytes


@dataclass(frozen=True)
class Link:
    """A picture that lies where the answer points to."""

    url: str


@dataclass(frozen=True)
class FileType:
    """What a file's first bytes say it is."""

    ending: str
    content_type: str


def find(output: Any) -> Picture | Link:
    """The first picture in the answer. Raises PermanentError `no_output` where there is none."""
    found = _find(output, MAX_DEPTH)
    if found is None:
        raise PermanentError("no_output", "RunPod's worker finished but returned no picture.", service="runpod")
    return found


def identify(content: bytes) -> FileType:
    """The type by magic bytes. Raises PermanentError `unknown_type` where they are none of a picture or video."""
    kind = filetype.guess(content[:8192])
    if kind is None or kind.mime.partition("/")[0] not in ("image", "video"):
        raise PermanentError(
            "unknown_type", "RunPod's worker returned a file that is no picture or video.", service="runpod"
        )
    return FileType(kind.extension, kind.mime)


def _find(value: Any, depth: int) -> Picture | Link | None:
    if depth == 0:
        return None
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, dict):
        parts = [value[key] for key in KEYS if key in value]
    else:
        parts = value if isinstance(value, list) else []
    for part in parts:
        if found := _find(part, depth - 1):
            return found
    return None


def _read_text(text: str) -> Picture | Link | None:
    if text.startswith(("https://", "http://")):
        return Link(text)
    prefix = DATA_URL.match(text[:200])
    content = _decode(text[prefix.end() :] if prefix else text)
    return Picture(content) if content and filetype.guess(content[:8192]) else None


def _decode(text: str) -> bytes | None:
    compact = "".join(text.split())
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
