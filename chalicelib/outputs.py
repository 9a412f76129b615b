"""
What a worker's answer contains: the files in it, inline or as links, or what is there instead of them.

Workers agree on nothing, so the whole answer is walked, and a value is believed for what it is rather than for the name
it goes by. Names say only how likely it is that it is the result (its Rank), and what is the worker's input told back,
which is never looked at.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from chalicelib import media, names
from chalicelib.errors import PermanentError
from chalicelib.inline import Inline, damaged
from chalicelib.names import Rank
from chalicelib.records import dataclass

# Bounds on an answer, which may be anything.
MAX_DEPTH = 16
MAX_VALUES = 100_000  # texts, lists, objects and names that are looked at
MAX_FILES = 64
MAX_LINK_CHARS = 8_000
MAX_REASON_CHARS = 500
EXCERPT_DEPTH = 4
EXCERPT_PARTS = 10  # of a list or an object

LEAST_FILE_BYTES = 32  # the smallest GIF has 35; a word may look like base64 of something
LEAST_CHARS_OF_NO_MEDIA = 1_000  # of base64 of something else; shorter ones are hashes, tokens and ids

LINK = re.compile(r"https?://\S++", re.IGNORECASE)
LINK_IN_TEXT = re.compile(r"https?://[^\s\"'<>()\[\]]++", re.IGNORECASE)
SIGNED = re.compile(r"(https?://[^\s\"'<>?#]++)[?#][^\s\"'<>]++", re.IGNORECASE)
# The pictures that we give a worker, which some tell back under any name; uploads.py makes their keys.
GIVEN = re.compile(r"/uploads/\d{4}/\d\d/\d\d/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}($|[?#])")
BETWEEN_LINKS = re.compile(r"[\s,]++(?=https?://)", re.IGNORECASE)
OTHER_SCHEME = re.compile(r"(?!data:|https?:)[a-z][a-z0-9+.-]++:/", re.IGNORECASE)
WORKERS_DISK = ("/", "./", "simulated_uploaded/", "local_upload/")  # the last two are what RunPod's SDK says there
FAILED = ("error", "failed", "failure", "fail", "cancelled", "canceled")
FAILED_TEXT = re.compile(r"(error|failed|failure)\b\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """A file that lies where the answer points to."""

    url: str


@dataclass(frozen=True)
class Findings:
    """What an answer contains: its files in the worker's order, and what is wrong beside them."""

    files: tuple[Inline | Link | None, ...]  # None: one that need not be fetched any more
    problems: tuple[PermanentError, ...] = ()


def read(output: Any) -> Findings:
    """
    The files in an answer.

    Raises PermanentError where there are none: `worker_failed` with the worker's own words if it gave any, else what is
    wrong with what it gave (`base64_invalid`, `unknown_type`, `link_scheme`, `local_path`), else `no_output`.
    """
    search = _Search()
    search.walk(output, Rank.RESULT, "output", MAX_DEPTH)
    files = list(search.choose())
    if not files:
        raise search.problems[0] if search.problems else _nothing(output)
    # The name that a file had on the worker's disk is no problem once it is here.
    problems = [error for error in search.problems if error.code != "local_path"]
    if len(files) > MAX_FILES:
        problems.append(_error("too_many_files", f"The result has more than {MAX_FILES} files; the rest was left out."))
    return Findings(tuple(files[:MAX_FILES]), tuple(problems))


def excerpt(output: Any) -> str:
    """The answer as people may read it: long texts, which are files, cut; "" where there is nothing to read."""
    if output in (None, "", [], {}):
        return ""
    try:
        text = json.dumps(_abridged(output, EXCERPT_DEPTH), ensure_ascii=False)
    except (ValueError, RecursionError):
        return ""
    return _clean(text[:MAX_REASON_CHARS])


def without_signatures(text: str) -> str:
    """The text with its links cut at their query: whoever has the signature in one can fetch the file."""
    return SIGNED.sub(r"\1?…", text) if "://" in text else text


def _is_given(file: Inline | Link) -> bool:
    return isinstance(file, Link) and GIVEN.search(file.url) is not None


