"""The service's own dataclass is held against that of the standard library."""

import dataclasses
from functools import cached_property

import pytest

from chalicelib.records import dataclass


def pair(make):
    """The same class by either."""
    return make(dataclasses.dataclass), make(dataclass)


def point(dataclass):
    @dataclass(frozen=True)
    class Point:
        """With two fields in order, one by its name, and one that is made anew."""

        x: int
        y: int = 2
        secret: str = dataclasses.field(default="s", repr=False, kw_only=True)
        names: list[str] = dataclasses.field(default_factory=list)

        @cached_property
        def sum(self):
            return self.x + self.y

    return Point


@pytest.mark.parametrize("given", [((1,), {}), ((1, 3), {"secret": "t"}), ((), {"x": 1, "names": ["a"]})])
def test_it_is_made_and_shown_as_the_standard_one_is(given):
    args, named = given
    standard, own = (cls(*args, **named) for cls in pair(point))

    assert dataclasses.asdict(own) == dataclasses.asdict(standard)
    assert repr(own) == repr(standard).replace("point.<locals>.", "")
    assert [field.name for field in dataclasses.fields(own)] == [field.name for field in dataclasses.fields(standard)]


@pytest.mark.parametrize(
    "given", [((), {}), ((1, 2, [], 4), {}), ((1,), {"z": 1})], ids=["one is missing", "one too many", "unknown"]
)
def test_what_is_no_set_of_its_fields_is_refused_as_by_the_standard_one(given):
    args, named = given
    for cls in pair(point):
        with pytest.raises(TypeError):
            cls(*args, **named)


def test_equal_fields_make_it_equal_whatever_is_cached_beside():
    for cls in pair(point):
        one, other = cls(1), cls(1)
        assert one.sum == 3
        assert one == other
        assert dataclasses.replace(one, y=5) != one
        assert dataclasses.replace(one, y=5).sum == 6
        assert one != (1, 2)
        assert one.names is not other.names


def test_a_frozen_one_refuses_to_be_changed_and_can_be_a_key():
    for make in (dataclasses.dataclass, dataclass):

        @make(frozen=True)
        class Key:
            """A key."""

            name: str

        key = Key("a")
        assert {key: 1}[Key("a")] == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            key.name = "b"
        with pytest.raises(dataclasses.FrozenInstanceError):
            del key.name


def test_one_that_is_not_frozen_can_be_changed_and_is_no_key():
    for make in (dataclasses.dataclass, dataclass):

        @make(kw_only=True)
        class Box:
            """A box."""

            size: int
            _half: float = dataclasses.field(init=False)

            def __post_init__(self):
                self._half = self.size / 2

        box = Box(size=3)
        box.size = 5
        assert (box.size, box._half) == (5, 1.5)
        with pytest.raises(TypeError):
            hash(box)
        with pytest.raises(TypeError):
            Box(3)


def test_a_class_inherits_fields():
    for make in (dataclasses.dataclass, dataclass):

        @make(frozen=True)
        class Head:
            """A head."""

            status: int

        @make(frozen=True)
        class Reply(Head):
            """A reply."""

            body: bytes

        assert Reply(200, b"x") == Reply(status=200, body=b"x")
        assert Reply(200, b"x") != Head(200)
