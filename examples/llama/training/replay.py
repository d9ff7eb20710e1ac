"""The data of a run: what to learn, and with it what to see again.

Among the latter is what the pretrained model writes by itself, so that nobody needs the
data that it was pretrained on.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from examples import terminal
from examples.files import write_json_lines
from examples.llama.model.generation import generate
from examples.llama.model.llama import Llama
from examples.llama.text.rows import Dataset, load_dataset, load_text, one_a_row
from examples.llama.text.templates import Example
from examples.llama.text.tokenizer import Tokenizer
from examples.llama.training.config import SELF, Config
from mofo_jax.continual import draw_texts

AT_ONCE = 32  # texts that the pretrained model writes side by side


class Datasets(NamedTuple):
    names: list[str]  # of what training draws from, and so the next two
    training: list[Dataset]
    weights: list[float]
    learned: int  # how many of those, the first ones, are to be learned, not replayed
    held_out: Dataset | None
    retained: Dataset | None
    memories: list[Dataset]  # of earlier tasks, for GEM
    fisher: Dataset | None
    written: Dataset | None = None  # by the pretrained model
    soft_from: int | None = None  # from this row on, targets are the pretrained model's


def load_data(
    config: Config, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Datasets:
    """All records and texts as tokens; says how many were cut, dropped or skipped.

    Without what the pretrained model writes; see `add_self_replay`.
    """

    def load(path: str, pack: bool = False) -> Dataset:
        found = load_dataset(
            path,
            tokenizer,
            config.max_length,
            pack=pack,
            template=config.template,
            skip_bad=config.skip_bad_records,
        )
        say(
            f"{path}: {len(found)} rows of up to {config.max_length} tokens; "
            f"{found.truncated} records cut, {found.dropped} dropped for no answer "
            f"token was left, {len(found.bad)} malformed ones skipped"
        )
        for reason in found.bad[:3]:
            say(f"  {reason}")
        return found

    names, weights = map(list, zip(*config.sources, strict=True))
    learned, total = len(names), sum(weights)
    for path, share in config.replayed:
        if path != SELF:
            names.append(path)
            weights.append(share * total)
    training = [load(path, config.pack) for path in names]
    memories = [load(path, config.pack) for path in config.gem if path != SELF]
    held_out = retained = fisher = None
    if config.eval_data is not None:
        held_out = load(config.eval_data)
    if config.retain_data is not None:
        retained = load_text(config.retain_data, tokenizer, config.max_length)
    if config.fisher_data not in (None, SELF):
        fisher = load(config.fisher_data)
    return Datasets(
        names, training, weights, learned, held_out, retained, memories, fisher
    )


def add_self_replay(
    datasets: Datasets,
    config: Config,
    model: Llama,
    tokenizer: Tokenizer,
    *,
    progress: bool,
) -> Datasets:
    """The same with what the pretrained model writes, where `config` asks for it.

    The texts of OUTPUT/self_replay.jsonl are taken where that exists.

    Raises:
      ValueError: There are several processes, or the tokenizer has no bos token; or the
        file is not what `save_self_replay` wrote.
    """
    if not config.needs_own_texts:
        return datasets
    path = config.output / "self_replay.jsonl"
    if path.exists():
        texts = _read(path)
    elif jax.process_count() > 1:
        raise ValueError(
            "what the model writes needs one process, or the self_replay.jsonl of a "
            f"run of one, in {config.output}"
        )
    else:
        texts = write_texts(
            model,
            tokenizer,
            config.self_replay_rows,
            config.max_length,
            seed=config.seed,
            progress=progress,
        )
    examples = [
        Example(
            np.array(tokens, np.int32),
            np.arange(len(tokens)) > 0,
            f"{path.name}:{line}",
        )
        for line, tokens in enumerate(texts, start=1)
    ]
    rows = one_a_row(examples, config.max_length, tokenizer.pad_id)
    datasets = datasets._replace(written=rows)
    if SELF in config.gem:
        datasets = datasets._replace(memories=[*datasets.memories, rows])
    if config.fisher_data == SELF:
        datasets = datasets._replace(fisher=rows)
    if (share := config.self_replay_share) is None:
        return datasets
    before = sum(map(len, datasets.training))
    total = sum(datasets.weights[: datasets.learned])
    return datasets._replace(
        names=[*datasets.names, path.name],
        training=[*datasets.training, rows],
        weights=[*datasets.weights, share * total],
        soft_from=before if config.soft_targets else None,
    )


def write_texts(
    model: Llama,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    *,
    seed: int,
    progress: bool = False,
) -> list[list[int]]:
    """Texts drawn from a model's own distribution, from the bos token on.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      count: How many.
      length: The most tokens of each, bos and end included.
      seed: Of the draws, on which alone they depend.
      progress: Whether to show a bar.

    Returns:
      The tokens of each, 2 or more.

    Raises:
      ValueError: The tokenizer has no bos token.
    """
    if tokenizer.bos_id is None:
        raise ValueError("what the model writes needs a tokenizer with a bos token")
    # A model of many texts may begin the next one with bos instead of an end.
    ends = [tokenizer.bos_id, *tokenizer.eos_ids]

    def sample(prompts: np.ndarray, key: jax.Array) -> jax.Array:
        return generate(
            model,
            prompts,
            max_new_tokens=length - 1,
            temperature=1.0,
            key=key,
            eos_id=ends,
        )

    style = terminal.bar_style()
    with tqdm(total=count, desc="writing", disable=not progress, **style) as bar:
        texts = draw_texts(
            sample,
            count,
            bos_id=tokenizer.bos_id,
            end_ids=ends,
            key=jax.random.key(seed),
            batch_size=AT_ONCE,
            progress=lambda done, _: bar.update(done - bar.n),
        )
        return list(texts)


def save_self_replay(datasets: Datasets, tokenizer: Tokenizer, output: Path) -> None:
    """Writes OUTPUT/self_replay.jsonl, of which a run that goes on takes its texts."""
    if (rows := datasets.written) is None:
        return
    lines = []
    for tokens, inside in zip(rows.tokens, rows.segment_ids, strict=True):
        ids = tokens[inside > 0].tolist()
        lines.append({"text": tokenizer.decode(ids), "tokens": ids})
    write_json_lines(output / "self_replay.jsonl", lines)


def _read(path: Path) -> list[list[int]]:
    texts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            tokens = json.loads(line)["tokens"]
            texts.append(np.array(tokens, np.int32).tolist())
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: no tokens of a text") from None
    return texts
