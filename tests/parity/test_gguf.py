"""GGUF files beside transformers' own reading of them: logits, tokens, answers."""

import json

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from examples.gguf_files import KINDS
from examples.llama.checkpoints.gguf_export import save_gguf
from examples.llama.checkpoints.loading import load_model
from examples.llama.checkpoints.smollm2 import smollm2_path
from examples.llama.model.generation import generate
from examples.llama.text.gguf_vocabulary import vocabulary_metadata
from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.llama.checkpoints.gguf_files import CONFIG, write_gguf
from tests.examples.llama.checkpoints.huggingface_files import random_tensors
from tests.examples.llama.text.tokenizer_files import (
    CHATML_TEMPLATE,
    TEXTS,
    write_llama2,
    write_llama3,
)
from tests.parity.conftest import VOCABULARY

MORE_TEXTS = [
    "Hello world! 123",
    "Café déjà vu, it's 3.14 or 2,000,000 — 東京 🙂",
    "def f(x):\n    return x ** 2\n\n\n\tprint(f(10))",
]


@nnx.jit
def run(model, tokens):
    return model(tokens)


def theirs(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.numpy()


def tokenizers_of(path):
    found = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return found, load_tokenizer(path)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(tmp_path, kind):
    path, config = tmp_path / "model.gguf", CONFIG | {"num_hidden_layers": 2}
    tensors = random_tensors(config=config)
    tensors = {name: x if x.ndim == 1 else x * 0.1 for name, x in tensors.items()}
    write_gguf(path, tensors, kind=kind, config=config)
    tokens = np.random.default_rng(0).integers(48, size=(2, 24), dtype=np.int32)
    expected = logits_of(theirs(path), tokens)
    assert np.abs(expected).max() > 1
    found = run(load_model(path), tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=["theirs", "F16", "Q8_0"])
def smollm2(request, tmp_path_factory):
    """The real model's file, or what we write of it."""
    try:
        path = smollm2_path()
    except ValueError as error:
        pytest.skip(str(error))
    if request.param == "theirs":
        return path
    ours = tmp_path_factory.mktemp("smollm2") / "model.gguf"
    save_gguf(load_model(path), load_tokenizer(path), ours, kind=request.param)
    return ours


def test_smollm2(smollm2):
    reference, model = theirs(smollm2), load_model(smollm2)
    their_tokenizer, tokenizer = tokenizers_of(smollm2)
    for text in TEXTS + MORE_TEXTS:
        assert tokenizer.encode_chat(text).ids == their_tokenizer(text).input_ids
    for question in ("What is the capital of France?", "Name three colours."):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        ids = their_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.encode_chat(text).ids == ids
        tokens = np.array([ids], np.int32)
        expected, found = logits_of(reference, tokens), run(model, tokens)
        difference = np.abs(found - expected).max()
        print(f"{smollm2.name}: {difference:.2e} of {np.abs(expected).max():.1f}")
        assert difference < 1e-3
        answer = reference.generate(
            torch.from_numpy(tokens).long(),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=tokenizer.eos_ids[0],
        )[0, len(ids) :].tolist()
        new = generate(model, tokens, max_new_tokens=32, eos_id=tokenizer.eos_ids[0])
        new = np.asarray(new)[0].tolist()
        assert new[: len(answer)] == answer
        assert len(answer) > 4


def sentencepiece(directory):
    """Llama 2's, with all merges that SentencePiece's scores imply."""
    path = write_llama2(directory)
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    merges = [
        (token[:i], token[i:])
        for token, number in sorted(vocabulary.items(), key=lambda pair: pair[1])
        if number > 258
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    content["model"]["merges"] = merges
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def gpt2(directory):
    path = write_llama3(directory, chat_template=CHATML_TEMPLATE)
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = False
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]
    content["pre_tokenizer"]["use_regex"] = True
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("write", [sentencepiece, write_llama3, gpt2])
def test_written_tokenizers(tmp_path, write):
    """What we write, as transformers reads it."""
    (tmp_path / "source").mkdir()
    ours = load_tokenizer(write(tmp_path / "source"))
    size = ours.backend.get_vocab_size()
    path = tmp_path / "model.gguf"
    metadata = {"tokenizer.ggml.merges": None} | vocabulary_metadata(ours, size)
    write_gguf(path, config=CONFIG | {"vocab_size": size}, **metadata)
    found, again = tokenizers_of(path)
    for text in TEXTS + MORE_TEXTS:
        ids = [ours.bos_id, *ours.encode_chat(text).ids]
        assert [again.bos_id, *again.encode_chat(text).ids] == ids
        if write is sentencepiece and ours.find_special_token(text):
            continue  # behind one, llama.cpp and Llama 2 begin with a space again
        assert found(text, add_special_tokens=False).input_ids == ids[1:]
    assert found.eos_token_id == ours.eos_ids[0]
    assert found.bos_token_id == ours.bos_id
    assert found.chat_template == ours.chat_template


def test_families(reference, checkpoint, tmp_path):
    """Through a GGUF file of ours, beside the model that it was."""
    write_gguf(tmp_path / "tokens.gguf", config=CONFIG | {"vocab_size": VOCABULARY})
    tokenizer, path = load_tokenizer(tmp_path / "tokens.gguf"), tmp_path / "model.gguf"
    save_gguf(load_model(checkpoint), tokenizer, path, kind="F32")
    tokens = np.random.default_rng(1).integers(VOCABULARY, size=(3, 80), dtype=np.int32)
    expected, model = logits_of(reference, tokens), load_model(path)
    np.testing.assert_allclose(run(model, tokens), expected, rtol=0, atol=1e-4)
    if model.config.rope_scaling is None:  # which transformers does not read
        found = logits_of(theirs(path), tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
