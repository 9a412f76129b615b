"""
What a worker's answer contains: the files in it, inline or as links, or what is there instead of them.

Workers agree on nothing, so the whole answer is walked, and a value is believed for what it is rather than for the name
it goes by. Names decide only what is looked at first, and what is never looked at because it may be a picture that the
worker was given.
"""

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from chalicelib import media
from chalicelib.errors import PermanentError
from chalicelib.inline import HEAD_CHARS, Inline, damaged

# Bounds on an answer, which may be anything.
MAX_DEPTH = 16
MAX_VALUES = 20_000  # looked at
MAX_FILES = 64
MAX_LINK_CHARS = 8_000
MAX_REASON_CHARS = 500
EXCERPT_DEPTH = 4
EXCERPT_PARTS = 10  # of a list or an object

LEAST_BYTES = 32  # the smallest GIF has 35; a word may look like base64 of something

# Words of which the names of results are made, in the answers of the workers that there are.
RESULT_WORDS = frozenset(
    "image images img picture pictures photo photos video videos audio audios gif gifs animation media frame frames "
    "file files artifact artifacts sample samples generation generations result results output outputs data base64 "
    "b64 content url urls uri link links src".split()
)
# Names whose values are the worker's input, told back.
INPUT_NAMES = re.compile(r"(inputs?|init|param|params|parameters|prompt|workflow|webhook|request|info)([^a-z]|$)")
# Names of files that are there beside the result.
SIDE_WORDS = frozenset("mask control source reference original thumbnail preview".split())

LINK = re.compile(r"https?://\S++", re.IGNORECASE)
OTHER_SCHEME = re.compile(r"(?!data:)[a-z][a-z0-9+.-]++:/", re.IGNORECASE)
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".mp4", ".webm", ".mov", ".mkv", ".mp3", ".wav", ".flac")
WORKERS_DISK = ("/", "./", "simulated_uploaded/", "local_upload/")  # the last two are what RunPod's SDK says there
FAILED = ("error", "failed", "failure")


@dataclass(frozen=True)
class Link:
    """A file that lies where the answer points to."""

    url: str


@dataclass(frozen=True)
class Findings:
    """What an answer contains: its files in the worker's order, and what is wrong beside them."""

    files: tuple[Inline | Link, ...]
    problems: tuple[PermanentError, ...] = ()


def read(output: Any) -> Findings:
    """
    The files in an answer.

    Raises PermanentError where there are none: `worker_failed` with the worker's own words if it gave any, else what is
    wrong with what it gave (`base64_invalid`, `unknown_type`, `link_scheme`, `local_path`), else `no_output`.
    """
    output = _parsed(output)
    for everything in (False, True):
        search = _Search(everything=everything)
        search.walk(output, "output")
        if search.files:
            return Findings(tuple(search.files), tuple(search.problems))
    raise search.problems[0] if search.problems else _nothing(output)


def excerpt(output: Any) -> str:
    """The answer as people may read it: long texts, which are files, cut; "" where there is nothing to read."""
    if output in (None, "", [], {}):
        return ""
    try:
        text = json.dumps(_abridged(output, EXCERPT_DEPTH), ensure_ascii=False)
    except (ValueError, RecursionError):
        return ""
    return text[:MAX_REASON_CHARS].encode("utf-8", "replace").decode()


