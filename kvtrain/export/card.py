"""The model card: what this is, how to open it, what was measured."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

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
        *_usage(retrofitted),
        *_host_class(model),
        *_settings(model),
    ]
    return "\n".join(lines) + "\n"


def lacking_parameters(model: PreTrainedModel, host_config: PreTrainedConfig) -> list[str]:
    """Parameters of the plain host that a retrofitted model does without.

    Args:
        model: The retrofitted model.
        host_config: Its host's configuration.
    """
    # A copy: building a model writes the choice of its attention into the configuration.
    config = type(host_config).from_dict(host_config.to_dict())
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(config)
    present = {name for name, _ in model.named_parameters()}
    return [name for name, _ in host.named_parameters() if name not in present]


def _usage(retrofitted: bool) -> list[str]:
    load = "import kvtrain  # registers the model class\n" if retrofitted else ""
    return [
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


def _host_class(model: PreTrainedModel) -> list[str]:
    """What comes of opening the folder without kvtrain."""
    config = model.config
    if not isinstance(config, KVTrainConfig):
        return []
    if lacking := lacking_parameters(model, config.host_config):
        outcome = (
            f"{len(lacking)} of the host's parameters are not in this folder, because the method does without them. "
            "What transformers opens then is random in these places, and no trained model."
        )
    else:
        outcome = (
            "it runs the trained weights that it knows with an ordinary, uncompressed cache, which is not the model "
            "that was trained."
        )
    paragraph = (
        "`generate` builds the matching cache by itself. Without `import kvtrain` the `Auto*` classes refuse this "
        f"folder. Opening it with the host's own class ({config.host_config.model_type}) by name cannot be refused: "
        f"{outcome}"
    )
    return [*textwrap.wrap(paragraph, 110, break_on_hyphens=False), ""]


def _settings(model: PreTrainedModel) -> list[str]:
    config = model.config
    if not isinstance(config, KVTrainConfig):
        return []
    return ["Settings of the method:", "", "```json", json.dumps(asdict(config.method), indent=1), "```"]
