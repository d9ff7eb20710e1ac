"""Tasks of lm-evaluation-harness in files, made of the TinyStories excerpt."""

import json
import re

FILES = """
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {file}
    shots: {file}
  cache_dir: {cache}
test_split: test
metadata:
  version: 1.0
"""
# In stories of a small vocabulary, continuations of the same beginning.
CHOICE = """
task: stories_choice
tag: stories
output_type: multiple_choice
fewshot_split: shots
fewshot_config:
  sampler: first_n
doc_to_text: "{{before}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(after)}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
# One token each, after the same text, as in MMLU.
LETTER = """
task: stories_letter
output_type: multiple_choice
doc_to_text: "{{before}}\\nThis is story A, B or C. It is story"
doc_to_choice: ["A", "B", "C"]
doc_to_target: "{{number % 3}}"
metric_list:
  - metric: acc
"""
PERPLEXITY = """
task: stories_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{story}}"
should_decontaminate: false
process_results: null
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
GENERATION = """
task: stories_generation
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: 60
  do_sample: false
metric_list:
  - metric: exact_match
    ignore_case: true
"""
GROUP = """
group: stories_group
task: [stories_choice, stories_letter]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1.0
"""


def write_tasks(directory, excerpt, count=12, **more):
    """Writes the tasks above and more, by name of their files, of `count` questions."""
    sentences = re.findall(r"[A-Z][^.!?\n\"]{30,}\.", excerpt)[: 4 * count]
    lines = []
    for i in range(count):
        first, *others = (sentences[4 * i + k].split(" ") for k in range(4))
        after = " ".join(first[4:])
        choices = sorted({after, *(" ".join(words[4:]) for words in others[:2])})
        lines.append(
            {
                "number": i,
                "before": " ".join(first[:4]),
                "after": after,
                "choices": choices,
                "prompt": " ".join(first[:4]),
                "answer": after.removesuffix("."),
                "story": excerpt[3000 * i : 3000 * i + 100 + 400 * (i % 8)],
            }
        )
    # What the 260K model is known to tell.
    lines[0]["prompt"] = "Once upon a time, there was a little girl named"
    lines[0]["answer"] = "Lily"
    file = directory / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = FILES.format(file=file, cache=directory / "cache")
    tasks = {
        "choice": CHOICE,
        "letter": LETTER,
        "perplexity": PERPLEXITY,
        "generation": GENERATION,
    } | more
    for name, task in tasks.items():
        (directory / f"{name}.yaml").write_text(task + files)
    (directory / "group.yaml").write_text(GROUP)
    return directory
