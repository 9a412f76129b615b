"""What a file is, by its first bytes, and how wide and high; never by its name or by what a server says of it."""

import io
from typing import IO

import filetype

from chalicelib import boxes
from chalicelib.content import Content
from chalicelib.errors import PermanentError
from chalicelib.records import dataclass

HEAD_BYTES = 8192  # enough for every magic number
HEADER_BYTES = 1_000_000  # enough for the header of a picture, with its colour profile and what a camera adds

# What is stored, and the ending and Content-Type it gets, by what the library calls it. Formats that are no result of
# an image, video or audio worker are left out, and so is everything that a browser would run (SVG, HTML).
KINDS = {
    "image/png": ("png", "image/png"),
    "image/apng": ("png", "image/png"),
    "image/jpeg": ("jpg", "image/jpeg"),
    "image/webp": ("webp", "image/webp"),
    "image/gif": ("gif", "image/gif"),
    "image/avif": ("avif", "image/avif"),
    "image/heic": ("heic", "image/heic"),
    "image/jpx": ("jp2", "image/jp2"),
    "image/tiff": ("tiff", "image/tiff"),
    "image/bmp": ("bmp", "image/bmp"),
    "video/mp4": ("mp4", "video/mp4"),
    "video/x-m4v": ("m4v", "video/x-m4v"),
    "video/quicktime": ("mov", "video/quicktime"),
    "video/3gpp": ("3gp", "video/3gpp"),
    "video/webm": ("webm", "video/webm"),
    "video/x-matroska": ("mkv", "video/x-matroska"),
    "video/x-msvideo": ("avi", "video/x-msvideo"),
    "video/mpeg": ("mpg", "video/mpeg"),
    "video/x-flv": ("flv", "video/x-flv"),
    "video/x-ms-wmv": ("wmv", "video/x-ms-wmv"),
    "audio/mpeg": ("mp3", "audio/mpeg"),
    "audio/mp4": ("m4a", "audio/mp4"),
    "audio/ogg": ("ogg", "audio/ogg"),
    "audio/x-flac": ("flac", "audio/flac"),
    "audio/x-wav": ("wav", "audio/wav"),
    "audio/x-aiff": ("aiff", "audio/aiff"),
    "audio/aac": ("aac", "audio/aac"),
    "audio/amr": ("amr", "audio/amr"),
}

# Brands of ISO files that the library does not know; any other is taken for MP4, of which there are dozens.
BRANDS = {
    b"avis": "image/avif",
    b"avif": "image/avif",
    b"heix": "image/heic",
    b"heim": "image/heic",
    b"heis": "image/heic",
    b"hevc": "image/heic",
    b"hevx": "image/heic",
    b"mif1": "image/heic",
    b"msf1": "image/heic",
}

# Two bytes are soon found in a text by chance; a real file of these has more than that to show.
WEAK = {"image/bmp", "audio/mpeg", "audio/aac"}
WEAK_BYTES = 128

# Where the library looks at less than is always there.
BEGINNINGS: dict[str, bytes | tuple[bytes, ...]] = {
    "png": b"\x89PNG\r\n\x1a\n",
    "gif": (b"GIF87a", b"GIF89a"),
}

MAX_SIDE = 65_535  # pixels; more is no size but other bytes


@dataclass(frozen=True)
class Kind:
    """A type of file: the ending of its key and its Content-Type."""

    ending: str
    content_type: str


@dataclass(frozen=True)
class Media:
    """A file's type, and its size in pixels as it is shown: None where it has none or its header cannot be read."""

    kind: Kind
    width: int | None = None
    height: int | None = None


def sniff(head: bytes) -> Kind | None:
    """The type by the first bytes; None where they are those of no image, video or audio that is stored."""
    guess = filetype.guess(head[:HEAD_BYTES])
    name = guess.mime if guess else _by_brand(head)
    if name not in KINDS or (name in WEAK and len(head) < WEAK_BYTES):
        return None
    return Kind(*KINDS[name]) if head.startswith(BEGINNINGS.get(KINDS[name][0], b"")) else None


def sort_of(head: bytes) -> str:
    """Image, video or audio, by the first bytes; "" where it is none of them."""
    kind = sniff(head)
    return kind.content_type.partition("/")[0] if kind else ""


def unknown_type() -> PermanentError:
    """The error for a file that is no image, video or audio."""
    return PermanentError(
        "unknown_type", "RunPod's worker returned a file that is no image, video or audio.", service="result"
    )


def identify(content: Content) -> Media:
    """What the file is. Raises PermanentError `unknown_type` where it is no image, video or audio."""
    kind = sniff(content.rewind().read(HEAD_BYTES))
    if kind is None:
        raise unknown_type()
    size = _size(content, kind)
    if size is None or not all(0 < side <= MAX_SIDE for side in size):
        if kind.ending == "bmp":  # two letters and no size are any text
            raise unknown_type()
        return Media(kind)
    return Media(kind, *size)


def _by_brand(head: bytes) -> str:
    if head[4:8] != b"ftyp" or not 16 <= int.from_bytes(head[:4]) <= 1024:
        return ""
    return BRANDS.get(head[8:12], "video/mp4")


def _size(content: Content, kind: Kind) -> tuple[int, int] | None:
    file = content.rewind()
    try:
        if kind.ending in ("mp4", "m4v", "mov", "3gp"):
            return boxes.size_of_mp4(file, content.size)
        if kind.ending in ("avif", "heic"):
            return boxes.size_of_heif(file, content.size)
        if kind.ending in ("webm", "mkv"):
            return boxes.size_of_webm(file, content.size)
        return _size_of_image(file, kind) if kind.content_type.startswith("image/") else None
    except Exception:  # parsers on foreign bytes; without its size a picture is as good as ever
        return None


def _size_of_image(file: IO[bytes], kind: Kind) -> tuple[int, int] | None:
    import imagesize  # here, because only a worker's result needs it

    # A TIFF may have its header at the end. Of the others a beginning is enough, and the library would read all of a
    # file that has no header, byte by byte.
    width, height = imagesize.get(file if kind.ending == "tiff" else io.BytesIO(file.read(HEADER_BYTES)))
    return width, height
