"""Generation against step-by-step recomputation, the known text, the command line."""

import dataclasses
import functools
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.generate import main
from examples.llama.model.architectures import LlamaConfig
from examples.llama.model.generation import decode, generate, prefill
from examples.llama.model.llama import Llama
from examples.llama.model.sharding import make_mesh, parameter_sharding
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer

KNOWN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside "
    "in the park. One day, she saw a big, red ball. She wanted to play with it, but it "
    "was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and "
    "didn't know what to do. She said, \"I want to play with your ball, but I can't "
    'find it."'
)
CONFIG = LlamaConfig(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=24,
)
PROMPTS = np.array([[1, 5, 7], [1, 2, 9], [3, 3, 3], [1, 11, 4]], np.int32)


def make(config):
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    draw = functools.partial(np.random.default_rng(0).normal, scale=0.4)
    state = jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), state)
    return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def model():
    return make(CONFIG)


@pytest.fixture(scope="module")
def continued(model):
    """Continues 4 prompts, each token by a forward pass over all the tokens so far."""
    forward = nnx.jit(lambda model, tokens: model(tokens))

    def compute(prompts, count):
        tokens = np.zeros((4, 24), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        ends = np.array([len(prompt) for prompt in prompts])
        for step in range(count):
            last = np.asarray(forward(model, tokens))[range(4), ends + step - 1]
            tokens[range(4), ends + step] = np.argmax(last, axis=-1)
        return np.stack([tokens[i, end : end + count] for i, end in enumerate(ends)])

    return compute


@pytest.fixture(scope="module")
def greedy(continued):
    """21 tokens after PROMPTS."""
    new = continued(PROMPTS, 21)
    assert len(np.unique(new)) > 5
    return new


def test_greedy(model, greedy):
    one = generate(model, PROMPTS, max_new_tokens=1)
    np.testing.assert_array_equal(one, greedy[:, :1])
    # All of the context can be used, to its last place.
    new = generate(model, PROMPTS, max_new_tokens=21)
    assert new.dtype == jnp.int32
    np.testing.assert_array_equal(new, greedy)


def test_stops(model, greedy):
    occurring = sorted(set(greedy.ravel().tolist()))
    unused = next(token for token in range(13) if token not in occurring)
    first, later = int(greedy[0, 0]), int(greedy[0, 4])
    for stops in (first, later, (later, unused), occurring, unused):
        expected = greedy.copy()
        for row in expected:
            ends = np.flatnonzero(np.isin(row, stops))
            if ends.size:
                row[ends[0] :] = row[ends[0]]
        new = generate(model, PROMPTS, max_new_tokens=21, eos_id=stops)
        np.testing.assert_array_equal(new, expected)


def test_padding(model, continued):
    lengths = [1, 6, 3, 4]
    # Padding beyond the context, of tokens that would matter if they were read.
    tokens = np.random.default_rng(0).integers(0, 13, (4, 30))
    mask = np.arange(30) >= 30 - np.array(lengths)[:, None]
    expected = continued([row[-n:] for row, n in zip(tokens, lengths, strict=True)], 18)
    assert len(np.unique(expected, axis=0)) == 4
    new = generate(model, tokens, max_new_tokens=18, mask=mask, eos_id=-1)
    np.testing.assert_array_equal(new, expected)
    # A row that ends does not end the others.
    stop = int(expected[1, 2])
    for row in expected:
        ends = np.flatnonzero(row == stop)
        if ends.size:
            row[ends[0] :] = stop
    assert not np.all(expected[:, -1] == stop)
    new = generate(model, tokens, max_new_tokens=18, mask=mask, eos_id=stop)
    np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_model_that_is_being_trained(greedy, remat):
    model = make(CONFIG)
    model.remat = remat
    new = generate(model, PROMPTS, max_new_tokens=21)
    np.testing.assert_array_equal(new, greedy)


def test_a_few_tokens_at_a_time(model):
    options = {"temperature": 1.0, "key": jax.random.key(5), "eos_id": 12}
    expected = np.asarray(generate(model, PROMPTS, max_new_tokens=21, **options))
    decoding, parts = prefill(model, PROMPTS, max_new_tokens=21), []
    for _ in range(3):
        new, decoding = decode(model, decoding, max_new_tokens=7, **options)
        parts.append(new)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


def test_rows_that_the_caller_ends(model, greedy):
    first, decoding = decode(
        model, prefill(model, PROMPTS, max_new_tokens=21), max_new_tokens=3
    )
    decoding = decoding._replace(ended=np.array([False, True, True, False]))
    rest, decoding = decode(model, decoding, max_new_tokens=8)
    np.testing.assert_array_equal(rest[0], greedy[0, 3:11])
    np.testing.assert_array_equal(rest[3], greedy[3, 3:11])
    for row in (1, 2):
        assert set(np.asarray(rest[row]).tolist()) == {int(first[row, -1])}
    decoding = decoding._replace(ended=np.ones(4, bool))
    last, _ = decode(model, decoding, max_new_tokens=3)
    np.testing.assert_array_equal(last, np.tile(rest[:, -1:], (1, 3)))


def test_sharded(model, greedy, tmp_path):
    save_hugging_face(model, tmp_path / "model")
    mesh = make_mesh("fsdp=4,tensor=2")
    sharded = load_model(tmp_path / "model", sharding=parameter_sharding(mesh))
    kernel = sharded.layers[0].mlp.up_proj.kernel[...]
    assert len(kernel.sharding.device_set) == 8 and not kernel.is_fully_replicated
    mask = np.arange(5) >= 2
    tokens = np.pad(PROMPTS, ((0, 0), (2, 0)))
    with jax.set_mesh(mesh):
        new = generate(sharded, tokens, max_new_tokens=21, mask=np.tile(mask, (4, 1)))
    np.testing.assert_array_equal(new, greedy)


def test_sampling(model):
    sample = functools.partial(generate, model, PROMPTS, max_new_tokens=21)
    first = sample(temperature=1.0, key=jax.random.key(0))
    again = sample(temperature=1.0, key=jax.random.key(0))
    other = sample(temperature=1.0, key=jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.3
    assert not np.array_equal(first[0], first[1])
    cold = sample(temperature=1e-4, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, sample())
    # Each step draws anew: where all tokens are as likely, few are repeated.
    hot = np.asarray(sample(temperature=1e6, key=jax.random.key(0)))
    assert all(len(set(row)) > 6 for row in hot.tolist())


def test_samples_follow_the_distribution(model):
    prompts = np.tile(PROMPTS[:1], (4000, 1))
    logits = nnx.jit(lambda model: model(PROMPTS[:1])[0, -1])(model)
    for temperature in (0.5, 2.0):
        arguments = {"temperature": temperature, "key": jax.random.key(3)}
        new = generate(model, prompts, max_new_tokens=1, **arguments)
        found = np.bincount(np.asarray(new)[:, 0], minlength=13) / 4000
        expected = np.asarray(jax.nn.softmax(logits / temperature))
        # Four standard deviations of a frequency near 1/2, and more elsewhere.
        np.testing.assert_allclose(found, expected, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (
            [[1, 2]],
            {"mask": [[1, 1]]},
            "mask must be bool [1, 2], got int64 [1, 2]",
        ),
        (
            [[1, 2]],
            {"mask": [[True]]},
            "mask must be bool [1, 2], got bool [1, 1]",
        ),
        (
            [[1, 2], [3, 4]],
            {"mask": [[True, True], [True, False]]},
            "mask must be False at padding on the left and True at one or more tokens "
            "after it, got [1, 0] in row 1",
        ),
        (
            [[1, 2]],
            {"mask": [[False, False]]},
            "mask must be False at padding on the left and True at one or more tokens "
            "after it, got [0, 0] in row 0",
        ),
        (
            [[1, 2, 3, 4]],
            {"mask": [[False, True, False, True]]},
            "mask must be False at padding on the left and True at one or more tokens "
            "after it, got [0, 1, 0, 1] in row 0",
        ),
        (
            [[0, 1, 2, 3]],
            {"mask": [[False, True, True, True]], "max_new_tokens": 22},
            "max_new_tokens 22 and a prompt of 3 tokens exceed the model's "
            "max_position_embeddings, 24",
        ),
        ([1, 2], {}, "tokens must be integers [B, T], not empty, got int64 [2]"),
        ([[]], {}, "tokens must be integers [B, T], not empty, got float64 [1, 0]"),
        ([[0.5]], {}, "tokens must be integers [B, T], not empty, got float64 [1, 1]"),
        ([[1, 13]], {}, "tokens must be 0 to 12, got 1 to 13"),
        ([[-1, 2]], {}, "tokens must be 0 to 12, got -1 to 2"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be 1 or above, got 0"),
        (
            [[1, 2]],
            {"max_new_tokens": 23},
            "max_new_tokens 23 and a prompt of 2 tokens exceed the model's "
            "max_position_embeddings, 24",
        ),
        ([[1]], {"temperature": -0.5}, "temperature must be 0 or above, got -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0 or above"),
        ([[1]], {"temperature": 1.0}, "temperature 1.0 needs a key"),
    ],
)
def test_bad_arguments(model, tokens, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(model, tokens, **{"max_new_tokens": 4} | changes)


def test_bad_arguments_of_the_parts(model):
    with pytest.raises(ValueError, match=r"tokens must be 0 to 12, got 1 to 13"):
        prefill(model, [[1, 13]], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"max_new_tokens must be 1 or above, got 0"):
        prefill(model, [[1]], max_new_tokens=0)
    decoding = prefill(model, [[1]], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"max_new_tokens must be 1 or above, got 0"):
        decode(model, decoding, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"temperature 1.0 needs a key"):
        decode(model, decoding, max_new_tokens=1, temperature=1.0)


def test_bfloat16(data_dir, stories_tokenizer):
    model = load_model(data_dir / "stories260K.bin", dtype=jnp.bfloat16)
    new = generate(model, [[1]], max_new_tokens=20)
    assert KNOWN.startswith(stories_tokenizer.decode(new[0].tolist()))


# The command line


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options for a small random model and a tokenizer of bytes and few letters."""
    folder = tmp_path_factory.mktemp("small")
    model = make(dataclasses.replace(CONFIG, vocab_size=264))
    save_hugging_face(model, folder / "model")
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
    with (folder / "tok.bin").open("wb") as file:
        file.write(struct.pack("<i", 6))
        for i, piece in enumerate([*pieces, *" abcd"]):
            file.write(struct.pack("<fi", -float(i), len(piece)) + piece.encode())
    return ["--model", str(folder / "model"), "--tokenizer", str(folder / "tok.bin")]


def test_command(data_dir):
    root = Path(__file__).parents[3]
    data = data_dir.relative_to(root.parent)
    command = f"""-m examples.llama.generate --model ../{data}/stories260K.bin
        --tokenizer ../{data}/tok512.bin --temperature 0 --max-new-tokens 80"""
    result = subprocess.run(
        [sys.executable, "-W", "error", *command.split()],
        cwd=root, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    text = result.stdout.removesuffix("\n")
    assert KNOWN.startswith(text) and text.endswith("Lily, let's go to")
    assert result.stderr == ""


def test_known_text_to_the_end_of_its_story(data_dir, capsys):
    model, tokenizer = str(data_dir / "stories260K.bin"), str(data_dir / "tok512.bin")
    main(["--model", model, "--tokenizer", tokenizer, "--max-new-tokens", "500"])
    text = capsys.readouterr().out
    assert text.startswith(KNOWN) and text.count("Once upon a time") == 1


def test_command_with_the_tokenizer_of_the_model(small, tmp_path, capsys):
    options = ["--prompt", "abba", "--max-new-tokens", "8"]
    main([*small, *options])
    expected = capsys.readouterr().out
    model = load_model(small[1])
    save_hugging_face(model, tmp_path / "both")
    save_tokenizer(load_tokenizer(small[3]), tmp_path / "both")
    main(["--model", str(tmp_path / "both"), *options])
    assert capsys.readouterr().out == expected


def test_command_prompt(small, capsys):
    options = ["--prompt", " <s>🙂 ab", "--max-new-tokens", "8", "--temperature", "1"]
    texts = []
    for seed in ("3", "3", "4"):
        main([*small, *options, "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(" <s>🙂 ab") for text in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "24"], "max_new_tokens 24 and a prompt of 1 tokens exc"),
        (["--max-new-tokens", "0"], "max_new_tokens must be 1 or above, got 0"),
        (["--temperature", "-1"], "temperature must be 0 or above, got -1.0"),
        (["--seed", "-1"], "seed must be 0 to 4294967295, got -1"),
        (["--prompt", "a\udcff"], "prompt: 'utf-8' codec can't encode character"),
        (["--model", "absent.bin"], "No such file or directory: 'absent.bin'"),
        (["--tokenizer", "absent.bin"], "No such file or directory: 'absent.bin'"),
        (["--model", "."], ".: expected model.safetensors"),
        (["--tokenizer", "."], "tokenizer.json"),
    ],
)
def test_command_errors(small, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([*small, "--max-new-tokens", "8", *options])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("generate: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize(
    "options", [["--temperature", "hot"], ["--colour", "red"], ["--model"]]
)
def test_command_line_errors(small, options, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*small, *options])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and options[0] in err


def test_command_without_a_tokenizer(tmp_path, capsys):
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["--model", str(path)])
    expected = f"tokenizer must be given, {path} is neither a directory nor GGUF"
    assert capsys.readouterr().err == f"generate: {expected}\n"


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_weights_that_are_not_finite(small, tmp_path, capsys, odd):
    model = load_model(small[1])
    kernel = model.layers[0].mlp.up_proj.kernel
    kernel[...] = kernel[...].at[1, 2].set(odd)
    save_hugging_face(model, tmp_path / "odd")
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path / "odd"), *small[2:]])
    expected = (
        f"generate: {tmp_path / 'odd'}: 1 entries of layers/0/mlp/up_proj/kernel are "
        "not finite in float32"
    )
    assert capsys.readouterr().err.startswith(expected)
