"""The Modelfile by which Ollama runs a GGUF file."""

from examples.llama.text.tokenizer import Tokenizer

# ChatML in the language of Go's templates.
_TEMPLATE = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n"
)


def modelfile(tokenizer: Tokenizer, file: str) -> str:
    """The content of a Modelfile.

    Its template is ChatML, or left out: Ollama then reads the one in the GGUF file. The
    system message that a template writes by itself becomes SYSTEM.

    Args:
      tokenizer: The model's, whose end tokens stop an answer.
      file: The name of the GGUF file beside it.
    """
    lines = [f"FROM ./{file}"]
    if (system := _chatml_system(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{_TEMPLATE}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    for i in tokenizer.eos_ids:
        token = tokenizer.backend.id_to_token(i)
        if token and token.isprintable() and '"' not in token:
            lines.append(f'PARAMETER stop "{token}"')
    return "\n".join(lines) + "\n"


def _chatml(*messages: tuple[str, str]) -> str:
    parts = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages]
    return "".join(parts) + "<|im_start|>assistant\n"


def _chatml_system(tokenizer: Tokenizer) -> str | None:
    """The system message of a template without one, if the template is ChatML.

    What the template makes of two conversations tells. An empty text stands for no
    message.
    """

    def written(*messages: tuple[str, str]) -> str:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages],
            add_generation_prompt=True,
        )

    user = ("user", " one\n")
    whole = (("system", "two "), user, ("assistant", " three"), ("user", "four"))
    try:
        if written(*whole) != _chatml(*whole):
            return None
        alone = written(user)
    except ValueError:  # no template, or one that refuses these
        return None
    if alone == _chatml(user):
        return ""
    start, end = _chatml(("system", "\0"), user).split("\0")
    system = alone.removeprefix(start).removesuffix(end)
    quoted = '"""' in system or system.endswith('"')
    return None if quoted or alone != _chatml(("system", system), user) else system
