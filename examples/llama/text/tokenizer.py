"""Tokenizers of Hugging Face, GGUF and llama2.c. Nothing unpickles or runs code."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from examples.files import write_bytes, write_json
from examples.gguf_files import is_gguf
from examples.llama.text.gguf_tokenizer import read_gguf_tokenizer
from examples.llama.text.guard import (
    Finder,
    Guard,
    make_guards,
    make_special,
    scaffolds,
)
from examples.llama.text.huggingface_tokenizer import read_huggingface_tokenizer
from examples.llama.text.llama2c_tokenizer import load_llama2c_tokenizer
from examples.llama.text.rendering import Chat, render


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer, and the special tokens that its model was trained with.

    Nothing adds a special token but the caller, by its id: text that reads like one
    stays text, but for `encode_chat`. Added tokens that the chat template writes around
    messages are special, however a file marks them.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None  # what a text begins with, where the model knows such a token
    # What ends an answer; training puts the first one there. What the chat template
    # puts behind answers is added.
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: str | None = None  # in Jinja, as Hugging Face's
    template_file: str | None = None  # where it is from, for messages

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True  # as plain text, that is
        # Two settings that some tokenizer.json bring along.
        self.backend.no_truncation()
        self.backend.no_padding()
        make_special(self.backend, self._scaffolds)
        # Unused here. A saved tokenizer adds what this trainer adds.
        bos = self._special_tokens().get("bos_token")
        self.backend.post_processor = (
            TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", f"{bos}:1", "$B:1"],
                special_tokens=[(bos, self.bos_id)],
            )
            if bos
            else None
        )
        ends = dict.fromkeys([*self.eos_ids, *self.turn_end_ids])
        object.__setattr__(self, "eos_ids", tuple(ends))

    def __reduce__(self) -> tuple:
        # A copy of the backend forgets `encode_special_tokens`.
        fields = dataclasses.fields(self)
        return Tokenizer, tuple(getattr(self, field.name) for field in fields)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without a token in front or at the end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """As `encode`, of many texts at once, and with their offsets."""
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    def encode_chat(self, text: str) -> tokenizers.Encoding:
        """As `encode`, but special tokens in `text` are recognised.

        It is for what `apply_chat_template` gives.
        """
        return self._chat_backend.encode(text, add_special_tokens=False)

    def encode_pieces(
        self, texts: Sequence[Sequence[str]], *, chat: bool = False
    ) -> list[list[list[int]]]:
        """The ids of each piece of each text, no token reaching over two pieces.

        A text's first piece has the ids that `encode` gives it, and so what a model
        continues is the same in training and in generation. The others have no space
        put in front, as they continue the piece before.

        Args:
          texts: The texts, in pieces.
          chat: Whether special tokens in the texts are recognised.
        """
        flat: list[str] = []
        skipped: list[int] = []
        for pieces in texts:
            before = ""
            for piece in pieces:
                anchor, length = self._anchor(before, chat)
                flat.append(anchor + piece)
                skipped.append(length)
                before += piece
        backend = self._chat_backend if chat else self.backend
        encodings = backend.encode_batch_fast(flat, add_special_tokens=False)
        ids = (
            encoding.ids[length:]
            for encoding, length in zip(encodings, skipped, strict=True)
        )
        return [list(itertools.islice(ids, len(pieces))) for pieces in texts]

    def before_end(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids before the first end token, all of them where there is none."""
        return ids[: next((i for i, x in enumerate(ids) if x in self.eos_ids), None)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, as `transformers` has it; see `encode_chat`.

        Text of a message that would make a turn is changed as `text.guard` says: split
        at `guard.APART` before encoding. The template runs within the bounds of
        `text.rendering`.

        A template that asks for the date gets 26 July 2024, and so the same text on
        every day.

        Args:
          messages: Each of a "role" and a "content".
          add_generation_prompt: Whether to end with what comes before an answer.

        Raises:
          ValueError: The tokenizer has no template, or the template is invalid,
            refuses the messages, or takes too much time or memory.
        """
        chat = Chat(
            [self._as_text(message) for message in messages],
            [(len(messages), add_generation_prompt)],
        )
        (texts,) = self.render_chats([chat])
        if isinstance(texts, ValueError):
            raise texts
        return texts[0]

    def render_chats(self, chats: Sequence[Chat]) -> list[list[str] | ValueError]:
        """As `apply_chat_template`, of many conversations and their beginnings.

        Their messages are taken as they are: give it what `as_text` makes of them.

        Returns:
          The texts of each conversation, or what `apply_chat_template` raises.
        """
        if self.chat_template is None:
            missing = (
                "the tokenizer has no chat template; expected chat_template.jinja or "
                '"chat_template" in tokenizer_config.json beside tokenizer.json'
            )
            return [ValueError(missing) for _ in chats]
        file = f" ({self.template_file})" if self.template_file else ""
        return [
            ValueError(f"the chat template fails: {found}{file}")
            if isinstance(found, ValueError)
            else found
            for found in render(self.chat_template, chats, self._special_tokens())
        ]

    def as_text(self, role: str, content: str, template: str = "tokenizer") -> str:
        """The content of a message, in which nothing makes a turn; see `text.guard`.

        In what an assistant says, added tokens that are not special stay tokens, unless
        the template writes them around messages.

        Args:
          role: Whose message it is.
          content: What it says.
          template: "paper" for the trainer's own format, in which special tokens need
            no care, or "tokenizer".

        Raises:
          ValueError: It reads like a special token of one character.
        """
        return self._guards[template, role == "assistant"](content)

    def find_special_token(self, text: str) -> str | None:
        """A special token that `text` reads like somewhere, if there is one."""
        return self._special.find(text)

    def _special_tokens(self) -> dict[str, str | None]:
        """The special tokens, by the names that Hugging Face has for them."""
        ids = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_ids[0],
            "pad_token": self.pad_id,
        }
        tokens = {
            name: self.backend.id_to_token(i)
            for name, i in ids.items()
            if i is not None
        }
        unknown = getattr(self.backend.model, "unk_token", None)
        return tokens | ({"unk_token": unknown} if unknown else {})

    @functools.cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """The special token that the chat template puts behind an answer, if any."""
        behind = self._scaffolds[-1][-1] if self._scaffolds else ""
        ends = [token for token in self._registered if token in behind]
        ends.sort(key=lambda token: (behind.index(token), -len(token)))
        return tuple(self._registered[token] for token in ends[:1])

    def _anchor(self, before: str, chat: bool) -> tuple[str, int]:
        """What to put before a text that continues another, and its token count."""
        if not before:
            return "", 0
        if chat and before.endswith(tuple(self._registered)):
            # Behind a special token, some tokenizers begin as at the start of a text.
            return next(t for t in self._registered if before.endswith(t)), 1
        return self._byte_anchor

    @functools.cached_property
    def _registered(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special}

    @functools.cached_property
    def _chat_backend(self) -> tokenizers.Tokenizer:
        # Its own, as to change the flag of the other one would not be thread-safe.
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    @functools.cached_property
    def _byte_anchor(self) -> tuple[str, int]:
        # Llama 2's and llama2.c's tokenizers begin every text with a space. "\0" takes
        # it, which is a byte there, and bytes do not merge with what follows.
        anchor = self.encode("\0")
        plain = self.encode("\0a")[len(anchor) :] == self.encode("a")
        return ("", 0) if plain else ("\0", len(anchor))

    def _as_text(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(content := message.get("content"), str):
            return message
        return {**message, "content": self.as_text(message.get("role", ""), content)}

    @functools.cached_property
    def _scaffolds(self) -> list[list[str]]:
        """What the chat template writes around messages; see `guard.scaffolds`."""
        return scaffolds(self.render_chats) if self.chat_template is not None else []

    @functools.cached_property
    def _guards(self) -> dict[tuple[str, bool], Guard]:
        return make_guards(self.backend, self.chat_template, self._scaffolds)

    @functools.cached_property
    def _special(self) -> Finder:
        return Finder(self._registered, self.backend.normalizer, lambda _: 1)


def load_tokenizer(
    path: str | os.PathLike[str], vocab_size: int | None = None
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: A GGUF file, a llama2.c tokenizer file, Hugging Face's tokenizer.json, or a
        directory with one. Beside a tokenizer.json, tokenizer_config.json,
        special_tokens_map.json, generation_config.json and chat_template.jinja are
        read, where they exist.
      vocab_size: The model's. llama2.c's tokenizers must have as many tokens, the
        others no id outside of it.

    Raises:
      OSError: The file cannot be read.
      ValueError: A file is damaged or no tokenizer, names a token that the tokenizer
        lacks, or does not fit `vocab_size`; or no end token is named.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if is_gguf(path):
        return Tokenizer(**read_gguf_tokenizer(path, vocab_size))
    if path.suffix == ".json" or path.read_bytes().lstrip().startswith(b"{"):
        return Tokenizer(**read_huggingface_tokenizer(path, vocab_size))
    backend = load_llama2c_tokenizer(path, vocab_size)
    unknown, start, end = range(3)
    # Text has no unknown tokens: what has no token of its own becomes bytes.
    return Tokenizer(backend, bos_id=start, eos_ids=(end,), pad_id=unknown)


def save_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `load_tokenizer` reads them.

    `transformers.AutoTokenizer` gives the same ids, and puts the bos token in front.
    Where there are several end tokens and no generation_config.json, that is written
    too, for it is what names them.

    Args:
      tokenizer: What to save.
      directory: An existing directory.

    Raises:
      OSError: A file cannot be written.
    """
    directory = Path(directory)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= tokenizer._special_tokens()
    config["clean_up_tokenization_spaces"] = False
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_json(directory / "tokenizer_config.json", config)
    generation = directory / "generation_config.json"
    if len(tokenizer.eos_ids) > 1 and not generation.exists():
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids}
        write_json(generation, ids)
    text = tokenizer.backend.to_str(pretty=True)
    write_bytes(directory / "tokenizer.json", text.encode())


def tokenizer_path(tokenizer: Path | None, model: Path) -> Path:
    """Where the tokenizer is: the one given, or the model's own.

    Raises:
      OSError: The model is not there.
      ValueError: It is a file of llama2.c, which has none.
    """
    if tokenizer is not None:
        return tokenizer
    model.stat()  # the error names the file
    if not model.is_dir() and not is_gguf(model):
        raise ValueError(
            f"tokenizer must be given, {model} is neither a directory nor GGUF"
        )
    return model
