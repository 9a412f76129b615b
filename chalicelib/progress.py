"""How far a worker says that it is: what it reports while its run is not finished, in whatever form."""

import json
import re
from typing import Any

from chalicelib import outputs

NAMES = ("progress", "percentage", "percent", "message", "status")
MAX_CHARS = 200
# "4/10", "40%" and "40 %" anywhere in a text.
STEPS = re.compile(r"(\d{1,6}) ?/ ?(\d{1,6})")
PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?) ?%")


def read(output: Any) -> str | None:
    """
    The progress in the output of an unfinished run, as JSON: `text` for people, and how much of 1 is done, if that can
    be told. None where nothing is reported.
    """
    name, value = _value(output)
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    fraction = _of_text(text) if isinstance(value, str) else _of_number(name, value)
    shown = outputs.without_signatures(text).encode("utf-8", "replace").decode()[:MAX_CHARS]
    return json.dumps({"text": shown, "fraction": fraction}, ensure_ascii=False)


def _value(output: Any) -> tuple[str, Any]:
    if isinstance(output, dict):
        return next(((name, output[name]) for name in NAMES if _is_told(output.get(name))), ("", None))
    return "", output if _is_told(output) else None


def _is_told(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _of_number(name: str, value: float) -> float | None:
    """A share of 1, or of 100 where the name or the number says so."""
    if not 0 <= value <= 100:
        return None
    return round(value / 100 if value > 1 or name.startswith("percent") else value, 3)


def _of_text(text: str) -> float | None:
    if found := STEPS.search(text):
        done, of = int(found[1]), int(found[2])
        return round(done / of, 3) if 0 < of and done <= of else None
    found = PERCENT.search(text)
    return round(float(found[1]) / 100, 3) if found and float(found[1]) <= 100 else None