class _Search:
    """One walk over an answer, which gathers all that is a file and all that should have been one."""

    def __init__(self) -> None:
        self.problems: list[PermanentError] = []
        self._found: list[tuple[Rank, Inline | Link]] = []
        self._values_left = MAX_VALUES

    def choose(self) -> Iterator[Inline | Link]:
        """The files that are the result, in the order of the answer, each once."""
        ranks = {rank for rank, _ in self._found}
        failed = any(error.code == "worker_failed" for error in self.problems)
        named = [file for rank, file in self._found if rank <= Rank.RESULT_INSIDE]
        if failed or any(isinstance(file, Inline) for file in named):
            most = Rank.RESULT_INSIDE  # what else there is beside an error is likelier to be what the worker was given
        elif ranks - {Rank.SIDE} or self.problems:
            most = Rank.UNNAMED
        else:
            most = Rank.SIDE
        return _once(file for rank, file in self._found if rank <= most)

    def walk(self, value: Any, rank: Rank, name: str, depth: int) -> None:
        """Look at a value and at all that is in it."""
        self._values_left -= 1
        if depth == 0 or self._values_left < 0:
            return
        if isinstance(value, str):
            self._walk_text(value, rank, name, depth)
        elif isinstance(value, dict):
            self._walk_object(value, rank, name, depth)
        elif isinstance(value, list):
            for part in value:
                if isinstance(part, (str, dict, list)):  # not numbers: a worker may return a million of them
                    self.walk(part, rank, name, depth - 1)

    def _walk_text(self, text: str, rank: Rank, name: str, depth: int) -> None:
        if text[:2] in ("b'", 'b"') or text[:1] in ("'", '"'):  # what str() of bytes and a second JSON leave around it
            text = text.removeprefix("b").strip("'\"")
        if text.lstrip()[:1] in ("{", "["):  # some workers return their object, or parts of it, as JSON in a text
            try:
                inside = json.loads(text)
            except (ValueError, RecursionError):
                return
            self.walk(inside, rank, name, depth - 1)
            return
        files = [file for file in self._read_text(text, name) if not _is_given(file)]
        self._found += [(_rank_of(file, rank, name), file) for file in files]

    def _walk_object(self, entry: dict[str, Any], rank: Rank, name: str, depth: int) -> None:
        if reason := _reported_error(entry):
            self._trouble(_reported(reason))
        inside = list(itertools.islice(entry, max(0, self._values_left)))
        self._values_left -= len(inside)
        before = len(self._found)
        for inner in inside:
            value = entry[inner]
            known_as = name if inner.isdigit() else inner  # ComfyUI's results go by the numbers of their nodes
            if isinstance(value, (str, dict, list)) and not names.is_input(known_as):
                self.walk(value, names.rank(known_as, rank), known_as, depth - 1)
        texts = {inner: entry[inner] for inner in inside if isinstance(entry[inner], str)}
        self._found[before:] = _without_twins(self._found[before:], texts)

    def _read_text(self, text: str, name: str) -> list[Inline | Link]:
        inline = Inline.of(text)
        head = inline.head
        kind = media.sniff(head) if len(head) >= LEAST_FILE_BYTES else None
        if kind and inline.is_base64:
            return [inline]
        if kind or (inline.start and not head):
            self._trouble(damaged())
        elif inline.start or (len(text) > LEAST_CHARS_OF_NO_MEDIA and " " not in text and inline.is_base64):
            self._trouble(media.unknown_type())
        elif len(text) <= MAX_LINK_CHARS:
            return self._read_place(text.strip(), name)
        return []

    def _read_place(self, text: str, name: str) -> list[Inline | Link]:
        """Where the text says that files are."""
        if names.is_of_another_page(name):
            return []
        if LINK.match(text):
            return [Link(re.sub(r"\s", "%20", link)) for link in BETWEEN_LINKS.split(text) if LINK.match(link)]
        if FAILED_TEXT.match(text):
            self._trouble(_reported(_short(text)))
        elif len(text.split()) != 1:
            return [Link(link) for link in LINK_IN_TEXT.findall(text) if names.sort_of(link)]
        elif names.is_place(name):
            self._note_place(text)
        return []

    def _note_place(self, text: str) -> None:
        """A place that only the worker can reach."""
        if OTHER_SCHEME.match(text):
            self._trouble(_error("link_scheme", f"RunPod's worker gave an address that is not http(s): {text[:100]}"))
        elif text.lower().endswith(names.ENDINGS) or (text.startswith(WORKERS_DISK) and len(text) <= 100):
            place = f"RunPod's worker returned a path on its own disk ({text[:100]})"
            self._trouble(_error("local_path", f"{place}; have it return the file, or give it a bucket."))

    def _trouble(self, error: PermanentError) -> None:
        if len(self.problems) < MAX_FILES and all(known.sentence != error.sentence for known in self.problems):
            # The worker's own words say most.
            self.problems.insert(0 if error.code == "worker_failed" else len(self.problems), error)


