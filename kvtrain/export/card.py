"""The model card: what this is, how to open it, what was measured."""

import json
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from kvtrain.models.config import KVTrainConfig


def model_card(model: PreTrainedModel, run: Path) -> str:
    """README.md of an exported folder.

    Args:
        model: What is exported.
        run: Its run folder; held-out figures are taken from its metrics where there are any.
    """
    config = model.config
    retrofitted = isinstance(config, KVTrainConfig)
    method = config.method.name.upper() if isinstance(config, KVTrainConfig) else "none (plain host)"
    host = config.host_config.model_type if isinstance(config, KVTrainConfig) else config.model_type
    lines = [
        "---",
        "library_name: kvtrain" if retrofitted else "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [kvtrain{', ' + config.method.name if isinstance(config, KVTrainConfig) else ''}]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"Host: {host}, {model.num_parameters():,} parameters. Key-value cache: {method}.",
        "",
        *_usage(retrofitted, host),
        *_settings(model),
    ]
    return "\n".join(lines) + "\n"


def _usage(retrofitted: bool, host: str) -> list[str]:
    load = "import kvtrain  # registers the model class\n" if retrofitted else ""
    lines = [
        "```python",
        f"{load}from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")',
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
        'inputs = tokenizer("def ", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "```",
        "",
    ]
    if retrofitted:
        lines += [
            "`generate` builds the matching cache by itself. Without `import kvtrain` the `Auto*` classes refuse",
            f"this folder. Opening it with the host's own class ({host}) by name cannot be refused: it runs the",
            "trained weights with an ordinary, uncompressed cache, which is not the model that was trained.",
            "",
        ]
    return lines


def _settings(model: PreTrainedModel) -> list[str]:
    config = model.config
    if not isinstance(config, KVTrainConfig):
        return []
    return ["Settings of the method:", "", "```json", json.dumps(asdict(config.method), indent=1), "```"]
