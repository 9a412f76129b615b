"""
The width and height of what is made of boxes (MP4, QuickTime, AVIF, HEIC) or of elements (WebM, Matroska).

Libraries for video read much more than the header, or bring megabytes of native code that would ship to Lambda; the one
for images takes minutes of CPU for some AVIF files of a few kB, and has no size for a turned one.
"""

import itertools
import struct
from collections.abc import Callable, Iterator
from typing import IO

MAX_STEPS = 1_000  # boxes or elements looked at inside one; a real file has some tens
MAX_FOUND = 32  # of one name, such as tracks

Size = tuple[int, int]
Child = tuple[bytes, int, int]  # name, and where its content begins and ends
ReadHead = Callable[[IO[bytes], int], Child | None]


def size_of_mp4(file: IO[bytes], end: int) -> Size | None:
    """Of the first track that has a picture, as it is shown (ISO/IEC 14496-12 §8.3.2); None where there is none."""
    for track in _find(file, end, [b"moov", b"trak", b"tkhd"], _read_box):
        if track[2] - track[1] < 80:
            continue
        file.seek(track[2] - 44)
        header = file.read(44)
        matrix, width, height = header[:36], *struct.unpack(">II", header[36:])
        quarter_turn = matrix[0:4] == b"\0\0\0\0"
        size = (width >> 16, height >> 16)
        if all(size):
            return size[::-1] if quarter_turn else size
    return None


def size_of_heif(file: IO[bytes], end: int) -> Size | None:
    """Of the largest picture in the file, of which the others are tiles and previews (ISO/IEC 23008-12 §6.5.3)."""
    sizes: list[Size] = []
    turned = False
    for _, start, stop in _find(file, end, [b"meta"], _read_box):
        # `meta` has four bytes of its own before the boxes in it.
        for _, first, last in _find(file, stop, [b"iprp", b"ipco"], _read_box, start=start + 4):
            for name, at, _ in _children(file, first, last, _read_box):
                file.seek(at)
                content = file.read(12)
                if name == b"ispe" and len(content) == 12:
                    sizes.append(struct.unpack(">II", content[4:]))
                turned |= name == b"irot" and bool(content[0] & 1)
    largest = max(sizes, key=lambda size: size[0] * size[1], default=None)
    return (largest[1], largest[0]) if largest and turned else largest


def size_of_webm(file: IO[bytes], end: int) -> Size | None:
    """Of the first track that has a picture (RFC 9559 §5.1.4.1.28); None where there is none."""
    segment, tracks, entry, video = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
    for found in _find(file, end, [segment, tracks, entry, video], _read_element):
        numbers = {
            name: _number(file, start, stop) for name, start, stop in _children(file, found[1], found[2], _read_element)
        }
        width, height = numbers.get(b"\xb0", 0), numbers.get(b"\xba", 0)
        if numbers.get(b"\x54\xb2", 0) == 0:  # the size to show it at is in pixels
            width, height = numbers.get(b"\x54\xb0", width), numbers.get(b"\x54\xba", height)
        if width and height:
            return width, height
    return None


def _find(file: IO[bytes], end: int, path: list[bytes], read_head: ReadHead, *, start: int = 0) -> list[Child]:
    """Everything that lies at the path, in the order of the file."""
    places = [(b"", start, end)]
    for name in path:
        inside = (child for _, start, stop in places for child in _children(file, start, stop, read_head))
        places = list(itertools.islice((child for child in inside if child[0] == name), MAX_FOUND))
    return places


def _children(file: IO[bytes], start: int, end: int, read_head: ReadHead) -> Iterator[Child]:
    for _ in range(MAX_STEPS):
        file.seek(start)
        head = read_head(file, end) if start < end else None
        if head is None:
            return
        yield head
        start = head[2]


def _read_box(file: IO[bytes], end: int) -> Child | None:
    start = file.tell()
    head = file.read(16)
    if len(head) < 8:
        return None
    size, length = int.from_bytes(head[:4]), 8
    if size == 1:
        size, length = int.from_bytes(head[8:16]), 16
    stop = end if size == 0 else start + size
    return (head[4:8], start + length, stop) if start + length <= stop <= end else None


def _read_element(file: IO[bytes], end: int) -> Child | None:
    name, _ = _read_variable(file, 4)
    size_bytes, size = _read_variable(file, 8)
    if not name or not size_bytes:
        return None
    start = file.tell()
    unknown = size == (1 << 7 * len(size_bytes)) - 1  # a live recording does not know how long it will be
    stop = end if unknown else start + size
    return (name, start, stop) if stop <= end else None


def _read_variable(file: IO[bytes], longest: int) -> tuple[bytes, int]:
    """A number whose leading zero bits tell its length: its bytes, and its value without the length; b"" is none."""
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 9
    if length > longest:
        return b"", 0
    content = first + file.read(length - 1)
    return (content, int.from_bytes(content) & ((1 << 7 * length) - 1)) if len(content) == length else (b"", 0)


def _number(file: IO[bytes], start: int, stop: int) -> int:
    file.seek(start)
    return int.from_bytes(file.read(min(stop - start, 8)))