def _without_twins(found: list[tuple[Rank, Inline | Link]], texts: dict[str, str]) -> list[tuple[Rank, Inline | Link]]:
    """
    What was found in an object, without links that are the same file as one that stands in it inline.

    Such a link may even lead nowhere from here. A sibling with another number, or of another sort, is no twin.
    """
    called = {text.strip(): name for name, text in texts.items()}
    inline = {
        called[file.text.strip()]: media.sort_of(file.head)
        for _, file in found
        if isinstance(file, Inline) and file.text.strip() in called
    }
    return [
        (rank, file)
        for rank, file in found
        if not (isinstance(file, Link) and _is_twin(file, called.get(file.url), inline))
    ]


def _is_twin(link: Link, name: str | None, inline: dict[str, str]) -> bool:
    if name is None or names.is_numbered(name):
        return False
    sort = next((word for word in ("video", "audio") if word in name.lower()), None) or names.sort_of(link.url)
    return any(sort in (None, other) and not names.is_numbered(known) for known, other in inline.items())


def _once(files: Iterable[Inline | Link]) -> Iterator[Inline | Link]:
    seen: list[Inline | Link] = []
    for file in files:
        if len(seen) <= MAX_FILES and not any(_same(file, known) for known in seen):
            seen.append(file)
            yield file


def _same(one: Inline | Link, other: Inline | Link) -> bool:
    return one.is_same(other) if isinstance(one, Inline) and isinstance(other, Inline) else one == other


def _clean(text: str) -> str:
    # JSON may hold half a character and a NUL, which nothing that has to be written down may.
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _error(code: str, sentence: str) -> PermanentError:
    return PermanentError(code, _clean(sentence), service="runpod")


def _reported(reason: str) -> PermanentError:
    return _error("worker_failed", f"RunPod's worker reported an error: {reason}")


def _nothing(output: Any) -> PermanentError:
    if output in (None, "", [], {}):
        return _error(
            "no_output",
            "RunPod's worker finished but returned nothing. RunPod also drops a result that is too large for it; if "
            "that may be, have the worker return a link.",
        )
    return _error("no_output", "RunPod's worker finished but returned no file.")


def _abridged(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        value = without_signatures(value[:1000]) + value[1000:]
        return value if len(value) <= 200 else f"{value[:60]}… ({len(value)} characters)"
    if not isinstance(value, (dict, list)):
        return value
    if depth == 0:
        return "…"
    if isinstance(value, dict):
        return {name[:100]: _abridged(value[name], depth - 1) for name in itertools.islice(value, EXCERPT_PARTS)}
    return [_abridged(part, depth - 1) for part in value[:EXCERPT_PARTS]]


def _reported_error(entry: dict[str, Any]) -> str:
    """The worker's words where it says that something failed, "" where it does not."""
    for name in ("error", "errors", "error_message"):
        if entry.get(name) and entry[name] not in (True, "None", "null"):
            return _short(entry[name])
    states = [entry.get("status"), entry.get("state")]
    failed = any(isinstance(state, str) and state.lower() in FAILED for state in states)
    if failed or entry.get("error") is True or any(entry.get(name) in (False, "false") for name in ("success", "ok")):
        words = (entry.get(name) for name in ("message", "detail", "reason"))
        return _short(next((word for word in words if word), "it gave no reason"))
    return ""


def _short(value: Any) -> str:
    return without_signatures(value[:4000] if isinstance(value, str) else excerpt(value))[:MAX_REASON_CHARS]


def _rank_of(file: Inline | Link, rank: Rank, name: str) -> Rank:
    """The rank of what was found there: a link that neither name nor ending call a file is the last to be followed."""
    sure = isinstance(file, Inline) or names.sort_of(file.url) or names.is_of_a_file(name)
    return rank if sure else Rank.SIDE
