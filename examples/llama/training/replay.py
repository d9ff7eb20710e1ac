"""The data of a run: what to learn, and with it what to see again.

Among the latter is what the pretrained model writes by itself, so that nobody needs the
data that it was pretrained on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from examples.llama.model.llama import Llama
from examples.llama.text.dataset import Dataset
from examples.llama.text.rows import load_dataset, load_text
from examples.llama.text.tokenizer import Tokenizer
from examples.llama.training.config import SELF, Config
from examples.llama.training.own_texts import FILE, read_texts, text_rows, write_texts


class Datasets(NamedTuple):
    names: list[str]  # of what training draws from, and so the next two
    training: list[Dataset]
    weights: list[float]
    learned: int  # how many of those, the first ones, are to be learned, not replayed
    held_out: Dataset | None
    retained: Dataset | None
    memories: list[Dataset]  # of earlier tasks, for GEM
    fisher: Dataset | None
    written: Dataset | None = None  # by the pretrained model, for all that needs texts
    soft_from: int | None = None  # from this row on, targets are the pretrained model's


def load_data(
    config: Config,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
    *,
    progress: bool = False,
) -> Datasets:
    """All records and texts as tokens; says what became of the records.

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
            cache_dir=config.rows_directory,
            progress=progress,
        )
        truncated, dropped, escaped, bad, empty = found.outcome
        say(
            f"{path}: {len(found)} rows of up to {config.max_length} tokens; "
            f"{truncated} records truncated, {dropped} dropped, as truncation left no "
            f"answer tokens, {bad.number} malformed ones skipped; {empty.number} have "
            "an empty answer, which is not learned"
        )
        reasons = [f"{source}: the answer is empty" for source in empty.first[:3]]
        for reason in (*bad.first[:3], *reasons):
            say(f"  {reason}")
        if escaped:
            say(
                f"  {escaped} records have text that reads like a turn or a "
                "special token; it stays text"
            )
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
      ValueError: There are several processes, or the file is not what `save_texts`
        wrote; or see `own_texts.drawing`.
    """
    if not config.needs_own_texts:
        return datasets
    path, count = config.output / FILE, config.own_texts
    if path.exists():
        texts = read_texts(path, count)
    elif jax.process_count() > 1:
        raise ValueError(
            f"what the model writes needs one process, or the {FILE} of a run of one, "
            f"in {config.output}"
        )
    else:
        texts = write_texts(
            model,
            tokenizer,
            count,
            config.max_length,
            seed=config.seed,
            progress=progress,
        )

    def rows_of(texts: list[list[int]]) -> Dataset:
        return text_rows(texts, config.max_length, tokenizer.pad_id, FILE)

    datasets = datasets._replace(written=rows_of(texts))
    # The importance may need more texts than these do.
    rows = rows_of(texts[: config.self_replay_rows])
    if SELF in config.gem:
        datasets = datasets._replace(memories=[*datasets.memories, rows])
    if config.fisher_data == SELF:
        datasets = datasets._replace(fisher=rows)
    if (share := config.self_replay_share) is None:
        return datasets
    before = sum(map(len, datasets.training))
    total = sum(datasets.weights[: datasets.learned])
    return datasets._replace(
        names=[*datasets.names, FILE],
        training=[*datasets.training, rows],
        weights=[*datasets.weights, share * total],
        soft_from=before if config.soft_targets else None,
    )
