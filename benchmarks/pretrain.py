"""Pretrain a Llama where no checkpoint can be downloaded, for benchmarks.forgetting.

python -m benchmarks.pretrain --output DIR

Trains a tokenizer and a Llama of about 120M parameters on the Python sources of the
standard library and the installed packages, but for some, whose text is the retained
one: on it is measured what fine-tuning makes the model forget. Leaves the model in
DIR/run/model and that text in DIR/retained.txt. After a kill the same command resumes.
"""

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
import tyro
from flax import nnx

from benchmarks.outputs import load
from examples import terminal
from examples.files import write_bytes, write_json, write_json_lines
from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.llama import Llama
from examples.llama.model.parameters import DTypeName
from examples.llama.text.tokenizer import Tokenizer, save_tokenizer
from examples.llama.training.config import Config
from examples.llama.training.loop import train

SPECIAL = ("<s>", "</s>", "<pad>")
# So that nearly every piece of source fills a row; what is too long is cut off.
CHARACTERS_PER_TOKEN = 4
RETAINED = 0.05  # of the packages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path
    """Directory for the model and all that it is made from."""
    sources: tuple[Path, ...] = tuple(
        Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")
    )
    """Directories of packages; by default those of this Python."""
    megabytes: float = 200.0
    """Text to take at most. A twentieth of it trains the tokenizer."""
    retained_kilobytes: float = 300.0
    """Retained text to take at most."""
    vocab_size: int = 16384
    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    steps: int = 4000
    batch_size: int = 64
    max_length: int = 512
    """Tokens per row; the model takes twice as many."""
    learning_rate: float = 6e-4
    dtype: DTypeName = "bfloat16"
    """Precision of the computation."""


def pretrain(args: Args) -> dict[str, float]:
    """Prepares what is not there yet, and trains or resumes.

    Returns:
      The measures on the retained text before and after; see `train`.

    Raises:
      ValueError, OSError: See `train`; or there is too little text, or
        `args.output` was prepared with other settings.
    """
    prepared = args.output / "prepared.json"
    settings = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    if load(prepared, settings) is None:
        prepare(args)
        write_json(prepared, settings)
    return train(
        Config(
            model=args.output / "start",
            data=(str(args.output / "sources.jsonl"),),
            retain_data=args.output / "retained.txt",
            output=args.output / "run",
            method="adamw",
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 20,
            clip_norm=1.0,
            weight_decay=0.1,
            steps=args.steps,
            batch_size=args.batch_size,
            max_length=args.max_length,
            dtype=args.dtype,
            # A distance from random weights says nothing.
            reference=False,
            samples=0,
            eval_every=max(1, args.steps // 4),
            save_every=max(1, args.steps // 4),
            keep=1,
        )
    )


def prepare(args: Args) -> None:
    """Writes texts, tokenizer and a model that has learned nothing."""
    args.output.mkdir(parents=True, exist_ok=True)
    known: list[str] = []
    retained: list[str] = []
    length = CHARACTERS_PER_TOKEN * args.max_length
    wanted = args.megabytes * 1e6
    for package, text in sources(args.sources):
        # These come first, as packages are in the order of their shares.
        if _share(package) < RETAINED:
            retained += pieces_of(text, length)
            continue
        known.append(text)
        wanted -= len(text)
        if wanted < 0:
            break
    # Some of every package, not all of the first.
    kept = "".join(sorted(retained, key=_share))[: int(1e3 * args.retained_kilobytes)]
    if not known or not kept:
        raise ValueError(
            f"sources: {len(known)} files to learn and {len(retained)} pieces retained "
            f"in {', '.join(map(str, args.sources))}; expected packages of both"
        )
    write_bytes(args.output / "retained.txt", kept.encode())
    pieces = ({"text": piece} for text in known for piece in pieces_of(text, length))
    write_json_lines(args.output / "sources.jsonl", pieces)
    tokenizer = train_tokenizer(known[::20] or known, args.vocab_size)
    model = Llama(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=2 * args.max_length,
        ),
        rngs=nnx.Rngs(0),
    )
    save_hugging_face(model, args.output / "start")
    save_tokenizer(tokenizer, args.output / "start")


def sources(roots: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Package and text of every Python file, packages in an order without a meaning.

    Each text comes once, as packages bring copies of each other's files.
    """
    packages = [entry for root in roots if root.is_dir() for entry in root.iterdir()]
    seen = set()
    for package in sorted(packages, key=lambda path: _share(path.stem)):
        if package.name == "site-packages":  # it lies in the standard library's
            continue
        files = [package] if package.suffix == ".py" else sorted(package.rglob("*.py"))
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                yield package.stem, text


def _share(name: str) -> float:
    """A number in [0, 1) that is always the same for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def pieces_of(text: str, characters: int) -> Iterator[str]:
    """The text in pieces of whole lines, none longer than asked but for long lines."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > characters:
            yield piece
            piece = ""
        piece += line
    yield piece


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE, so that any text has tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    start, end, pad = range(3)
    return Tokenizer(backend, bos_id=start, eos_ids=(end,), pad_id=pad)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; it ends as that of examples.llama.train does."""
    program = "python -m benchmarks.pretrain"
    args = tyro.cli(Args, prog=program, args=argv, description=__doc__)
    with terminal.errors_on_one_line("pretrain"):
        pretrain(args)


if __name__ == "__main__":
    main()