class _Search:
    """One walk over an answer: through what is named like a result, or through everything but the worker's input."""

    def __init__(self, *, everything: bool) -> None:
        self.files: list[Inline | Link] = []
        self.problems: list[PermanentError] = []
        self._everything = everything
        self._values_left = MAX_VALUES

    def walk(self, value: Any, name: str, depth: int = MAX_DEPTH) -> None:
        """Look at a value and at all that is in it."""
        self._values_left -= 1
        if depth == 0 or self._values_left < 0:
            return
        if isinstance(value, str):
            self._add(self._read_text(value, name))
        elif isinstance(value, dict):
            self._walk_object(value, depth)
        elif isinstance(value, list):
            for part in value[: self._values_left]:
                self.walk(part, name, depth - 1)

    def _walk_object(self, entry: dict[str, Any], depth: int) -> None:
        if reason := _reported_error(entry):
            self._trouble(_reported(reason))
        names = [name for name in itertools.islice(entry, self._values_left) if self._is_looked_at(name)]
        files = self._files_of(entry, names)
        for name in names:
            if name in files:
                self._add(files[name])
            elif not isinstance(entry[name], str):
                self.walk(entry[name], name, depth - 1)

    def _files_of(self, entry: dict[str, Any], names: list[str]) -> dict[str, Inline | Link]:
        """The files that stand in an object itself, by name."""
        known = len(self.problems)
        read = {name: self._read_text(entry[name], name) for name in names if isinstance(entry[name], str)}
        files = {name: file for name, file in read.items() if file}
        if files:  # the name it had on the worker's disk is no second file
            self.problems[known:] = [error for error in self.problems[known:] if error.code != "local_path"]
        # An inline file and a link in one object are the same file twice; the link may even lead nowhere from here.
        inline = {_sort_of(name) for name, file in files.items() if isinstance(file, Inline)}
        return {name: file for name, file in files.items() if not (isinstance(file, Link) and _sort_of(name) in inline)}

    def _is_looked_at(self, name: str) -> bool:
        if INPUT_NAMES.match(_words(name)):
            return False
        words = set(_words(name).split("_"))
        return self._everything or bool(words & RESULT_WORDS and not words & SIDE_WORDS)

    def _add(self, file: Inline | Link | None) -> None:
        if file is None or any(_same(file, known) for known in self.files):
            return
        if len(self.files) < MAX_FILES:
            self.files.append(file)
        elif len(self.files) == MAX_FILES:
            sentence = f"The result has more than {MAX_FILES} files; the rest was left out."
            self._trouble(_error("too_many_files", sentence))

    def _read_text(self, text: str, name: str) -> Inline | Link | None:
        self._values_left -= 1
        if len(text) <= MAX_LINK_CHARS and LINK.fullmatch(text.strip()):
            return Link(text.strip()) if self._is_followed(text.strip(), name) else None
        inline = Inline.of(text)
        head = inline.head
        kind = media.sniff(head) if len(head) >= LEAST_BYTES else None
        if kind and inline.is_base64:
            return inline
        if kind or (inline.start and not head):
            self._trouble(damaged())
        elif inline.start or (len(text) > HEAD_CHARS and inline.is_base64):
            self._trouble(media.unknown_type())
        else:
            self._read_place(text.strip())
        return None

    def _is_followed(self, url: str, name: str) -> bool:
        # Under any name at all a link may be to a manual or to a model.
        return not self._everything or name == "message" or url.lower().partition("?")[0].endswith(ENDINGS)

    def _read_place(self, text: str) -> None:
        """A place that only the worker can reach."""
        if len(text) > MAX_LINK_CHARS:
            return
        if OTHER_SCHEME.match(text):
            self._trouble(_error("link_scheme", f"RunPod's worker gave an address that is not http(s): {text[:100]}"))
        elif text.startswith("FAILED"):
            self._trouble(_reported(_short(text)))
        elif len(text.split()) == 1 and (text.startswith(WORKERS_DISK) or text.lower().endswith(ENDINGS)):
            place = f"RunPod's worker returned a path on its own disk ({text[:100]})"
            self._trouble(_error("local_path", f"{place}; have it return the file, or give it a bucket."))

    def _trouble(self, error: PermanentError) -> None:
        if len(self.problems) < MAX_FILES and all(known.sentence != error.sentence for known in self.problems):
            # The worker's own words say most.
            self.problems.insert(0 if error.code == "worker_failed" else len(self.problems), error)


def _error(code: str, sentence: str) -> PermanentError:
    # JSON may hold half a character, which nothing that has to be written down may.
    return PermanentError(code, sentence.encode("utf-8", "replace").decode(), service="runpod")


def _reported(reason: str) -> PermanentError:
    return _error("worker_failed", f"RunPod's worker reported an error: {reason}")


def _nothing(output: Any) -> PermanentError:
    if output in (None, "", [], {}):
        return _error(
            "no_output",
            "RunPod's worker finished but returned nothing. RunPod also drops a result that is too large for it; if that "
            "may be, have the worker return a link.",
        )
    return _error("no_output", "RunPod's worker finished but returned no file.")


def _parsed(output: Any) -> Any:
    """Some workers return their object as JSON in a text."""
    if isinstance(output, str) and output[:1] in "{[":
        try:
            return json.loads(output)
        except (ValueError, RecursionError):
            return output
    return output


def _abridged(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 200 else f"{value[:60]}… ({len(value)} characters)"
    if not isinstance(value, (dict, list)):
        return value
    if depth == 0:
        return "…"
    if isinstance(value, dict):
        return {name: _abridged(value[name], depth - 1) for name in itertools.islice(value, EXCERPT_PARTS)}
    return [_abridged(part, depth - 1) for part in value[:EXCERPT_PARTS]]


def _reported_error(entry: dict[str, Any]) -> str:
    """The worker's words where it says that something failed, "" where it does not."""
    status = entry.get("status")
    failed = entry.get("success") is False or (isinstance(status, str) and status.lower() in FAILED)
    for name in ("error", "errors", "error_message"):
        if entry.get(name):
            return _short(entry[name])
    return (_short(entry.get("message") or entry.get("detail")) or "it gave no reason") if failed else ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else excerpt(value) if value else ""
    return text[:MAX_REASON_CHARS]


def _words(name: str) -> str:
    """imageUrl, image-url and IMAGE_URL are image_url."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z0-9]+", "_", name[:100])
    return spaced.strip("_").lower()


def _sort_of(name: str) -> str:
    words = _words(name)
    return next((sort for sort in ("video", "audio") if sort in words), "image")


def _same(one: Inline | Link, other: Inline | Link) -> bool:
    return one.is_same(other) if isinstance(one, Inline) and isinstance(other, Inline) else one == other
