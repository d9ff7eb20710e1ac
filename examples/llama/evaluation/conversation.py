"""A conversation with a model: each answer follows from all that was said before."""

from collections.abc import Generator

import jax
import numpy as np

from examples.checks import check_least
from examples.llama.evaluation.answers import write
from examples.llama.model.llama import Llama
from examples.llama.text.records import Message, Record
from examples.llama.text.templates import prompts
from examples.llama.text.tokenizer import Tokenizer


class Conversation:
    """Questions to a model, and its answers.

    The oldest questions, with their answers, are dropped when the conversation leaves
    an answer neither `max_new_tokens` nor a quarter of the model's positions.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      template: Of `text.templates.TEMPLATES`.
      system: The system message, if any. It is never dropped.
      max_new_tokens: The most tokens of an answer, fewer where the positions end.
      temperature: See `model.generation.generate`.
      seed: Seed of the draws.

    Raises:
      ValueError: The tokenizer has no such template, the template refuses a system
        message, or a number is out of range.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        template: str = "tokenizer",
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        check_least("max_new_tokens", max_new_tokens, 1)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.system = [] if system is None else [Message("system", system)]
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.messages: list[Message] = []  # of the user and the assistant, in turns
        self.dropped = 0  # how many messages are no longer among them
        self._key = jax.random.key(seed)
        self._prompt([Message("user", "?")])  # so that a bad template is an error now

    def ask(self, question: str) -> Generator[str]:
        """The answer to a question, in parts; see `answers.write`.

        If the caller closes the iterator early, the answer is what was written so far.

        Raises:
          ValueError: The question alone leaves no position for an answer, or the
            template refuses it.
        """
        asked = [*self.messages, Message("user", question)]
        limit = self.model.config.max_position_embeddings
        room = min(self.max_new_tokens, limit // 4)
        while len(prompt := self._prompt(asked)) + room > limit and len(asked) > 1:
            asked = asked[2:]
        if len(prompt) >= limit:
            raise ValueError(
                f"a message of {len(prompt)} tokens, its template included, leaves no "
                f"room for an answer; the model has {limit} positions"
            )
        turn = (self.dropped + len(self.messages)) // 2
        self.dropped += len(self.messages) + 1 - len(asked)
        answer = ""
        try:
            for part in write(
                self.model,
                self.tokenizer,
                prompt,
                max_new_tokens=min(self.max_new_tokens, limit - len(prompt)),
                temperature=self.temperature,
                key=jax.random.fold_in(self._key, turn),
            ):
                answer += part
                yield part
        finally:
            self.messages = [*asked, Message("assistant", answer)]

    def _prompt(self, messages: list[Message]) -> np.ndarray:
        record = Record((*self.system, *messages), "conversation")
        (prompt,) = prompts([record], self.tokenizer, self.template)
        return prompt
