"""What a model has learned and what it has forgotten, measured on the way."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from examples.llama.evaluation.instructions import obeyed
from examples.llama.evaluation.items import Items
from examples.llama.evaluation.knowledge import Probe
from examples.llama.evaluation.short_answers import answered
from examples.llama.model.lora import lora_layers
from examples.llama.model.loss import (
    Batch,
    cross_entropy_sum,
    kl_sum,
    next_token_loss,
    predict,
)
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import put_batch
from examples.llama.text.batches import ordered_batches
from examples.llama.text.dataset import Dataset
from examples.llama.text.tokenizer import Tokenizer
from mofo_jax import distance


class Measures:
    """Evaluates parameters on held-out records and on retained text.

    Args:
      graph: Of the trained model.
      frozen: Its parameters that do not train.
      reference: Graph and parameters of the pretrained model, or None.
      held_out, retained: What to evaluate on, or None.
      tokenizer: Of both models.
      probe: What the model is to choose among, or None.
      questions: What it is to answer in words, or None.
      instructions: Whether to give it instructions.
      batch_size: Rows at a time.
      mesh: That the parameters lie on.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        frozen: nnx.State,
        reference: tuple[nnx.GraphDef, nnx.State] | None,
        *,
        held_out: Dataset | None,
        retained: Dataset | None,
        tokenizer: Tokenizer,
        probe: Probe | None,
        questions: Items | None,
        instructions: bool,
        batch_size: int,
        mesh: Mesh,
    ):
        self._graph, self._frozen = graph, frozen
        self._reference = reference and reference[1]
        self._tokenizer, self._probe = tokenizer, probe
        self._questions, self._instructions = questions, instructions
        self._held_out, self._retained = held_out, retained
        self._batch_size, self._mesh = batch_size, mesh

        @jax.jit
        def loss(params: nnx.State, frozen: nnx.State, batch: Batch) -> Any:
            model = nnx.merge(graph, params, frozen)
            return next_token_loss(model, batch, packed=False)

        @jax.jit
        def loss_and_kl(
            params: nnx.State, frozen: nnx.State, pretrained: nnx.State, batch: Batch
        ) -> Any:
            assert reference is not None, "called only where there is one"
            model = nnx.merge(graph, params, frozen)
            other = nnx.merge(reference[0], pretrained)
            hidden, targets, mask = predict(model, batch, packed=False)
            other_hidden, _, _ = predict(other, batch, packed=False)
            total = cross_entropy_sum(hidden, model.head(), targets, mask)
            kl = kl_sum(hidden, model.head(), other_hidden, other.head(), mask)
            return total, kl, jnp.sum(mask, dtype=jnp.float32)

        self._loss, self._loss_and_kl = loss, loss_and_kl

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """Those of `reporting.measured.MEASURES` that can be measured."""
        values: dict[str, float] = {}
        if self._held_out is not None:
            loss = functools.partial(self._loss, params, self._frozen)
            (values["eval_loss"],) = self._means(self._held_out, loss)
        if self._retained is not None and self._reference is None:
            loss = functools.partial(self._loss, params, self._frozen)
            (values["retain_loss"],) = self._means(self._retained, loss)
        elif self._retained is not None:
            loss = functools.partial(
                self._loss_and_kl, params, self._frozen, self._reference
            )
            means = self._means(self._retained, loss)
            values["retain_loss"], values["kl"] = means
        if self._probe is not None:
            right = self._probe.right(self._graph, params, self._frozen)
            values["knowledge"] = float(right.mean())
        model = nnx.merge(self._graph, params, self._frozen)
        if self._questions is not None and self._questions.items:
            right = answered(model, self._tokenizer, self._questions)
            values["answers"] = float(right.mean())
        if self._instructions:
            values["instructions"] = float(obeyed(model, self._tokenizer)[0].mean())
        if self._reference is not None:
            tensors = self.per_tensor(params).values()
            squares = [tensor["distance"] ** 2 for tensor in tensors]
            values["distance"] = float(np.sqrt(np.sum(squares)))
            touched = sum(tensor["touched"] * tensor["size"] for tensor in tensors)
            values["touched"] = touched / sum(tensor["size"] for tensor in tensors)
        return values

    def per_tensor(self, params: nnx.State) -> dict[str, dict[str, float]]:
        """How far each weight tensor is from the pretrained one.

        Returns:
          By the tensor's name: "distance" (Euclidean), "norm" of the pretrained one,
          "size", and "touched", the share of entries that differ from the pretrained
          ones: those ever moved, but for any that came back to the same bits. With
          LoRA the tensors are the merged ones, in float32.
        """
        if self._reference is None:
            return {}
        model = nnx.merge(self._graph, params, self._frozen)
        now, linears = named_parameters(nnx.state(model)), lora_layers(model)
        found, reference = {}, named_parameters(self._reference)
        for name, start in reference.items():
            x = now[name]
            if linear := linears.get(name.removesuffix(".kernel")):
                x = linear.merged(jnp.float32).kernel[...]  # one at a time
            found[name] = _change(x, start)
        return {
            name: {
                "distance": float(moved),
                "norm": float(norm),
                "touched": float(touched) / reference[name].size,
                "size": float(reference[name].size),
            }
            for name, (moved, norm, touched) in jax.device_get(found).items()
        }

    def _means(
        self, dataset: Dataset, sums: Callable[[Batch], tuple[jax.Array, ...]]
    ) -> list[float]:
        """Sums over all rows, but for the last one, divided by the last one."""
        batches = ordered_batches(
            dataset, self._batch_size, jax.process_index(), jax.process_count()
        )
        # Queued before any is fetched, so that the device does not wait.
        found = [sums(put_batch(batch, self._mesh)) for batch in batches]
        table = np.asarray(jax.device_get(found))
        *totals, count = table.sum(axis=0, dtype=np.float64)
        return [float(total / count) for total in totals]


@jax.jit
def _change(x: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
    """Distance from the start, its norm, and the number of entries that differ."""
    norm = jnp.linalg.norm(start.astype(jnp.float32))
    touched = jnp.sum(x != start.astype(x.dtype), dtype=jnp.float32)
    return distance(x, start), norm, touched
