"""Environment variables as a field of frozen models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import AfterValidator, BeforeValidator, WrapSerializer
from typing_extensions import override

from isojob._models import Name

if TYPE_CHECKING:
    from pydantic_core.core_schema import SerializerFunctionWrapHandler

__all__ = ["NO_VARIABLES", "Variables", "check_variable"]


class Environment(Mapping[str, str]):
    """A mapping that hashes, so that what holds it can be a key or a member of a set."""

    __slots__ = ("_variables",)

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {name: variables[name] for name in sorted(variables)}

    @override
    def __getitem__(self, name: str) -> str:
        return self._variables[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    @override
    def __len__(self) -> int:
        return len(self._variables)

    @override
    def __hash__(self) -> int:
        return hash(tuple(self._variables.items()))

    @override
    def __repr__(self) -> str:
        return repr(self._variables)


def check_variable(name: object, value: object) -> None:
    """Refuses what environ(7) cannot carry; the kernel would take it and programs misread it."""
    if not isinstance(name, str) or not isinstance(value, str):
        raise ValueError(f"{name!r}: names and values must be str")  # noqa: TRY004 - the one that pydantic collects
    if not name or "=" in name or "\0" in name:
        raise ValueError(f"{name!r}: a variable's name is not empty and has no '=' and no NUL")
    if "\0" in value:
        raise ValueError(f"{name}: a variable's value has no NUL")


def _freeze_environment(variables: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in variables.items():
        check_variable(name, value)
    return Environment(variables)


def _thaw(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def _serialize_environment(
    value: Mapping[str, str], handler: SerializerFunctionWrapHandler
) -> dict[str, str]:
    plain: dict[str, str] = handler(dict(value))
    return plain


Variables: TypeAlias = Annotated[
    Mapping[Name, Name],
    BeforeValidator(_thaw),
    AfterValidator(_freeze_environment),
    WrapSerializer(_serialize_environment),
]
"""Names and values that environ(7) can carry; hashable, and a plain object in JSON."""
NO_VARIABLES: Mapping[str, str] = Environment({})
