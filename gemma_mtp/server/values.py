"""What requests are made of, checked in bounded time: of what is wrong the first fault counts, so the rest of a list
is not looked at."""

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_STOPS = 16
MAX_STOP = 1000  # characters
_MOST_KEYS = 1 << 16  # of an object whose keys are checked
T = TypeVar("T")


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("A text in the request has a lone surrogate, which is no character.") from None
    except ValueError:
        raise ValueError("A number in the request is not finite, which JSON has no form for.") from None
    except RecursionError:
        raise ValueError("A value in the request is nested too deeply.") from None
    return value


Listed = Annotated[list[T], Field(fail_fast=True)]
Object = Annotated[dict[str, Any], AfterValidator(_is_json)]
Stops = Annotated[
    Listed[Annotated[str, Field(max_length=MAX_STOP)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class Body(BaseModel):
    """A parameter that is not listed, or has a value that is not supported, is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        for part in (value, *value.values()) if isinstance(value, dict) else ():
            if isinstance(part, dict) and len(part) > _MOST_KEYS:
                raise ValueError(f"An object of the request has {len(part)} keys, more than a request needs.")
        return value
