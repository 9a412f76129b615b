"""
dataclass, without a wait at every cold start.

dataclasses.dataclass writes the methods of each class as a text that is compiled when the module is imported: a
millisecond a class, and there are fifty. Here one set of methods, compiled with this file, does for all of them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(field_specifiers=(dataclasses.field,))
def dataclass(*, frozen: bool = False, kw_only: bool = False, repr: bool = True) -> Callable[[type[T]], type[T]]:
    """As dataclasses.dataclass; fields(), replace() and asdict() take its classes too."""

    def make(plain: type[T]) -> type[T]:
        made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only)(plain)
        fields = dataclasses.fields(made)
        made.__init__ = _init(fields)
        made.__eq__, made.__hash__ = _comparison(fields)
        if repr:
            made.__repr__ = _repr
        if frozen:
            made.__setattr__ = made.__delattr__ = _refuse
        else:
            made.__hash__ = None
        done: type[T] = made
        return done

    return make


def _init(fields: tuple[dataclasses.Field[Any], ...]) -> Callable[..., None]:
    factories = {field.name: field.default_factory for field in fields if field.default_factory is not MISSING}
    names = {field.name for field in fields if field.init or field.default is not MISSING or field.name in factories}
    in_order = [field.name for field in fields if field.init and not field.kw_only]
    defaults = {field.name: field.default for field in fields if field.default is not MISSING}

    def __init__(self: Any, *args: Any, **given: Any) -> None:
        values = {**defaults, **dict(zip(in_order, args, strict=False)), **given}
        for name, make in factories.items():
            if name not in values:
                values[name] = make()
        if values.keys() != names or len(args) > len(in_order):
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(sorted(names))}.")
        vars(self).update(values)
        if hasattr(self, "__post_init__"):
            self.__post_init__()

    return __init__


def _comparison(fields: tuple[dataclasses.Field[Any], ...]) -> tuple[Callable[..., bool], Callable[..., int]]:
    told = attrgetter(*(field.name for field in fields))

    def __eq__(self: Any, other: object) -> bool:
        return bool(told(self) == told(other)) if type(other) is type(self) else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(told(self))

    return __eq__, __hash__


def _repr(self: Any) -> str:
    shown = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr)
    return f"{type(self).__name__}({', '.join(shown)})"


def _refuse(self: Any, name: str, *value: object) -> None:
    raise FrozenInstanceError(f"{type(self).__name__} is frozen; {name} stays as it is.")
