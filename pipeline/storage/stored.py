"""Documents read back from storage: JSON becomes a typed value here, or an input error that names file and field.

What was written once may have been cut short, edited or exchanged since, by accident or on purpose. A shape is what
the readers of a document use of it; whoever meets a value behind one may rely on its type.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.storage.errors import RESTORE, unreadable
from pipeline.storage.root import Root, check_key

T = TypeVar("T")
OPEN = ConfigDict(strict=True, extra="allow")  # of documents that carry along what other readers use
Key = Annotated[str, AfterValidator(check_key)]  # names an object below the document's own root
Count = Annotated[int, Field(ge=0, lt=1 << 63)]  # what an int64 of Arrow and numpy holds
OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_SHOWN = 5


def parse(shape: TypeAdapter[T], data: bytes, where: str, *, key: str | None = None, next_step: str = RESTORE) -> T:
    """The typed value of a JSON document; InputError names `where` it lies and every field that breaks the shape."""
    try:
        return shape.validate_json(data)
    except ValidationError as error:
        raise unreadable(where, problems(error), key=key, next_step=next_step) from None


def read_stored(shape: TypeAdapter[T], root: Root, name: str, *, key: str | None = None) -> T:
    """The typed value of a stored JSON document; FileNotFoundError when it is absent, InputError as `parse`."""
    return parse(shape, root.read_bytes(name), root.uri_of(name), key=key)


def read_required(shape: TypeAdapter[T], root: Root, name: str) -> T:
    """As `read_stored`, of a document that another one names: InputError when it is absent, too."""
    try:
        return read_stored(shape, root, name)
    except FileNotFoundError:
        raise unreadable(root.uri_of(name), "it is gone") from None


def problems(error: ValidationError) -> str:
    """The fields of a document that are not as they must be, in one line."""
    found = [f"{'.'.join(map(str, e['loc'])) or 'the document'}: {e['msg']}" for e in error.errors(include_url=False)]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(text[:200] for text in found[:_SHOWN]) + more
