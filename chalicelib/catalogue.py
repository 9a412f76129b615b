"""Reads models.json, and says in a sentence what is wrong with it."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from chalicelib.models import MAX_PROMPT_CHARS, PICTURE, PROMPT, SLOT, Model, Models, malformed, texts
from chalicelib.settings import MAX_DEADLINE

FILE = Path(__file__).with_name("models.json")
MAX_NAME_CHARS = 200

TYPES = ("string", "integer", "number", "boolean")


def load(path: Path | None = None) -> Models:
    """The file. Raises SettingError `models_malformed`, whose sentence names the first place that is wrong."""
    try:
        given = json.loads((path or FILE).read_bytes(), object_pairs_hook=_no_twice)
    except (OSError, ValueError, RecursionError) as error:
        raise malformed(f"it cannot be read: {error}") from error
    top = _fields("the file", given, {"unknown_models": _accept_or_refuse, "models": _object})
    known = {name: _model(name, entry) for name, entry in top.get("models", {}).items()}
    return Models(known, refuse_unknown=top.get("unknown_models") == "refuse")


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return dict(pairs)


def _model(name: str, entry: Any) -> Model:
    where = f"models.{name}"
    if not name.strip() or name != name.strip() or len(name) > MAX_NAME_CHARS:
        raise malformed(f"{where}: a model's name has 1 to {MAX_NAME_CHARS} characters, and no space around it")
    told = _fields(
        where,
        entry,
        {
            "about": _text,
            "endpoint": _endpoint,
            "usual_seconds": _positive,
            "price_per_second": _price,
            "deadlines": _object,
            "slots": _object,
            "input": _object,
        },
    )
    of_time = {"start": _deadline, "run": _deadline, "total": _deadline}
    deadlines = _fields(f"{where}.deadlines", told.get("deadlines", {}), of_time)
    slots = {slot: _slot(f"{where}.slots.{slot}", slot, given) for slot, given in told.get("slots", {}).items()}
    template = told.get("input")
    _check_template(where, slots, template)
    return Model(
        name=name,
        about=told.get("about", ""),
        endpoint=told.get("endpoint"),
        usual_seconds=told.get("usual_seconds"),
        price=told.get("price_per_second"),
        slots=slots,
        template=template,
        **deadlines,
    )


def _fields(where: str, given: Any, kinds: Mapping[str, Callable[[Any], str | None]]) -> dict[str, Any]:
    """The fields of an object that are there, null left out; each kind says what is wrong with a value, if anything."""
    if problem := _object(given):
        raise malformed(f"{where} {problem}")
    if unknown := sorted(given.keys() - kinds.keys()):
        raise malformed(f"{where} has a field {unknown[0]!r}; there are {_listed(kinds)}")
    there = {name: value for name, value in given.items() if value is not None}
    for name, value in there.items():
        if problem := kinds[name](value):
            raise malformed(f"{where}.{name} {problem}")
    return there


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "must be an object"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be text"


def _endpoint(value: Any) -> str | None:
    named = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", value)
    return None if named else "must be the id of a RunPod endpoint"


def _accept_or_refuse(value: Any) -> str | None:
    return None if value in ("accept", "refuse") else "must be accept or refuse"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _number(value: Any) -> str | None:
    return None if _is_number(value) else "must be a number"


def _positive(value: Any) -> str | None:
    return None if _is_number(value) and value > 0 else "must be a number over 0"


def _price(value: Any) -> str | None:
    return None if _is_number(value) and value >= 0 else "must be US dollars for a second, null where it is not known"


def _deadline(value: Any) -> str | None:
    allowed = _is_whole(value) and 60 <= value <= MAX_DEADLINE
    return None if allowed else f"must be a whole number of 60 to {MAX_DEADLINE} seconds"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _length(value: Any) -> str | None:
    return None if _is_whole(value) and value >= 0 else "must be a whole number, 0 or more"


def _type(value: Any) -> str | None:
    return None if value in TYPES else f"must be one of {_listed(TYPES)}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _list(value: Any) -> str | None:
    return None if isinstance(value, list) and value else "must be a list of what is allowed"


def _picture(value: Any) -> str | None:
    return None if value == PICTURE else f"must be {PICTURE}"


def _anything(value: Any) -> None:
    return None


OF_SLOT = {
    "type": _type,
    "title": _text,
    "description": _text,
    "default": _anything,
    "random": _flag,
    "enum": _list,
    "minimum": _number,
    "maximum": _number,
    "multipleOf": _positive,
    "minLength": _length,
    "maxLength": _length,
    "contentMediaType": _picture,
}


def _slot(where: str, name: str, given: Any) -> dict[str, Any]:
    if not re.fullmatch(r"\w{1,40}", name):
        raise malformed(f"{where}: a slot's name is made of letters, digits and underscores")
    slot = _fields(where, given, OF_SLOT)
    if "type" not in slot:
        raise malformed(f"{where}.type is missing")
    if problem := _discord(name, slot):
        raise malformed(f"{where}: {problem}")
    return slot


def _discord(name: str, slot: Mapping[str, Any]) -> str | None:
    """What of a slot does not go together."""
    kind, low, high = slot["type"], slot.get("minimum"), slot.get("maximum")
    if low is not None and high is not None and low > high:
        return "minimum must be no more than maximum"
    drawn = kind == "integer" and isinstance(low, int) and isinstance(high, int) and "default" not in slot
    if slot.get("random") and not drawn:
        return "only an integer with minimum and maximum, and without a default, can be random"
    if "contentMediaType" in slot and (kind != "string" or name == PROMPT or "default" in slot):
        return f"a slot for a picture is a string without a default, and not {PROMPT}"
    if name == PROMPT and (kind != "string" or slot.get("maxLength", 0) > MAX_PROMPT_CHARS):
        return f"it must be a string of at most {MAX_PROMPT_CHARS} characters"
    return None


def _check_template(where: str, slots: Mapping[str, Any], template: Any) -> None:
    if template is None:
        if slots:
            raise malformed(f"{where} has slots, but no input for them")
        return
    found = list(texts(template, []))
    named = {name for _, text in found for name in SLOT.findall(text)}
    if unknown := sorted(named - slots.keys()):
        raise malformed(f"{where}.input has a slot {unknown[0]!r} that slots does not describe")
    if unused := sorted(slots.keys() - named):
        raise malformed(f"{where}.slots.{unused[0]} stands nowhere in the input")
    for name, slot in slots.items():
        alone = all(text == f"{{{{{name}}}}}" for _, text in found if name in SLOT.findall(text))
        if slot.get("contentMediaType") == PICTURE and not alone:
            raise malformed(f"{where}.slots.{name}: a picture must stand alone in its text of the input")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
