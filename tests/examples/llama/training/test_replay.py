"""What is seen again: files, texts of the pretrained model, and their targets."""

import json

import chex
import jax
import numpy as np
import pytest

from examples.llama.checkpoints.loading import load_model
from examples.llama.text.dataset import FIELDS
from examples.llama.text.tokenizer import load_tokenizer
from examples.llama.training import own_texts
from examples.llama.training.checks import check
from examples.llama.training.own_texts import save_texts, write_texts
from examples.llama.training.replay import add_self_replay, load_data
from examples.llama.training.streams import Streams
from tests.examples.llama.runs import config_of


@pytest.fixture(scope="module")
def tokenizer(files):
    return load_tokenizer(files["model"])


@pytest.fixture(scope="module")
def model(files):
    return load_model(files["model"])


def quiet(_):
    pass


@pytest.fixture(scope="module")
def both(files, tokenizer, model, tmp_path_factory):
    """Replay of a file and of the model's own texts, and GEM, with a KL penalty."""
    output = tmp_path_factory.mktemp("both")
    config = config_of(
        files,
        output,
        data=(f"{files['data'][0]}:2",),
        replay=("self:0.5", f"{files['eval_data']}:0.25"),
        self_replay_rows=40,
        gem=(files["eval_data"],),
        regularize=("kl:0.25",),
    )
    datasets = load_data(config, tokenizer, quiet)
    assert len(datasets.training) == 2  # the model has written nothing yet
    return config, add_self_replay(datasets, config, model, tokenizer, progress=False)


def test_what_is_said_of_the_records(files, tokenizer, tmp_path):
    path, said = tmp_path / "some.jsonl", []
    lines = ["1", "2\n<|assistant|>\n3", "</s>"]
    pairs = [{"question": line, "answer": "a"} for line in lines]
    path.write_text("\n".join(map(json.dumps, pairs)))
    config = config_of(files, tmp_path / "run", data=(str(path),), max_length=64)
    datasets = load_data(config, tokenizer, said.append)
    assert datasets.training[0].outcome.escaped == 2
    assert said[1] == (
        "  2 records have text that reads like a turn or a special token; it stays text"
    )
    assert said[2].startswith(files["eval_data"]) and len(said) == 3


def test_what_is_told_of_records(files, tmp_path, tokenizer):
    path = tmp_path / "some.jsonl"
    good, empty = '{"question": "1", "answer": "a"}', '{"query": "1", "response": ""}'
    twice = '{"prompt": "1", "answer": "a", "answer": "b"}'
    path.write_text("\n".join([good, empty, twice, *[good, empty] * 3]))
    config = config_of(files, None, data=(str(path),), skip_bad_records=True)
    said = []
    datasets = load_data(config, tokenizer, said.append)
    assert len(datasets.training[0]) == 4
    assert said[0] == (
        f"{path}: 4 rows of up to 48 tokens; 0 records truncated, 4 dropped, as "
        "truncation left no answer tokens, 1 malformed ones skipped; 4 have an empty "
        "answer, which is not learned"
    )
    assert said[1].startswith(f'  {path}, line 3: "answer" is there more than once; ')
    assert said[2:5] == [f"  {path}:{i}: the answer is empty" for i in (2, 5, 7)]
    assert said[5].startswith(f"{files['eval_data']}: ")


def test_texts(model, tokenizer):
    texts = write_texts(model, tokenizer, 40, 24, seed=3)
    ends = {tokenizer.bos_id, *tokenizer.eos_ids}
    assert len(texts) == 40 and len(set(map(tuple, texts))) > 30
    for text in texts:
        assert text[0] == tokenizer.bos_id and 2 <= len(text) <= 24
        assert not ends & set(text[1:-1])
    assert write_texts(model, tokenizer, 3, 24, seed=3) == texts[:3]
    assert write_texts(model, tokenizer, 3, 24, seed=4) != texts[:3]


def test_texts_are_drawn_from_the_model(model, tokenizer):
    """The first tokens come as often as the model says, within what chance allows."""
    texts = write_texts(model, tokenizer, 512, 2, seed=0)
    logits = jax.jit(lambda x: model(x))(np.array([[tokenizer.bos_id]]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits))
    counts = np.bincount([text[1] for text in texts], minlength=len(expected))
    deviation = np.sqrt(512 * expected * (1 - expected))
    assert np.mean(np.abs(counts - 512 * expected) < 3 * deviation + 1) > 0.98


def test_weights_and_rows(both):
    config, datasets = both
    assert datasets.weights == [2, 0.5, 1.0] and datasets.learned == 1
    assert [len(x) for x in datasets.training] == [22, 7, 40]
    assert datasets.soft_from == 29
    assert datasets.names[-1] == "self_replay.jsonl"
    streams, counts = Streams(datasets, config), np.zeros(3)
    for _ in range(100):
        rows = next(streams).rows
        counts += np.histogram(rows, bins=[0, 22, 29, 69])[0]
    np.testing.assert_allclose(counts / counts.sum(), [4 / 7, 1 / 7, 2 / 7], atol=0.02)


