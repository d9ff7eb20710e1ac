"""A Llama as a model of lm-evaluation-harness.

Encoding, truncation and stopping are those of the harness's own backend for Hugging
Face models, so that both give the same results. PyTorch and transformers are not used.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    chunks,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, hash_string, make_disjoint_window
from tqdm import tqdm

from examples import terminal
from examples.checks import check_least
from examples.llama.model.generation import decode, left_padded, padded_width, prefill
from examples.llama.model.llama import Llama
from examples.llama.model.loss import log_probabilities
from examples.llama.text.guard import APART
from examples.llama.text.tokenizer import Tokenizer

SCORED_AT_ONCE = 256  # tokens whose logits are in memory at once
DECODED_AT_ONCE = 32  # tokens until texts are looked at for a stop string
# Put where a message is to go on; a template that strips it strips its space.
CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "

Scored = tuple[float, bool]  # a log-likelihood, and whether it is the greedy text's


class JaxLM(TemplateLM):
    """Answers the harness's requests in batches of few shapes, longest texts first.

    A batch has `batch_size` rows, and as many columns as the next power of two from its
    longest text, so that little is compiled.

    Args:
      model: The model, on one device or sharded over those of this process.
      tokenizer: Its tokenizer.
      batch_size: Texts in a batch.
      max_length: Tokens of a text that the model reads, of longer ones the last; by
        default the model's max_position_embeddings, which is the most.
      seed: Of the draws, for tasks that draw.

    Raises:
      ValueError: A number is out of range.
    """

    max_gen_toks = 256  # for tasks that do not say

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        limit = model.config.max_position_embeddings
        max_length = limit if max_length is None else max_length
        check_least("batch_size", batch_size, 1)
        if not 2 <= max_length <= limit:
            raise ValueError(f"max_length must be 2 to {limit}, got {max_length}")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self._key = jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, in which a special token's name stands for it.

        In what `apply_chat_template` gives, this holds for the template's own text
        alone. The start token goes in front, by default unless the text has it already.
        """
        bos = self.tokenizer.bos_id
        (parts,) = self.tokenizer.encode_pieces([string.split(APART)], chat=True)
        tokens = list(itertools.chain(*parts))
        if add_special_tokens is None:
            add_special_tokens = tokens[:1] != [bos]
        return [bos, *tokens] if add_special_tokens and bos is not None else tokens

    @property
    def tokenizer_name(self) -> str:
        """Tells templates apart in the harness's caches."""
        return hash_string(self.tokenizer.chat_template or "")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, by default up to where an answer begins.

        Otherwise it stops within the last message, for the model to continue it.
        """
        *before, last = chat_history
        if not add_generation_prompt:
            last = {**last, "content": last["content"] + CONTINUE}
        render = functools.partial(
            self.tokenizer.apply_chat_template,
            add_generation_prompt=add_generation_prompt,
        )
        try:
            text = render([*before, last])
        except ValueError:
            if not any(message["role"] == "system" for message in before):
                raise
            # Some templates know no system message.
            text = render([x for x in before if x["role"] != "system"] + [last])
        if add_generation_prompt:
            return text
        text, _, after = text.rpartition(CONTINUE.strip())
        return text if after.startswith(" ") else text.rstrip()

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, of long ones in windows."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (total, _) in zip(owners, scored, strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[Scored]:
        # What is read before one-token choices, as MMLU's, is the same for all of them.
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"continuations must be of 1 to {self.max_length} tokens, after "
                    f"one or more, got {len(continuation)} after {len(context)}: "
                    f"{str(requests[i][0])[-60:]}"
                )
            read = (context + continuation)[-self.max_length - 1 : -1]
            groups.setdefault(tuple(read), []).append(i)
        longest_first = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        results: dict[int, Scored] = {}
        with _bar("Log-likelihoods", len(requests), disable_tqdm) as bar:
            for rows in chunks(longest_first, self.batch_size):
                members = [(n, i) for n, row in enumerate(rows) for i in groups[row]]
                scores = self._score(rows, [(n, requests[i][2]) for n, i in members])
                for (_, i), scored in zip(members, scores, strict=True):
                    results[i], strings = scored, requests[i][0]
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, scored)
                bar.update(len(members))
        return [results[i] for i in range(len(requests))]

    def _score(
        self, rows: list[tuple[int, ...]], targets: list[tuple[int, list[int]]]
    ) -> list[Scored]:
        """Scores targets, each the tokens that are predicted at the end of a row.

        Args:
          rows: Up to `batch_size` texts.
          targets: Indices into `rows`, and tokens of which the last comes after the row
            and the others are its last.
        """
        # Padding on the right is what causal attention does not see.
        tokens = np.zeros((self.batch_size, _width(rows, self.max_length)), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        places: list[int] = []
        for i, target in targets:
            end = i * tokens.shape[1] + len(rows[i])
            places.extend(range(end - len(target), end))
        flat = np.array([places, [t for _, target in targets for t in target]])
        count = flat.shape[1]
        flat = np.pad(flat.astype(np.int32), ((0, 0), (0, -count % SCORED_AT_ONCE)))
        graph_and_state = nnx.split(self.model)
        hidden = _hidden(*graph_and_state, tokens)
        parts = [
            _log_probabilities(*graph_and_state, hidden, *part)
            for part in np.split(flat, flat.shape[1] // SCORED_AT_ONCE, axis=1)
        ]
        logs, first = (np.concatenate(x)[:count] for x in zip(*parts, strict=True))
        ends = np.cumsum([len(target) for _, target in targets])[:-1]
        return [
            (float(log.sum(dtype=np.float64)), bool(greedy.all()))
            for log, greedy in zip(
                np.split(logs, ends), np.split(first, ends), strict=True
            )
        ]

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Continuations of contexts, up to a stop string or the end token.

        Of a task's generation_kwargs, until, max_gen_toks (by any of its names),
        do_sample and temperature are followed; others are errors where they matter.
        """
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda x: (-len(self.tok_encode(x[0])), x[0]),
            group_by="gen_kwargs",
            group_fn=lambda x: x[1],
        )
        texts: list[str] = []
        with _bar("Generations", len(requests), disable_tqdm) as bar:
            for chunk in collator.get_batched(n=self.batch_size):
                generated = self._generate([text for text, _ in chunk], chunk[0][1])
                texts += generated
                for request, text in zip(chunk, generated, strict=True):
                    self.cache_hook.add_partial("generate_until", request, text)
                bar.update(len(chunk))
        return collator.get_original(texts)

    def _generate(self, contexts: list[str], gen_kwargs: dict[str, Any]) -> list[str]:
        until, count, temperature = self._options(gen_kwargs)
        room = self.max_length - count
        rows = [
            (self.tok_encode(context) or [self.prefix_token_id])[-room:]
            for context in contexts
        ]
        tokens, mask = left_padded(rows, self.batch_size, _width(rows, room))
        key = None
        if temperature:
            self._key, key = jax.random.split(self._key)
        steps = range(0, count, DECODED_AT_ONCE)
        decoding = prefill(
            self.model, tokens, mask=mask, max_new_tokens=len(steps) * DECODED_AT_ONCE
        )
        new = np.zeros((self.batch_size, 0), np.int32)
        for _ in steps:
            added, decoding = decode(
                self.model,
                decoding,
                max_new_tokens=DECODED_AT_ONCE,
                temperature=temperature,
                key=key,
                eos_id=self.tokenizer.eos_ids,
            )
            new = np.concatenate([new, added], axis=1)[:, :count]
            kept = [self.tokenizer.before_end(ids) for ids in new[: len(rows)].tolist()]
            texts = [self.tokenizer.decode(ids) for ids in kept]
            ended = np.ones(self.batch_size, bool)  # rows without a context, too
            for i, text in enumerate(texts):
                stopped = any(stop in text for stop in until if stop)
                ended[i] = stopped or len(kept[i]) < new.shape[1]
            if ended.all():
                break
            decoding = decoding._replace(ended=jnp.asarray(ended))
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _options(self, gen_kwargs: dict[str, Any]) -> tuple[list[str], int, float]:
        """Stop strings, how many tokens at most, and the temperature."""
        options: dict[str, Any] = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        count, temperature = options.pop("max_gen_toks"), options.pop("temperature", 0)
        eos = self.tokenizer.backend.id_to_token(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until"), eos=eos)
        if options.pop("do_sample"):
            if not temperature > 0:
                raise ValueError(
                    "generation_kwargs: with do_sample, temperature must be above 0, "
                    f"got {temperature}"
                )
        else:  # settings of draws that are not made
            temperature = 0
            options = {k: v for k, v in options.items() if k not in ("top_p", "top_k")}
        if options:
            name, value = options.popitem()
            raise ValueError(f"generation_kwargs: {name} {value} is not implemented")
        if not 1 <= count < self.max_length:
            raise ValueError(
                f"generation_kwargs: max_gen_toks must be 1 to {self.max_length - 1}, "
                f"for the model reads {self.max_length} tokens; got {count}"
            )
        return until, count, float(temperature)


def _width(rows: Sequence[Sequence[int]], most: int) -> int:
    return padded_width(max(map(len, rows)), most)


def _bar(name: str, total: int, disable: bool) -> tqdm:
    return tqdm(total=total, desc=name, disable=disable, **terminal.bar_style())


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).hidden(tokens)


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(
    graph: nnx.GraphDef,
    state: nnx.State,
    hidden: jax.Array,
    places: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Targets' log-probabilities at places of hidden [B, T, D], and if they are first.

    places: int32 [C], indices into hidden as [B * T, D]; targets: int32 [C].
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    head = nnx.merge(graph, state).head()
    logs, first = log_probabilities(flat, head, places[None], targets[None])
    return logs[0], first[0]
