"""Checked access to the keys of a checkpoint's configuration: every fault is a sentence with the file and the key."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mtp.errors import CheckpointError

# Beyond any real model: sizes that fit these cannot overflow, nor make a list of layers that fills the memory.
MAX_LAYERS = 1 << 10
MAX_SIZE = 1 << 24


class Keys:
    """The values of one file. `prefix` is put before every key asked for ("gemma3.")."""

    def __init__(self, values: Mapping[str, Any], source: object, prefix: str = "") -> None:
        self._values = values
        self._source = source
        self._prefix = prefix

    def fault(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source} has the key {shown(self._prefix + key)} {what}.")

    def has(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` where the file has none, and an error where there is no default either."""
        value = self._values.get(self._prefix + key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._source} lacks the key {shown(self._prefix + key)}.")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        return self._integer(key, self.get(key, default), low, high)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise self.fault(key, f"set to {shown(value)}, which is not a number above 0")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, f"set to {shown(value)}, which is neither true nor false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.fault(key, f"set to {shown(value)}, which is not a text")
        return value

    def section(self, key: str, default: Mapping[str, Any] | None = None) -> Keys:
        """The keys below a key that holds a JSON object."""
        value = self.get(key, default)
        if not isinstance(value, Mapping):
            raise self.fault(key, f"set to {shown(value)}, which is not an object with keys")
        return Keys({f"{self._prefix}{key}.{k}": v for k, v in value.items()}, self._source, f"{self._prefix}{key}.")

    def integers(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> list[int]:
        """The numbers of a list, or of a single number as a list of one."""
        value = self.get(key, default)
        values = value if isinstance(value, np.ndarray | list) else [value]
        return [self._integer(key, v, low, high) for v in values]

    def per_layer(self, key: str, layers: int) -> list[int]:
        """A number for each layer, where the file gives either one for all or a list."""
        values = self.integers(key)
        if len(values) == 1:
            return values * layers
        if len(values) != layers:
            raise self.fault(key, f"with {len(values)} values for {layers} layers")
        return values

    def names(self) -> set[str]:
        return {key.removeprefix(self._prefix) for key in self._values if key.startswith(self._prefix)}

    def _integer(self, key: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not low <= value <= high:
            raise self.fault(key, f"set to {shown(value)}, which is not a whole number from {low} to {high}")
        return int(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises CheckpointError."""
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def parse_json(data: bytes, source: object) -> dict[str, Any]:
    """The object of a JSON text. `source` names its file in errors. Raises CheckpointError."""
    try:
        value = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} has JSON that cannot be read: {str(error).splitlines()[0]}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} has JSON that is not an object with keys.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def shown(value: object, limit: int = 60) -> str:
    """A value of a file as an error may show it: short, and without control characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 3] + "..."
