"""
What models.json says of a model: its endpoint, price and deadlines, and the input that is made of a request's values.

An input template is any JSON with slots in it, such as "{{seed}}". A slot is described in JSON Schema; one that stands
alone in its text is replaced by the value itself, one within a text by its words.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cached_property
from random import Random
from typing import Any

from chalicelib.errors import RequestError, SettingError
from chalicelib.records import dataclass

SLOT = re.compile(r"\{\{(\w+)\}\}")
PROMPT = "prompt"  # the slot that the field `prompt` fills
PICTURE = "image/*"  # the contentMediaType of a slot for a picture
MAX_PROMPT_CHARS = 10_000
# What every prompt must be, whatever its slot says beside: not blank, and without NUL.
ANY_PROMPT = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_PROMPT_CHARS,
    "pattern": r"^[^\u0000]*[^\s\u0000\u001c-\u001f\u0085][^\u0000]*$",
}

# Where the pictures of a job stand in its input.
Place = list[str | int]


@dataclass(frozen=True, kw_only=True)
class Model:
    """
    One model; what is None is as the settings have it, or not known. `price` is in US dollars for a second of a worker,
    the deadlines and the usual run time are in seconds.
    """

    name: str
    about: str = ""
    endpoint: str | None = None
    usual_seconds: float | None = None
    price: float | None = None
    start: int | None = None
    run: int | None = None
    total: int | None = None
    slots: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: Mapping[str, Any] | None = None

    @cached_property
    def pictures(self) -> list[str]:
        """The slots that are filled with pictures, in their order."""
        return [name for name, slot in self.slots.items() if slot.get("contentMediaType") == PICTURE]

    @cached_property
    def free_slots(self) -> dict[str, Mapping[str, Any]]:
        """The slots that a request fills by their names."""
        return {name: slot for name, slot in self.slots.items() if name != PROMPT and name not in self.pictures}

    @property
    def schema(self) -> dict[str, Any]:
        """What a request must give, in JSON Schema; the prompt and the pictures have fields of their own in it."""
        slots = self.slots if self.template is not None else {PROMPT: ANY_PROMPT}
        properties = {name: {**ANY_PROMPT, **slot} if name == PROMPT else slot for name, slot in slots.items()}
        return {"type": "object", "properties": properties, "required": _required(slots), "additionalProperties": False}

    def read(self, prompt: str, slots: Mapping[str, Any]) -> dict[str, Any]:
        """
        The values of all slots but those for pictures and those that are random. Raises RequestError `slots_invalid`,
        whose sentence names the slot.
        """
        given = {name: value for name, value in slots.items() if value is not None}
        if unknown := sorted(given.keys() - self.free_slots.keys()):
            there = ", ".join(self.free_slots) or "none"
            raise RequestError("slots_invalid", f"slots.{unknown[0][:60]} is none of {self.name}; there are: {there}.")
        if PROMPT in self.slots and (prompt or "default" not in self.slots[PROMPT]):
            given[PROMPT] = prompt
        wanted = {name: slot for name, slot in self.slots.items() if name not in self.pictures}
        checked = _check(self.name, wanted, given)
        return {name: _whole(wanted[name], value) for name, value in checked.items()}

    def fill(self, values: Mapping[str, Any], rng: Random) -> dict[str, Any]:
        """The input that RunPod gets, with None in the place of each picture."""
        drawn = {
            name: rng.randint(slot["minimum"], slot["maximum"])
            for name, slot in self.free_slots.items()
            if slot.get("random") and name not in values
        }
        filled: dict[str, Any] = _filled(self.template, {**values, **drawn, **dict.fromkeys(self.pictures)})
        return filled

    def places(self) -> list[list[Place]]:
        """Where each picture belongs."""
        found = list(texts(self.template, []))
        return [[place for place, text in found if text == f"{{{{{name}}}}}"] for name in self.pictures]

    def check(self) -> None:
        """Look at the slots as a whole, defaults too. Raises SettingError."""
        defaults = {name: slot["default"] for name, slot in self.slots.items() if "default" in slot}
        try:
            _check(self.name, {name: self.slots[name] for name in defaults}, defaults)
        except RequestError as error:
            raise malformed(f"models.{self.name}: the default of {error.sentence}") from error


class Models:
    """The models of the file; any other goes to the default endpoint as it is, unless the file refuses it."""

    def __init__(self, known: Mapping[str, Model], *, refuse_unknown: bool = False) -> None:
        self.known = known
        self.refuse_unknown = refuse_unknown

    def get(self, name: str) -> Model:
        """The model, known or not."""
        return self.known.get(name) or Model(name=name)

    def require(self, name: str) -> Model:
        """The model that a new job is to have. Raises RequestError where the file refuses it."""
        if self.refuse_unknown and name not in self.known:
            raise RequestError(
                "model_unknown", f"There is no model {name[:60]!r} here; there are {', '.join(self.known)}."
            )
        return self.get(name)

    @property
    def unknown(self) -> str:
        """What happens to a job of a model that is not known."""
        return "refused" if self.refuse_unknown else "sent to RUNPOD_ENDPOINT_ID"

    @cached_property
    def endpoints(self) -> dict[str, str]:
        """The endpoint of each model that has one of its own."""
        return {name: model.endpoint for name, model in self.known.items() if model.endpoint}

    @cached_property
    def usual_seconds(self) -> dict[str, float]:
        """The seconds that a run usually takes, of each model of which that is known."""
        return {name: model.usual_seconds for name, model in self.known.items() if model.usual_seconds}

    def check(self) -> None:
        """What is not looked at when the file is read, for it takes a library. Raises SettingError."""
        for model in self.known.values():
            model.check()


def texts(node: Any, place: Place) -> Iterator[tuple[Place, str]]:
    """Every text of a template that has a slot, and where it stands."""
    if isinstance(node, str) and SLOT.search(node):
        yield place, node
    if isinstance(node, dict):
        for name, inner in node.items():
            yield from texts(inner, [*place, name])
    if isinstance(node, list):
        for number, inner in enumerate(node):
            yield from texts(inner, [*place, number])


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        return {name: _filled(inner, values) for name, inner in node.items()}
    if isinstance(node, list):
        return [_filled(inner, values) for inner in node]
    if not isinstance(node, str):
        return node
    if alone := SLOT.fullmatch(node):
        return values[alone[1]]
    return SLOT.sub(lambda found: _in_words(values[found[1]]), node)


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _required(slots: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name, slot in slots.items() if "default" not in slot and not slot.get("random")]


def _check(model: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the defaults of those that are missing. Raises RequestError that names the slot."""
    import fastjsonschema  # here, because only a job of a model with a template needs it

    required = _required(wanted)
    schema = {"type": "object", "properties": dict(wanted), "required": required}
    try:
        checked: dict[str, Any] = fastjsonschema.compile(schema)(dict(given))
    except fastjsonschema.JsonSchemaValueException as error:
        if error.rule == "required":
            missing = next(name for name in required if name not in given)
            raise RequestError("slots_invalid", f"slots.{missing} is missing; {model} needs it.") from error
        named = error.message.removeprefix("data.")
        field = named if error.path[1] == PROMPT else f"slots.{named}"
        raise RequestError("slots_invalid", f"{field[:300]}.") from error
    return checked


def _whole(slot: Mapping[str, Any], value: Any) -> Any:
    """JSON does not tell 20.0 from 20; a worker may."""
    return int(value) if slot["type"] == "integer" else value


def malformed(what: str) -> SettingError:
    """The error of a file that is not as it must be."""
    return SettingError("models_malformed", f"models.json is malformed: {what}.")
