"""Read a tokenizer as Hugging Face's checkpoints have it."""

import json
from pathlib import Path
from typing import Any

import tokenizers


def read_huggingface_tokenizer(path: Path, vocab_size: int | None) -> dict[str, Any]:
    """Reads a tokenizer.json and the files beside it.

    Returns:
      The arguments of `examples.llama.text.tokenizer.Tokenizer`.

    Raises:
      OSError, ValueError: See `examples.llama.text.tokenizer.load_tokenizer`.
    """
    data = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except BaseException as error:
        # The library has no class of its own, but it panics where it lacks a check.
        panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not panic:
            raise
        raise ValueError(f"{path}: {error}; expected a tokenizer.json") from None
    largest = max(backend.get_vocab().values(), default=-1)
    if largest < 0:
        raise ValueError(f"{path}: no tokens, expected a vocabulary")
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{path}: token {backend.id_to_token(largest)!r} has id {largest}, "
            f"expected ids below the model's vocab_size, {vocab_size}"
        )

    files = {
        name: _read_object(path.with_name(name))
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    }
    ids: dict[str, int] = {}
    for file, values in files.items():  # the first one that names a token counts
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            i = _token_id(path.with_name(file), name, values.get(name), backend)
            if i is not None:
                ids.setdefault(name, i)
    # Some are in the vocabulary alone, where text could name them.
    registered = backend.get_added_tokens_decoder()
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(backend.id_to_token(i), normalized=False)
            for i in ids.values()
            if i not in registered or not registered[i].special
        ]
    )
    generation = path.with_name("generation_config.json")
    eos_ids = [ids["eos_token"]] if "eos_token" in ids else []
    eos_ids += _eos_ids(generation, _read_object(generation), backend)
    if not eos_ids:
        raise ValueError(
            f"{path.parent}: no end token; expected eos_token in tokenizer_config.json "
            "or special_tokens_map.json, or eos_token_id in generation_config.json"
        )
    template, template_file = _chat_template(path, files["tokenizer_config.json"])
    return {
        "backend": backend,
        "bos_id": ids.get("bos_token"),
        "eos_ids": tuple(dict.fromkeys(eos_ids)),
        "pad_id": ids.get("pad_token", ids.get("unk_token", eos_ids[0])),
        "chat_template": template,
        "template_file": str(template_file),
    }


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; expected JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {type(value).__name__}, expected a JSON object")
    return value


def _token_id(
    path: Path, name: str, value: Any, backend: tokenizers.Tokenizer
) -> int | None:
    """The id of a special token: a text, an object with further settings, or null."""
    if value is None:
        return None
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise ValueError(
            f'{path}: {name} is {value!r}, expected a text or an object with "content"'
        )
    if (i := backend.token_to_id(content)) is None:
        raise ValueError(
            f"{path}: {name} is {content!r}, expected a token of tokenizer.json"
        )
    return i


def _eos_ids(
    path: Path, config: dict[str, Any], backend: tokenizers.Tokenizer
) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < 1 << 32 or backend.id_to_token(i) is None:
            raise ValueError(
                f"{path}: eos_token_id is {value!r}, expected ids of the tokenizer"
            )
    return ids


def _chat_template(path: Path, config: dict[str, Any]) -> tuple[str | None, Path]:
    """The chat template, if there is one, and the file that it is from."""
    file = path.with_name("chat_template.jinja")
    if file.exists():
        try:
            return file.read_bytes().decode(), file
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {error}; expected UTF-8") from None
    file = path.with_name("tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, of which one is the default
        named = [entry for entry in template if isinstance(entry, dict)]
        default = [e.get("template") for e in named if e.get("name") == "default"]
        template = default[0] if default else None
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{file}: chat_template is {type(template).__name__}, expected a text or a "
            "list of named ones"
        )
    return template, file
