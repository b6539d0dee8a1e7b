"""Model configurations and presets.

A checkpoint has a `config.json` next to `ckpt-0`, except for the release, which uses the preset `grok-1`. This module
does not import JAX.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from grok1.errors import ConfigError, json_value

VERSION = "0.1.0"
"""Version of grok1."""

SCALE_GROUPS = 8
"""Number of scale groups of a matrix whose input dimension the release split across its 8 devices."""

DTypeName = Literal["float32", "bfloat16"]
"""Dtypes of activations and of the KV cache."""

KernelsName = Literal["auto", "native", "xla"]
"""Kernel implementations: "native" is hand-written for the platform, "xla" is compiled by XLA."""

_MAX_SIZE = 2**31 - 1  # indices are int32 on the device
_MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a Grok-1 model; the defaults are those of the release.

    Field names are those of the release's config classes and the keys of `config.json`.

    Raises:
        ConfigError: on construction, if a value is invalid.
    """

    vocab_size: int = 131072
    emb_size: int = 6144
    key_size: int = 128
    num_q_heads: int = 48
    num_kv_heads: int = 8
    num_layers: int = 64
    widening_factor: float = 8
    num_experts: int = 8
    num_selected_experts: int = 2
    sequence_len: int = 8192
    attn_output_multiplier: float = 0.08838834764831845
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257

    # Fixed by the architecture.
    pad_id: ClassVar[int] = 0
    bos_id: ClassVar[int] = 1
    eos_id: ClassVar[int] = 2
    unk_id: ClassVar[int] = 3
    rms_norm_eps: ClassVar[float] = 1e-5
    rotary_base: ClassVar[float] = 10000.0
    attn_logit_cap: ClassVar[float] = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _check_integer(field.name, value)
            else:
                _check_positive_number(field.name, value)
        if self.num_layers > _MAX_LAYERS:
            raise ConfigError(f"num_layers is {self.num_layers}, expected at most {_MAX_LAYERS}")
        if self.vocab_size <= self.unk_id:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, expected at least {self.unk_id + 1} "
                "for the ids PAD, BOS, EOS and UNK"
            )
        if self.key_size % 2:
            raise ConfigError(
                f"key_size is {self.key_size}, expected an even number, because rotary embedding rotates pairs"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads is {self.num_q_heads}, expected a multiple of num_kv_heads, which is {self.num_kv_heads}"
            )
        if self.num_selected_experts > self.num_experts:
            raise ConfigError(
                f"num_selected_experts is {self.num_selected_experts}, "
                f"expected at most num_experts, which is {self.num_experts}"
            )
        if self.q_size % SCALE_GROUPS:
            raise ConfigError(
                f"num_q_heads * key_size is {self.q_size}, expected a multiple of {SCALE_GROUPS}, "
                "the number of scale groups of the attention output"
            )
        if not SCALE_GROUPS <= self.ffn_size <= _MAX_SIZE:
            raise ConfigError(
                f"widening_factor is {self.widening_factor}, which makes experts {self.ffn_size} wide, "
                f"expected a width of {SCALE_GROUPS} to {_MAX_SIZE}"
            )

    @property
    def q_size(self) -> int:
        """Total width of all query heads."""
        return self.num_q_heads * self.key_size

    @property
    def kv_size(self) -> int:
        """Total width of all key heads, equal to that of all value heads."""
        return self.num_kv_heads * self.key_size

    @property
    def ffn_size(self) -> int:
        """Width of an expert: two thirds of `widening_factor * emb_size`, rounded up to a multiple of 8."""
        size = int(self.widening_factor * self.emb_size) * 2 // 3
        return size + -size % 8

    def to_json(self) -> str:
        """Return the text of a `config.json`."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "config.json") -> ModelConfig:
        """Parse the text of a `config.json`, named `source` in errors.

        Raises:
            ConfigError: if it is not a JSON object with exactly the fields of this class, or a value is invalid.
        """
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not valid JSON ({error}): correct or restore it") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{source} is not a JSON object: correct or restore it")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values]
        unknown = [name for name in values if name not in names]
        if missing:
            raise ConfigError(f"{source} lacks the keys {', '.join(missing)}: add them or restore the file")
        if unknown:
            raise ConfigError(f'{source}: unknown key "{unknown[0]}", expected only {", ".join(names)}')
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a `config.json` file.

        Raises:
            ConfigError: if the file cannot be read or is not a valid config.
        """
        try:
            with path.open("rb") as file:
                text = file.read(1 << 20)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        return cls.from_json(text, str(path))


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {json_value(value)}, expected an integer")
    if not 1 <= value <= _MAX_SIZE:
        raise ConfigError(f"{name} is {value}, expected 1 to {_MAX_SIZE}")


def _check_positive_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {json_value(value)}, expected a number")
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}, expected a finite number greater than 0")


PRESETS: dict[str, ModelConfig] = {
    "grok-1": ModelConfig(),
    "grok-1-slice": ModelConfig(num_layers=8),
    "tiny": ModelConfig(
        vocab_size=1024,
        emb_size=128,
        key_size=8,
        num_q_heads=16,
        num_kv_heads=8,
        num_layers=12,  # more than ten, to test the order of the files
        widening_factor=6,
        sequence_len=512,
        attn_output_multiplier=8**-0.5,
    ),
    "bard": ModelConfig(
        vocab_size=2048,
        emb_size=192,
        key_size=32,
        num_q_heads=6,
        num_kv_heads=2,
        num_layers=12,
        widening_factor=0.5,
        sequence_len=512,
        attn_output_multiplier=32**-0.5,
        embedding_multiplier_scale=20.0,
        output_multiplier_scale=1.0,
    ),
    "bench-3b": ModelConfig(
        vocab_size=8192,
        emb_size=2048,
        key_size=128,
        num_q_heads=16,
        num_kv_heads=8,
        num_layers=8,
        widening_factor=6,
        sequence_len=1024,
    ),
}
"""Configs by the names that `--preset` accepts."""

TRAINED = {"bard": "checkpoint/bard.zip"}
"""Presets with trained weights, each with the path of the checkpoint's archive in the package."""


def default_dtype(platform: str) -> DTypeName:
    """Return the default dtype of activations on a platform: bfloat16 on accelerators, float32 on CPUs."""
    return "float32" if platform == "cpu" else "bfloat16"


def preset(name: str, layers: int | None = None) -> ModelConfig:
    """Return the config of a preset, with `layers` instead of its own number of layers if given.

    Raises:
        ConfigError: if the name is unknown or `layers` is invalid.
    """
    if name not in PRESETS:
        raise ConfigError(f'unknown preset "{name}", expected one of {", ".join(PRESETS)}')
    return PRESETS[name] if layers is None else dataclasses.replace(PRESETS[name], num_layers=layers)
