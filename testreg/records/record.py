"""Records: frozen dataclasses that are read from parsed JSON and written to JSON.

A record has a field for each entry of a JSON object. The type of the field says what the value of the entry must be: a
`Kind` (such as `Text` or `Number`), another record, or a tuple of either. An entry may be missing if its field has a
default. Entries for which there is no field are kept, so that a record is written back as it was read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin, get_type_hints

from testreg.files import shown
from testreg.records.options import Start

INLINE = "inline"
"""Marks a field that holds a record whose entries are not in an object of their own, but among the entries of the outer
record: `Annotated[Effect, INLINE]`."""


@dataclass(frozen=True)
class Kind:
    """What the value of an entry must be.

    Args:
        words: the kind in words, for errors.
        is_valid: whether a value is of this kind.
        plural_words: words for several values of this kind, for errors; None takes `words`.
        read: turns a valid value into what the field holds; its second argument is the name of the entry, for errors.
    """

    words: str
    is_valid: Callable[[object], bool]
    plural_words: str | None = None
    read: Callable[[Any, str], Any] = lambda value, name: value

    def checked(self, value: object, key: str, owner: str) -> Any:
        """Check a value of the entry `key`, and turn it into what the field holds.

        Raises ValueError, which names `owner`, if the value is not of this kind.
        """
        if not self.is_valid(value):
            raise ValueError(f'"{key}" of {owner} must be {self.words}, got {shown(value)}')
        return self.read(value, f'{owner}\'s "{key}"')

    def listed(self) -> Kind:
        """The kind of a list of values of this kind."""
        return Kind(
            f"a list of {self.plural_words or self.words}",
            lambda value: isinstance(value, list | tuple) and all(map(self.is_valid, value)),
            read=lambda value, name: tuple(self.read(each, name) for each in value),
        )


def is_index(value: object) -> bool:
    """Whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_finite(value: object) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that is larger than any float
        return False


def _are_indices(value: object, least: int, lengths: tuple[int, ...]) -> bool:
    """Whether a value is a list of whole numbers of at least `least`, with one of the `lengths`."""
    if not isinstance(value, list | tuple):
        return False
    return len(value) in lengths and all(is_index(each) and each >= least for each in value)


