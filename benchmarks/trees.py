"""The shapes of models' parameters, for benchmarks of optimizers."""

Shapes = dict[str, tuple[int, ...]]


def llama(
    layers: int, width: int, hidden: int, vocabulary: int, keys: int | None = None
) -> Shapes:
    """The shapes of a Llama's parameters.

    Args:
      layers: Number of layers.
      width: Of the hidden states.
      hidden: Width of the MLPs.
      vocabulary: Number of tokens.
      keys: Width of all keys, or values, of a position; by default `width`.
    """
    keys = keys or width
    shapes: Shapes = {"embed": (vocabulary, width), "norm": (width,)}
    shapes["lm_head"] = (width, vocabulary)
    for i in range(layers):
        layer: Shapes = {
            "q_proj": (width, width),
            "k_proj": (width, keys),
            "v_proj": (width, keys),
            "o_proj": (width, width),
            "gate_proj": (width, hidden),
            "up_proj": (width, hidden),
            "down_proj": (hidden, width),
            "input_norm": (width,),
            "post_norm": (width,),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


TREES: dict[str, Shapes] = {
    "one 4096x4096 leaf": {"w": (4096, 4096)},
    "Llama of 23M": llama(6, 384, 1024, 16000),
    "Llama of 134M": llama(12, 768, 2048, 32000),
    "TinyLlama": llama(22, 2048, 5632, 32000, keys=256),
    "Llama-2-7B": llama(32, 4096, 11008, 32000),
}
