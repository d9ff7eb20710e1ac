"""lm-evaluation-harness through its own backend for Hugging Face, and through ours."""

import dataclasses

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.evaluation.harness import JaxLM
from examples.llama.text.tokenizer import load_tokenizer, save_tokenizer
from tests.examples.llama.evaluation.harness_tasks import write_tasks

NAMES = ("choice", "letter", "perplexity", "generation")
TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}[{{ message.role }}] "
    "{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(data_dir, tmp_path_factory):
    """The real 260K model, exported."""
    path = tmp_path_factory.mktemp("stories")
    save_hugging_face(load_model(data_dir / "stories260K.bin"), path)
    tokenizer = load_tokenizer(data_dir / "tok512.bin", 512)
    save_tokenizer(dataclasses.replace(tokenizer, chat_template=TEMPLATE), path)
    return path


@pytest.fixture(scope="module")
def reference(checkpoint):
    return HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def ours(checkpoint):
    return JaxLM(load_model(checkpoint), load_tokenizer(checkpoint), batch_size=4)


@pytest.fixture(scope="module")
def manager(data_dir, tmp_path_factory):
    excerpt = (data_dir / "tinystories_excerpt.txt").read_text()
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), excerpt, count=24)
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(model, manager, **options):
    return lm_eval.simple_evaluate(
        model,
        tasks=[f"stories_{name}" for name in NAMES],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )


# Twenty examples are longer than the context of 512 tokens.
@pytest.mark.parametrize(
    "options",
    [
        {"limit": 12},
        {"num_fewshot": 20, "limit": 6},
        {"num_fewshot": 2, "apply_chat_template": True, "limit": 6},
    ],
)
def test_the_same_results(reference, ours, manager, options):
    expected = run(reference, manager, **options)
    found = run(ours, manager, **options)
    assert found["results"].keys() == expected["results"].keys()
    for task, metrics in expected["results"].items():
        for metric, value in metrics.items():
            if task == "stories_perplexity" and isinstance(value, float):
                value = pytest.approx(value, rel=1e-4)
            assert found["results"][task][metric] == value
    longest = max(
        len(ours.tok_encode(sample["arguments"][0][0]))
        for sample in expected["samples"]["stories_choice"]
    )
    assert (longest > ours.max_length) == (options.get("num_fewshot") == 20)
    seen = set()
    for task, samples in expected["samples"].items():
        for sample, other in zip(samples, found["samples"][task], strict=True):
            assert other["arguments"] == sample["arguments"]
            for a, b in zip(sample["resps"], other["resps"], strict=True):
                compare(a[0], b[0])
                seen.add(b[0] if isinstance(b[0], str) else str(b[0]))
    assert len(seen) > 30


def compare(expected, found):
    """A text, a log-likelihood, or that and whether it is the greedy text's."""
    if isinstance(expected, tuple):
        assert found[1] == expected[1]
        expected, found = expected[0], found[0]
    if not isinstance(expected, str):
        expected = pytest.approx(expected, abs=1e-3, rel=0)
    assert found == expected
