"""What the texts of some flags mean, as typed values."""

import math
from collections.abc import Sequence

from examples.checks import check_name
from examples.llama.model.lora import PROJECTIONS

REGULARIZERS = ("l1", "l2", "l1-decoupled", "l2-decoupled", "ewc", "kl")


def parse_penalties(texts: Sequence[str]) -> dict[str, float]:
    """The strength of each kind of penalty.

    Raises:
      ValueError: A text is not KIND:X with a known kind and X above 0, or one comes
        twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        kind, _, strength = text.partition(":")
        if kind not in REGULARIZERS or kind in found:
            raise ValueError(
                f"regularize must be KIND:X, each kind once, among "
                f"{', '.join(REGULARIZERS)}; got {text!r}"
            )
        found[kind] = _number("regularize", strength, text)
        if not 0 < found[kind] < math.inf:
            raise ValueError(f"regularize must have X above 0, got {text!r}")
    return found


def parse_interpolation(text: str) -> tuple[float, float]:
    """The weights of the first and the last layer of "W" or "W:W".

    Raises:
      ValueError: They are no numbers from 0 to 1.
    """
    first, colon, last = text.partition(":")
    weights = [
        _number("interpolate", x, text) for x in (first, last if colon else first)
    ]
    if not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(f"interpolate must be 0 to 1, got {text!r}")
    return weights[0], weights[1]


def parse_targets(text: str) -> tuple[str, ...]:
    """The projections of "all" or "q_proj,v_proj", in the order of the model.

    Raises:
      ValueError: There is another name.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_name("lora_targets", name, ("all", *PROJECTIONS))
    return tuple(name for name in PROJECTIONS if name in names or "all" in names)


def _number(name: str, text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} needs a number, got {whole!r}") from None
