"""The model card: what this is, how to open it, what was measured."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtrain.export.provenance import Provenance
from kvtrain.models.cache_size import break_even, cache_bytes, host_kv_bytes
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.portable import SHIM, PortableConfig


def model_card(model: PreTrainedModel, title: str, origin: Provenance, with_code: bool = False) -> str:
    """README.md of an exported folder.

    Args:
        model: What is exported.
        title: What it is called.
        origin: Where it comes from.
        with_code: The folder has the model's code, too.
    """
    config = model.config
    ours = isinstance(config, PortableConfig)
    lines = [
        "---",
        _front_matter(model, origin, with_code),
        "---",
        "",
        f"# {title}",
        "",
        _summary(model),
        "",
        *_origin(origin),
        *_cache(model, origin),
        *(_usage(ours) if _task(model)[0] == "text-generation" else _other_usage(model)),
        *(_code_usage(model) if with_code else _remote_usage(model) if ours else []),
        *_host_class(model),
        *_settings(model),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(model: PreTrainedModel, origin: Provenance, with_code: bool) -> str:
    """What the Hub reads of a card."""
    config = model.config
    ours = isinstance(config, PortableConfig)
    data = ModelCardData(
        base_model=origin.hub_base,
        datasets=[origin.dataset] if origin.dataset else None,
        library_name="kvtrain" if ours and not with_code else "transformers",
        license=origin.license,
        pipeline_tag=_task(model)[0],
        tags=["kvtrain", *([config.architecture_name] if ours else [])],
    )
    text: str = data.to_yaml()
    return text


def _origin(origin: Provenance) -> list[str]:
    """Base, licence, text, steps and held-out figures, as far as the run tells."""
    facts = []
    if origin.base:
        unknown = "unknown: the base's card names none; look it up before you publish"
        facts += [("base", f"`{origin.base}`"), ("licence of the base", origin.license or unknown)]
    if origin.corpus:
        rows = f", rows of {origin.sequence_length:,} tokens" if origin.sequence_length else ""
        facts.append(("text", f"`{origin.corpus}`{rows}"))
    if origin.phases:
        facts.append(("steps (learning rate)", ", ".join(map(_phase, origin.phases))))
    at = f" at step {origin.step:,}" if origin.step else ""
    facts += [(f"{name}{at}", f"{figure:.4g}") for name, figure in origin.figures.items()]
    return _table(("", ""), facts)


def _phase(phase: Mapping[str, Any]) -> str:
    rate = phase.get("learning_rate")
    return f"{phase.get('name')} {phase.get('steps', 0):,}" + (f" ({rate:g})" if isinstance(rate, float) else "")


def _cache(model: PreTrainedModel, origin: Provenance) -> list[str]:
    """What a row takes in the cache that serves, beside its host's own."""
    config = model.config
    if not isinstance(config, KVTrainConfig):
        return []
    host, method, lengths = config.host_config, config.method, sorted({1024, origin.sequence_length or 1024})
    rows = []
    for tokens in lengths:
        plain, held = host_kv_bytes(host, tokens), cache_bytes(host, method, tokens)
        rows.append((f"{tokens:,}", f"{plain:,}", f"{held:,}", f"{plain / held:.2f}"))
    least = break_even(host, method, lengths[-1])
    shorter = f"A row below {least:,} tokens takes more than the host's." if least and least > 1 else ""
    if least is None:
        shorter = f"A row takes more than the host's, at least up to {lengths[-1]:,} tokens."
    note = (
        "Bytes of one row in half precision, pages and tables included, where every head keeps as many tokens "
        f"as the method's settings let expect. {shorter}"
    )
    header = ("tokens", "host's cache, bytes", "this one's, bytes", "times fewer")
    return [*_table(header, rows), *_paragraph(note)]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    lines = [header, ("---",) * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


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


def _task(model: PreTrainedModel) -> tuple[str, str]:
    """The Hub's name of what the model does, and the class that opens it."""
    if type(model).__name__.endswith("ForMaskedLM"):
        return "fill-mask", "AutoModelForMaskedLM"
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "text-classification", "AutoModelForSequenceClassification"
    return "text-generation", "AutoModelForCausalLM"


def _summary(model: PreTrainedModel) -> str:
    config, size = model.config, f"{model.num_parameters():,} parameters"
    if isinstance(config, PortableConfig):
        return config.summary(size)
    return f"Host: {config.model_type}, {size}. Key-value cache: none (plain host)."


def _usage(ours: bool) -> list[str]:
    load = "import kvtrain  # registers the model class\n" if ours else ""
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


def _other_usage(model: PreTrainedModel) -> list[str]:
    """For models that generate nothing."""
    auto = _task(model)[1]
    return [
        "```python",
        "import kvtrain  # registers the model class",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("<this folder>")',
        "```",
        "",
    ]


def _remote_usage(model: PreTrainedModel) -> list[str]:
    """How programs open the folder in which nobody can write ``import kvtrain``."""
    clients = "`pipeline`"
    if _task(model)[0] == "text-generation":
        clients = "`transformers serve --trust-remote-code`, `lm_eval --model hf`, `pipeline`, PEFT's `AutoPeftModel*`"
    return _paragraph(
        f"Programs that do not import kvtrain ({clients}) open this folder with `trust_remote_code=True`, where "
        f"kvtrain is installed. That runs `{SHIM.name}`, which imports kvtrain and does nothing else. Once "
        "kvtrain is imported, nothing in this folder is run."
    )


def _code_usage(model: PreTrainedModel) -> list[str]:
    """How to open a folder that has the model's code, without kvtrain."""
    clients = "`pipeline` does so, too"
    if _task(model)[0] == "text-generation":
        clients = "`pipeline`, `lm_eval --model hf` and PEFT do so, too; `transformers serve` needs kvtrain installed"
    return [
        "Without kvtrain, with transformers and torch alone:",
        "",
        "```python",
        f"model = {_task(model)[1]}.from_pretrained(",
        '    "<this folder>", trust_remote_code=True, revision="<the 40 digits of a commit that you have looked at>"',
        ")",
        "```",
        "",
        *_paragraph(
            f"That runs `{SHIM.name}` and the files beside it, a copy of kvtrain's own code ({clients}). Without a "
            "revision it runs whatever the repository holds by then; a folder on disk has none. Where kvtrain is "
            "installed it opens this folder, and the copy is not run."
        ),
    ]


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 110, break_on_hyphens=False), ""]


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
    elif config.method.trains_as_host:
        outcome = (
            "it runs the model that was trained, with an ordinary cache that quantizes nothing: more memory, and "
            "slightly other results."
        )
    elif not config.method.has_parallel_form:
        outcome = "it runs the same weights with an ordinary cache, which keeps everything: more memory, other results."
    else:
        outcome = (
            "it runs the trained weights that it knows with an ordinary, uncompressed cache, which is not the model "
            "that was trained."
        )
    return _paragraph(
        "`generate` builds the matching cache by itself. Without either of these the `Auto*` classes refuse this "
        f"folder. Opening it with the host's own class ({config.host_config.model_type}) by name cannot be refused: "
        f"{outcome}"
    )


def _settings(model: PreTrainedModel) -> list[str]:
    config = model.config
    if not isinstance(config, KVTrainConfig):
        return []
    return ["Settings of the method:", "", "```json", json.dumps(asdict(config.method), indent=1), "```"]
