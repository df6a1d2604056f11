"""Reading a config.json: untrusted data, checked value by value.

Nothing in a config is ever executed or imported; only the few values that decide memory are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vramplan.errors import ConfigError
from vramplan.formats import BF16, FP16, FP32, Dtype

MAX_CONFIG_BYTES = 4 * 1024**2  # real ones have a few KiB
MAX_DIMENSION = 10**9
MAX_LAYERS = 10_000
MAX_PARAMETERS = 10**15


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that nobody vouches for.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ConfigError: If the file is missing, too large, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path} has {size:,} bytes, a config.json a few thousand. Is it the right file?"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a config.json or its folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not a JSON object")
    return data


def dtype_option(config: Any) -> str:
    """What this transformers calls the dtype of the weights: ``torch_dtype`` before 4.56."""
    return "dtype" if hasattr(config, "dtype") else "torch_dtype"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON allows")


class ConfigReader:
    """Typed, range-checked access to a config's values.

    Args:
        values: The config's top-level object.
        where: How to name it in errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.warnings: list[str] = []

    def with_defaults(self, **defaults: Any) -> ConfigReader:
        """A reader that takes these values where the config is silent."""
        reader = ConfigReader({**defaults, **_present(self.values)}, self.where)
        reader.warnings = self.warnings
        return reader

    def fail(self, key: str, problem: str) -> ConfigError:
        """An error about one key, ready to raise."""
        return ConfigError(f"{self.where}: {key} {problem}")

    def _get(self, names: tuple[str, ...]) -> Any:
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return value
        return None

    def size(self, *names: str, default: int | None = None, top: int = MAX_DIMENSION) -> int:
        """A positive whole number.

        Args:
            names: The key and its aliases.
            default: Value when absent; None makes the key required.
            top: Largest value that makes sense.
        """
        value = self._get(names)
        if value is None:
            if default is None:
                raise self.fail(names[0], "is missing; it is needed to size the model")
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(names[0], f"must be a whole number, not {_show(value)}")
        if not 1 <= value <= top:
            raise self.fail(names[0], f"must be from 1 to {top:,}, not {_show(value)}")
        return value

    def number(self, *names: str, default: float, low: float, high: float) -> float:
        """A finite number within [low, high]."""
        value = self._get(names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(names[0], f"must be a number, not {_show(value)}")
        if not math.isfinite(value) or not low <= value <= high:
            raise self.fail(names[0], f"must be from {low} to {high}, not {_show(value)}")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """True or false."""
        value = self._get(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(names[0], f"must be true or false, not {_show(value)}")
        return value

    def text(self, *names: str, default: str) -> str:
        """A short string."""
        value = self._get(names)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > 100:
            raise self.fail(names[0], f"must be a short text, not {_show(value)}")
        return value

    def dropout(self, *names: str, default: float = 0.0) -> float:
        """A dropout probability."""
        return self.number(*names, default=default, low=0.0, high=0.999)

    def heads(self, hidden_size: int, num_heads: int) -> int:
        """Head dimension when it is hidden_size / heads.

        Raises:
            ConfigError: If it does not divide.
        """
        if hidden_size % num_heads:
            raise self.fail(
                "hidden_size", f"({hidden_size}) is not divisible by the {num_heads} heads"
            )
        return hidden_size // num_heads

    def kv_heads(self, num_heads: int) -> int:
        """Key and value heads, which must divide the query heads."""
        count = self.size("num_key_value_heads", default=num_heads)
        if num_heads % count:
            raise self.fail(
                "num_key_value_heads", f"({count}) does not divide the {num_heads} heads"
            )
        return count

    def optional(self, key: str, default: float | None) -> float | None:
        """A positive number that null switches off."""
        if key in self.values and self.values[key] is None:
            return None
        if default is None and key not in self.values:
            return None
        return self.number(key, default=default or 0.0, low=1e-6, high=1e9)

    def layer_types(
        self, num_layers: int, allowed: Sequence[str], default: Sequence[str]
    ) -> tuple[str, ...]:
        """The kind of every layer.

        Args:
            num_layers: How many there must be.
            allowed: The kinds that are known.
            default: The kinds when the config does not say.
        """
        kinds = self.values.get("layer_types")
        if kinds is None:
            return tuple(default)
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise self.fail("layer_types", f"must be a list of {num_layers} kinds, one a layer")
        for kind in kinds:
            if kind not in allowed:
                raise self.fail(
                    "layer_types", f"may hold {' and '.join(allowed)}, not {_show(kind)}"
                )
        return tuple(kinds)

    def rope(self, key: str, default: float) -> float:
        """A rotary parameter: top level in old configs, in rope_parameters in new ones."""
        nested = self.values.get("rope_parameters")
        if isinstance(nested, Mapping) and nested.get(key) is not None:
            return ConfigReader(nested, f"{self.where}: rope_parameters").number(
                key, default=default, low=0.0, high=1.0
            )
        return self.number(key, default=default, low=0.0, high=1.0)

    def rotary_dim(self, head_dim: int, default_share: float) -> int:
        """Rotated part of a head: ``partial_rotary_factor`` of it.

        Raises:
            ConfigError: If no pairs of elements are left to rotate, or half a pair.
        """
        share = self.rope("partial_rotary_factor", default_share)
        rotated = int(head_dim * share)
        if rotated < 2 or rotated % 2:
            raise self.fail(
                "partial_rotary_factor",
                f"({share}) rotates {rotated} elements of a head of {head_dim}; it takes pairs",
            )
        return rotated

    def dtype(self) -> Dtype:
        """Dtype of the checkpoint; bf16 when the config does not say."""
        name = self.text("dtype", "torch_dtype", default="bfloat16")
        return {"float32": FP32, "float16": FP16, "bfloat16": BF16}.get(name, BF16)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _show(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