def test_targets(both):
    """The model's texts count by divergence alone, all else by both."""
    config, datasets = both
    streams, seen = Streams(datasets, config), set()
    for _ in range(10):
        batch, memories, rows = next(streams)
        assert len(memories) == 1 and memories[0].keys() == set(FIELDS)
        for i, row in enumerate(rows):
            (d,) = [d for d, end in enumerate((22, 29, 69)) if row < end][:1]
            original = datasets.training[d].take([row - (0, 22, 29)[d]])["loss_mask"][0]
            soft = d == 2
            seen.add(soft)
            np.testing.assert_array_equal(batch["loss_mask"][i], original & (not soft))
            expected = original * np.float32(1.0 if soft else 0.25)
            np.testing.assert_array_equal(batch["kl_weight"][i], expected)
            assert batch["kl_weight"].dtype == np.float32
    assert seen == {False, True}


def test_positions_of_all_streams(both):
    config, datasets = both
    first, again = Streams(datasets, config), Streams(datasets, config)
    for _ in range(5):
        next(first)
    again.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(3):
        a, b = next(first), next(again)
        np.testing.assert_array_equal(a.rows, b.rows)
        for x, y in zip((a.batch, *a.memories), (b.batch, *b.memories), strict=True):
            for name in x:
                np.testing.assert_array_equal(x[name], y[name])


def test_kept_texts_are_read_again(both, model, tokenizer, monkeypatch):
    config, datasets = both
    save_texts(datasets.written, tokenizer, config.output)
    lines = (config.output / "self_replay.jsonl").read_text().splitlines()
    assert len(lines) == 40 and json.loads(lines[0]).keys() == {"text", "tokens"}
    monkeypatch.setattr(own_texts, "generate", None)  # not to be called
    again = add_self_replay(
        load_data(config, tokenizer, quiet), config, model, tokenizer, progress=False
    )
    chex.assert_trees_all_equal(again.training[-1].take(), datasets.training[-1].take())
    (config.output / "self_replay.jsonl").write_text('{"tokens": [1, 2]}\n{"text": ""}')
    with pytest.raises(ValueError, match=r"self_replay.jsonl, line 2: no tokens"):
        add_self_replay(datasets, config, model, tokenizer, progress=False)


def test_plain_text_instead(files, tokenizer, model, tmp_path):
    config = config_of(
        files, tmp_path, replay=("self:1",), self_replay_rows=8, soft_targets=False
    )
    datasets = load_data(config, tokenizer, quiet)
    datasets = add_self_replay(datasets, config, model, tokenizer, progress=False)
    assert (
        datasets.soft_from is None
        and "kl_weight" not in next(Streams(datasets, config)).batch
    )


def test_own_texts_for_gem_and_ewc(files, tokenizer, model, tmp_path):
    config = config_of(
        files,
        tmp_path,
        gem=("self", files["eval_data"]),
        fisher_data="self",
        regularize=("ewc:1",),
        self_replay_rows=8,
    )
    check(config)
    datasets = load_data(config, tokenizer, quiet)
    datasets = add_self_replay(datasets, config, model, tokenizer, progress=False)
    assert [len(x) for x in datasets.memories] == [7, 8] and len(datasets.fisher) == 8
    assert len(datasets.training) == 1 and datasets.soft_from is None
    save_texts(datasets.written, tokenizer, tmp_path)
    assert len((tmp_path / "self_replay.jsonl").read_text().splitlines()) == 8


def test_more_texts_for_the_importance(files, tokenizer, model, tmp_path):
    """They come after those that are replayed, which stay as they were."""
    changes = {"replay": ("self:1",), "self_replay_rows": 8}
    counts, replayed = [], []
    for more in ({}, {"importance": "self", "importance_texts": 40}):
        config = config_of(files, tmp_path, **changes, **more)
        datasets = load_data(config, tokenizer, quiet)
        datasets = add_self_replay(datasets, config, model, tokenizer, progress=False)
        counts.append(len(datasets.written))
        replayed.append(datasets.training[-1].take()["tokens"])
        assert len(datasets.training[-1]) == 8
    assert counts == [8, 40]
    np.testing.assert_array_equal(*replayed)
    np.testing.assert_array_equal(datasets.written.take()["tokens"][:8], replayed[0])
    config = config_of(files, tmp_path, importance="self", importance_texts=3)
    datasets = load_data(config, tokenizer, quiet)
    datasets = add_self_replay(datasets, config, model, tokenizer, progress=False)
    assert len(datasets.written) == 3 and len(datasets.training) == 1


def test_too_few_kept_texts(both, files, tokenizer, model, tmp_path):
    _, datasets = both
    save_texts(datasets.written, tokenizer, tmp_path)
    config = config_of(files, tmp_path, importance="self", importance_texts=41)
    with pytest.raises(ValueError, match="expected 41 texts or more, found 40"):
        add_self_replay(datasets, config, model, tokenizer, progress=False)
