"""The shapes of the Llama family: what a config.json says, and known models by name."""

import dataclasses

# The model computes floats and rotary angles in float32. Beyond this position it could
# not tell two neighbours apart.
_MOST_POSITIONS = 1 << 24
_FLOATS = (1.2e-38, 3.4e38)  # what float32 holds
_LARGEST_INT = (1 << 31) - 1  # of the int32 that tokens and indices are


def _check_numbers(config: "RopeScaling | LlamaConfig") -> None:
    for field in dataclasses.fields(config):
        name, value, kind = field.name, getattr(config, field.name), field.type
        if kind not in (int, float):
            continue
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not (number and value > 0):
            raise ValueError(
                f"{name} must be a positive {kind.__name__}, got {value!r}"
            )
        smallest, largest = _FLOATS if kind is float else (1, _LARGEST_INT)
        if name.endswith("max_position_embeddings"):
            largest = _MOST_POSITIONS
        if not smallest <= value <= largest:
            raise ValueError(
                f"{name} must be {smallest} to {largest}, got {value!r:.40}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 and 3.2 stretch their rotary frequencies to longer contexts.

    Wavelengths longer than ``original_max_position_embeddings / low_freq_factor``
    grow by `factor`, those shorter than ``... / high_freq_factor`` stay, and those
    between are interpolated. Raises ValueError for a value out of range, as
    `LlamaConfig` does.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.rope_type != "llama3":
            raise ValueError(f"rope_type must be 'llama3', got {self.rope_type!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor "
                f"({self.low_freq_factor}), got {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama, in the names of Hugging Face's config.json.

    `head_dim` None becomes ``hidden_size // num_attention_heads``. Raises ValueError
    that names the field, its value and what is allowed: integers up to 2**31 - 1,
    positions up to 2**24, and floats that float32 holds.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({heads}), "
                f"got {shared}"
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads ({heads}) "
                    f"where head_dim is None, got {self.hidden_size}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        size = self.head_dim
        if not isinstance(size, int) or size < 2 or size % 2:
            raise ValueError(f"head_dim must be positive and even, got {size!r}")

    @property
    def head_size(self) -> int:
        """`head_dim`, which is a number once the configuration is made."""
        assert self.head_dim is not None, "__post_init__ fills it in"
        return self.head_dim


# From the config.json of each model's official release.
_LLAMA31_SCALING = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
ARCHITECTURES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "llama2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    ),
    "llama3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=_LLAMA31_SCALING,
    ),
    "llama3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=dataclasses.replace(_LLAMA31_SCALING, factor=32.0),
        tie_word_embeddings=True,
    ),
}