def _is_neuron(value: object) -> bool:
    """Whether a value is a list of a block, a unit, and a score or None."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    block, unit, score = value
    return is_index(block) and is_index(unit) and (score is None or is_finite(score))


def _as_tuple(value: Any, name: str) -> tuple[Any, ...]:
    return tuple(value)


INDEX = Kind("a whole number", is_index)
TEXT = Kind("text", lambda value: isinstance(value, str))
Index = Annotated[int, INDEX]
Integer = Annotated[int, Kind("a whole number", lambda value: type(value) is int)]
Number = Annotated[float, Kind("a finite number", is_finite)]
Text = Annotated[str, TEXT]
Flag = Annotated[bool, Kind("true or false", lambda value: isinstance(value, bool))]
Object = Annotated[Mapping[str, Any], Kind("an object", lambda value: isinstance(value, Mapping), "objects")]
Size = Annotated[
    tuple[int, int],
    Kind("two whole numbers above 0", functools.partial(_are_indices, least=1, lengths=(2,)), read=_as_tuple),
]
GridSize = Annotated[
    tuple[int, ...],
    Kind(
        "two whole numbers above 0, or three of clips",
        functools.partial(_are_indices, least=1, lengths=(2, 3)),
        read=_as_tuple,
    ),
]
Position = Annotated[
    tuple[int, ...],
    Kind(
        "two whole numbers, or three of clips",
        functools.partial(_are_indices, least=0, lengths=(2, 3)),
        "[row, column], or [time, row, column] of clips",
        _as_tuple,
    ),
]
ListedStart = Annotated[Start, Kind("'zeros' or 'mean'", lambda value: value in get_args(Start))]
ListedNeuron = Annotated[
    tuple[int, int, float | None],
    Kind("[block, unit, score or null]", _is_neuron, read=_as_tuple),
]


@dataclass(frozen=True)
class Record:
    """A JSON object. A subclass has a field for each entry that testreg reads."""

    others: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The entries for which there is no field."""
    order: tuple[str, ...] = field(default=(), kw_only=True, repr=False, compare=False)
    """The keys of the object that the record was read from. They are all written again, in this order."""
    is_sparse: ClassVar[bool] = False
    """Whether entries that have their defaults are left out of the JSON of a record that was not read from an object.
    If it was, such entries are always left out, unless they were in the object."""

    @classmethod
    def from_json(cls, data: Any, name: str = "the record") -> Self:
        """Read a record from an object of parsed JSON.

        Args:
            name: what the object is called in errors.

        Raises:
            ValueError: an entry is missing, or is of another kind than its field says.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"{name} must be an object, got {shown(data)}")
        values: dict[str, Any] = {}
        missing: list[str] = []
        for entry in _entries(cls):
            if entry.inline is not None:
                of_inline = {key: data[key] for key in data if key in _keys(entry.inline)}
                values[entry.name] = entry.inline.from_json(of_inline, name)
            elif entry.name in data:
                value = data[entry.name]
                is_null = value is None and entry.is_optional
                values[entry.name] = None if is_null else entry.kind.checked(value, entry.name, name)
            elif entry.is_required:
                missing.append(entry.name)
        if missing:
            raise ValueError(f'"{missing[0]}" of {name} is missing: calibrate again, or take the whole entry out')
        others = {key: value for key, value in data.items() if key not in _keys(cls)}
        return cls(**values, others=others, order=tuple(data))

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        values: dict[str, Any] = {}
        for entry in _entries(type(self)):
            value = getattr(self, entry.name)
            if entry.inline is not None:
                values |= value.to_json()
            elif entry.name in self.order or value != entry.default or not (self.order or self.is_sparse):
                values[entry.name] = _json_of(value)
        values |= self.others
        return {key: values[key] for key in self.order if key in values} | values


def _json_of(value: object) -> object:
    """The value of a field as JSON."""
    if isinstance(value, Record):
        return value.to_json()
    return [_json_of(each) for each in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _Entry:
    """How an entry is read and written, by the type and the default of its field."""

    name: str
    kind: Kind
    inline: type[Record] | None
    """The class of the record, if the field is marked with `INLINE`."""
    is_optional: bool
    """Whether the value may be null."""
    is_required: bool
    """Whether the entry must not be missing, since its field has no default."""
    default: Any


_ENTRIES: dict[type[Record], list[_Entry]] = {}


def _entries(record: type[Record]) -> list[_Entry]:
    """The entries of a class of records. They are computed once for each class."""
    if record not in _ENTRIES:
        hints = get_type_hints(record, include_extras=True)
        fields = (each for each in dataclasses.fields(record) if each.name not in ("others", "order"))
        _ENTRIES[record] = [_entry(each, hints[each.name]) for each in fields]
    return _ENTRIES[record]


def _entry(field: dataclasses.Field[Any], hint: Any) -> _Entry:
    """The entry of a field, which has the type `hint`."""
    is_optional = type(None) in get_args(hint)
    if is_optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return _Entry(
        name=field.name,
        kind=_kind(hint),
        inline=get_args(hint)[0] if INLINE in get_args(hint) else None,
        is_optional=is_optional,
        is_required=default is dataclasses.MISSING,
        default=default,
    )


def _keys(record: type[Record]) -> set[str]:
    """The keys that a class of records reads, with the keys of its inline records."""
    keys: set[str] = set()
    for entry in _entries(record):
        keys |= {entry.name} if entry.inline is None else _keys(entry.inline)
    return keys


def _kind(hint: Any) -> Kind:
    """The kind of an entry's value, from the type of its field."""
    if get_origin(hint) is tuple:
        return _kind(get_args(hint)[0]).listed()
    for each in get_args(hint):
        if isinstance(each, Kind):
            return each
    record: type[Record] = get_args(hint)[0] if INLINE in get_args(hint) else hint
    return Kind("an object", lambda value: isinstance(value, Mapping), "objects", record.from_json)
