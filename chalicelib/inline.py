"""A file that stands in a worker's answer itself, as base64, with or without the head of a data URL."""

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import field

from chalicelib.errors import PermanentError
from chalicelib.records import dataclass

PIECE_CHARS = 262_144  # decoded at once; a multiple of four
HEAD_CHARS = 8_000

LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/_- \t\n\r\f\v\x1c\x1d\x1e\x1f"
PADDING = "= \t\n\r\f\v\x1c\x1d\x1e\x1f"
# Possessive, so that a text made for it cannot make this go over it again and again.
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]*+(?:=\s*+)*+")


@dataclass(frozen=True)
class Inline:
    """The base64 in a text, from `start` on; line breaks, missing padding and the alphabet for URLs are all right."""

    text: str = field(repr=False)
    start: int = 0

    @classmethod
    def of(cls, text: str) -> "Inline":
        """The base64 after the head of a data URL, whole or in part, or else the whole text."""
        head, comma, _ = text[:200].partition(",")
        return cls(text, len(head) + 1 if comma and head.rstrip().lower().endswith("base64") else 0)

    @property
    def is_base64(self) -> bool:
        """Whether there is nothing else in it, from its beginning to its end."""
        if not self.text.isascii():
            return BASE64.fullmatch(self.text, self.start) is not None
        tail = self.text[-HEAD_CHARS:]
        end = len(self.text) - len(tail) + len(tail.rstrip(PADDING))
        pieces = (self.text[at : min(at + PIECE_CHARS, end)] for at in range(self.start, end, PIECE_CHARS))
        return not any(piece.encode().translate(None, LETTERS) for piece in pieces)  # a fifth of what the pattern takes

    @property
    def head(self) -> bytes:
        """What its beginning decodes to, as far as it does."""
        found = BASE64.match(self.text[self.start : self.start + HEAD_CHARS])
        letters = _letters(found[0]) if found else ""
        return _decode(letters[: len(letters) - len(letters) % 4])

    def pieces(self) -> Iterator[bytes]:
        """The file, decoded piece by piece. Raises PermanentError `base64_invalid`."""
        at = self.start
        for piece in self._pure_pieces():
            at += PIECE_CHARS
            yield piece
        rest = ""
        for begin in range(at, len(self.text), PIECE_CHARS):
            letters = rest + _letters(self.text[begin : begin + PIECE_CHARS])
            whole = len(letters) - len(letters) % 4
            rest = letters[whole:]
            yield _decode(letters[:whole])
        yield _decode(rest)

    def _pure_pieces(self) -> Iterator[bytes]:
        """Those from the beginning on in which nothing must be mended first: nearly always all but the last."""
        for at in range(self.start, len(self.text) - PIECE_CHARS, PIECE_CHARS):
            try:
                yield binascii.a2b_base64(self.text[at : at + PIECE_CHARS], strict_mode=True)
            except (binascii.Error, ValueError):
                return

    def is_same(self, other: "Inline") -> bool:
        """Whether it is the same base64, though perhaps in a data URL."""
        lengths = len(self.text) - self.start, len(other.text) - other.start
        return lengths[0] == lengths[1] and self.text[self.start :] == other.text[other.start :]


def damaged() -> PermanentError:
    """The error for base64 that is none."""
    return PermanentError(
        "base64_invalid", "RunPod's worker returned a file whose base64 is damaged.", service="runpod"
    )


def _letters(text: str) -> str:
    return "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")


def _decode(letters: str) -> bytes:
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise damaged() from error
