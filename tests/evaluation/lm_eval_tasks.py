"""Tasks of lm-eval's three kinds over files that lie here, and a group of them."""

import json
from pathlib import Path

import yaml

TEXTS = ["import os\n" * 30, "x = 1\n", "def f(a, b):\n    return a + b\n" * 20]
CHOICES = [
    {"text": "import", "choices": [" os", " zebra", " sys\n", "x"], "answer": 0},
    {"text": "def f(x):\n    return", "choices": [" x", " class", "\n\n\n"], "answer": 0},
    {"text": "for i in", "choices": [" range(10):", " import os"], "answer": 0},
    {"text": "class A:\n    def __init__(self", "choices": ["):", ", x, y, z):", " banana"], "answer": 1},
]
QUESTIONS = [
    {"text": "import os\nimport sys\nimport", "answer": " os"},
    {"text": "def f(self):\n    return", "answer": " self"},
    {"text": "a = 1\nb = 2\nc =", "answer": " 3"},
]
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
}
_GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
NAMES = ("choice", "rolling", "generation")


def write_tasks(folder: Path) -> dict[str, str]:
    """Write the tasks and give each one's file; ``rolling`` reads ``corpus.jsonl``."""
    documents = {"choice": CHOICES, "rolling": [{"text": text} for text in TEXTS], "generation": QUESTIONS}
    settings = {"choice": _CHOICE, "rolling": _ROLLING, "generation": _GENERATION}
    files = {}
    for name in NAMES:
        data = folder / ("corpus.jsonl" if name == "rolling" else f"{name}.jsonl")
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"task": f"local_{name}", **source, **settings[name]}))
        files[name] = str(path)
    return files
