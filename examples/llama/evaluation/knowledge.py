"""What a model knows: how often the right one of several choices is its likeliest.

Shapes: N rows, L tokens each, P predicted tokens of a row.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from examples.llama.evaluation.items import Item, Items
from examples.llama.model.loss import log_probabilities
from examples.llama.model.sharding import batch_rows, put_batch, replicated
from examples.llama.text.tokenizer import Tokenizer

WIDTH = 128  # tokens of a row, unless an item needs more
TOKENS = 1024  # of a batch, about
Z = 1.96  # of a 95% interval


class _Encoded(NamedTuple):
    """The tokens of an item."""

    prompt: list[int]
    choices: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens to read. A choice's last one is only predicted."""
        return len(self.prompt) + sum(len(x) - 1 for x in self.choices)


class Probe:
    """Items as rows of tokens, several in a row, each prompt only once.

    The choices continue their prompt as branches that do not see each other, so that a
    prompt is computed once for all of its choices.

    Args:
      items: What to ask.
      tokenizer: The model's.
      mesh: That the model's parameters lie on.
      max_position_embeddings: The most tokens of a prompt and a choice.

    Raises:
      ValueError: An item is longer.
    """

    def __init__(
        self,
        items: Items,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        max_position_embeddings: int,
    ):
        self.items, self._mesh = items, mesh
        encoded = _encode(items.items, tokenizer)
        for item, tokens in zip(items.items, encoded, strict=True):
            longest = len(tokens.prompt) + max(map(len, tokens.choices)) - 1
            if longest > max_position_embeddings:
                raise ValueError(
                    f"{items.source}: an item has {longest} tokens, the model reads "
                    f"{max_position_embeddings}: {item.prompt[:60]!r}"
                )
        self._lengths = [[len(x) for x in tokens.choices] for tokens in encoded]
        self._rows = _rows(encoded)
        self._score = jax.jit(_score, static_argnums=0, out_shardings=replicated(mesh))

    def log_likelihoods(
        self, graph: nnx.GraphDef, *states: nnx.State
    ) -> list[np.ndarray]:
        """How likely the choices of each item are after its prompt, in nats.

        Args:
          graph: The model's graph, with or without LoRA.
          states: Its parameters, in the parts that make it up.

        Returns:
          For each item, float64 [choices].
        """
        count, processes = len(self._rows["tokens"]), jax.process_count()
        width = self._rows["tokens"].shape[1]
        # A multiple of what a mesh and its processes divide a batch into.
        parts = math.lcm(batch_rows(self._mesh), processes)
        size = -(-max(1, TOKENS // width) // parts) * parts
        found = []
        for first in range(0, count, size):
            chosen = np.arange(first, first + size) % count  # the last ones are filled
            mine = np.split(chosen, processes)[jax.process_index()]
            batch = {name: x[mine] for name, x in self._rows.items() if name != "of"}
            found.append(self._score(graph, states, put_batch(batch, self._mesh)))
        logs = np.concatenate(jax.device_get(found))[:count]
        of = self._rows["of"]
        sums = np.bincount(of[of >= 0], weights=logs[of >= 0])
        ends = np.cumsum([len(lengths) for lengths in self._lengths])[:-1]
        return np.split(sums, ends)

    def right(self, graph: nnx.GraphDef, *states: nnx.State) -> np.ndarray:
        """Whether the likeliest choice of each item is the right one, bool [items]."""
        scores = self.log_likelihoods(graph, *states)
        return np.array(
            [
                int(np.argmax(score)) == item.answer
                for score, item in zip(scores, self.items.items, strict=True)
            ]
        )


def _score(
    graph: nnx.GraphDef, states: tuple[nnx.State, ...], batch: dict[str, jax.Array]
) -> jax.Array:
    model = nnx.merge(graph, *states)
    inputs = ("positions", "segment_ids", "branch_ids")
    hidden = model.hidden(batch["tokens"], **{name: batch[name] for name in inputs})
    return log_probabilities(hidden, model.head(), batch["places"], batch["targets"])[0]


def _encode(items: Sequence[Item], tokenizer: Tokenizer) -> list[_Encoded]:
    # A model without a bos token still needs something before its first prediction.
    start = [tokenizer.eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id]
    pairs = [(item.prompt, f" {choice}") for item in items for choice in item.choices]
    pieces = iter(tokenizer.encode_pieces(pairs))
    found = []
    for item in items:
        own = [next(pieces) for _ in item.choices]
        found.append(_Encoded(start + own[0][0], [choice for _, choice in own]))
    return found


def _rows(encoded: Sequence[_Encoded]) -> dict[str, np.ndarray]:
    """All items in rows, each filled before the next begins.

    Returns:
      "tokens", "positions", "segment_ids" and "branch_ids", int32 [N, L], see
      `Llama.hidden`; "places" and "targets", int32 [N, P], see `log_probabilities`;
      and "of", int [N, P], the number of the choice that a target belongs to, -1 where
      there is none.
    """
    width = max(WIDTH, *(item.length for item in encoded))
    rows: list[list[tuple[int, ...]]] = []  # of the first four
    predicted: list[list[tuple[int, ...]]] = []  # of the last three
    room, segment, choice_number = 0, 0, 0
    for item in encoded:
        if item.length > room:
            rows.append([])
            predicted.append([])
            room, segment = width, 0
        room, segment = room - item.length, segment + 1
        row, wanted = rows[-1], predicted[-1]
        for position, token in enumerate(item.prompt):
            row.append((token, position, segment, 0))
        asked = len(row) - 1
        for branch, choice in enumerate(item.choices, start=1):
            wanted.append((asked, choice[0], choice_number))
            for i, token in enumerate(choice[:-1]):
                row.append((token, len(item.prompt) + i, segment, branch))
                wanted.append((len(row) - 1, choice[i + 1], choice_number))
            choice_number += 1
    names = ("tokens", "positions", "segment_ids", "branch_ids")
    most = max(map(len, predicted))
    return _table(names, rows, width, 0) | {
        name: np.where(x < 0, 0, x) if name != "of" else x
        for name, x in _table(("places", "targets", "of"), predicted, most, -1).items()
    }


def _table(
    names: Sequence[str],
    rows: Sequence[Sequence[tuple[int, ...]]],
    width: int,
    padding: int,
) -> dict[str, np.ndarray]:
    """Rows of tuples as an array [N, width] of each of their fields."""
    found = np.full((len(names), len(rows), width), padding, np.int32)
    for i, row in enumerate(rows):
        found[:, i, : len(row)] = np.array(row, np.int32).T
    return dict(zip(names, found, strict=True))


def summary(items: Items, right: np.ndarray) -> dict[str, Any]:
    """The share of items that are right, altogether and of each relation.

    Returns:
      The share "right" and its 95% "interval" (Wilson's); "relations", by name the
      number of "items", the same two and the share right by "chance"; and what
      `Items.describe` returns.
    """
    relations = {}
    for name in dict.fromkeys(item.relation for item in items.items):
        of = [i for i, item in enumerate(items.items) if item.relation == name]
        part = items._replace(items=tuple(items.items[i] for i in of))
        relations[name] = {
            "items": len(of),
            "right": float(right[of].mean()),
            "interval": interval(right[of]),
            "chance": part.chance,
        }
    return {
        "right": float(right.mean()),
        "interval": interval(right),
        "relations": relations,
        **items.describe(),
    }


def interval(right: np.ndarray) -> tuple[float, float]:
    """Wilson's 95% interval of a share, of outcomes [n]."""
    n, share = len(right), float(right.mean())
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)
