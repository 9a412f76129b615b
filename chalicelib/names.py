"""What the names in a worker's answer say of the values under them."""

import re
from enum import IntEnum
from functools import lru_cache

from chalicelib import media

# Words of which names are made, in the answers of the workers that there are. Those of results:
RESULT_WORDS = frozenset(
    "image images img imgs imageurl picture pictures photo photos video videos videourl audio audios audiourl gif gifs "
    "animation media frame frames file files artifact artifacts sample samples generation generations result results "
    "output outputs data base64 b64 content url urls uri link links src".split()
)
# of the worker's input told back, and of its errors, where they do not say too that it is an output or a result:
INPUT_WORDS = frozenset(
    "input inputs init param params parameters prompt prompts workflow webhook request info args settings options "
    "config error errors traceback log logs".split()
)
OUTPUT_WORDS = frozenset("output outputs result results".split())
# of pictures that are there beside the result, or went into it:
SIDE_WORDS = frozenset(
    "mask control source reference ref original thumbnail thumb preview start end face target style pose "
    "garment".split()
)
# of links that are to something else:
OTHER_LINK_WORDS = frozenset(
    "status response cancel callback doc docs model lora checkpoint license terms help logo homepage support".split()
)
PLACE_WORDS = RESULT_WORDS | {"path", "paths", "filename", "filenames"}

SORT_OF_ENDING = {f".{ending}": mime.partition("/")[0] for ending, mime in media.KINDS.values()} | {
    ".jpeg": "image",
    ".tif": "image",
    ".opus": "audio",
}
ENDINGS = tuple(SORT_OF_ENDING)


class Rank(IntEnum):
    """How likely it is, by the names on the way to it, that a value is the result; the smaller the likelier."""

    RESULT = 0
    RESULT_INSIDE = 1  # under a name that says nothing
    UNNAMED = 2
    SIDE = 3


def rank(name: str, above: Rank) -> Rank:
    """The rank of what has this name, in something of that rank."""
    found = words(name)
    if found & SIDE_WORDS:
        return Rank.SIDE
    if found & RESULT_WORDS:
        return Rank.RESULT_INSIDE if above is Rank.UNNAMED else above
    return max(above, Rank.UNNAMED)


def is_input(name: str) -> bool:
    """Whether it is the name of what the worker was given, or of its errors."""
    found = words(name)
    return bool(found & INPUT_WORDS and not found & OUTPUT_WORDS)


def is_place(name: str) -> bool:
    """Whether a path or an address may stand under it that should have been a file."""
    return bool(words(name) & PLACE_WORDS)


def is_of_a_file(name: str) -> bool:
    """Whether a link under it is surely to a file."""
    return bool(words(name) & RESULT_WORDS)


def is_of_another_page(name: str) -> bool:
    """Whether a link under it is to something else than a file of the result."""
    return bool(words(name) & OTHER_LINK_WORDS)


@lru_cache(maxsize=1_000)
def words(name: str) -> frozenset[str]:
    """The words of a name, without numbers: imageUrl2, image-url and IMAGE_URL have image and url."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z0-9]+", " ", name[:100]).lower()
    return frozenset(word if word in ("base64", "b64") else word.rstrip("0123456789") for word in spaced.split())


def sort_of(link: str) -> str | None:
    """Image, video or audio, by a link's ending; None where that does not say."""
    path = link.lower().partition("?")[0].partition("#")[0]
    return next((sort for ending, sort in SORT_OF_ENDING.items() if path.endswith(ending)), None)


def is_numbered(name: str) -> bool:
    """Whether it is one of several of its kind, as image_2 is."""
    return name[-1:].isdigit() and not name.endswith("64")
