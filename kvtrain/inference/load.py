"""Open a model for use."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kvtrain.assets import resolve
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import UsageError, explain_load_errors
from kvtrain.models.adapters import refuse_adapter
from kvtrain.models.method import Method
from kvtrain.models.registry import own_model_class

logger = logging.getLogger("kvtrain")
# Where on the Hub something is and who asks for it: the same for configuration, weights and tokenizer.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_MEGATRON = "model_optim_rng.pt"
_COMMIT = re.compile("[0-9a-f]{40}")


def load(name: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model that kvtrain exported, or any other causal language model, ready for inference.

    A TransNormer comes back as what was exported: a causal or masked language model, or a classifier.

    Args:
        name: Folder, Hub id, or ``kvtrain:tiny``.
        **kwargs: Go to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map`` ...); what says where on the
            Hub it is and who asks (``token``, ``revision``, ``subfolder`` ...) also to its configuration.
            ``trust_remote_code=True`` takes a ``revision`` of 40 digits: code that cannot change after it was read.

    Raises:
        ValueError: There is no model there, or its code is trusted unseen.
    """
    path = resolve(str(name))
    _refuse_megatron(path)
    if not (Path(path) / "config.json").is_file():
        refuse_adapter(path)
    with explain_load_errors(str(name)):
        trusted = _trust(path, kwargs)
        found = AutoConfig.from_pretrained(path, **{**_hub_options(kwargs), **trusted})
        chosen: Any = own_model_class(found) or AutoModelForCausalLM
        model: PreTrainedModel = chosen.from_pretrained(path, **{**kwargs, **trusted})
    return model


def open_model(
    name: str | Path, *, method: Method | None = None, device: torch.device | None = None, **kwargs: Any
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load a model with its tokenizer; a plain host gets a method, so that its cache can be measured too.

    Args:
        name: Folder, Hub id, or ``kvtrain:tiny``.
        method: For a plain host; ``Full()`` where absent.
        device: Where it goes; where it was loaded, if absent.
        **kwargs: As in ``load``; the tokenizer is looked for in the same place and runs no code of its own.

    Raises:
        ValueError: There is no model or tokenizer, or the host is of no supported family, or a method is given to what
            is no plain host.
    """
    from kvtrain.models.full import Full
    from kvtrain.models.host import retrofit
    from kvtrain.models.language_model import CachedLanguageModel

    model: Any = load(name, **kwargs)
    if own_model_class(model.config) and not isinstance(model, CachedLanguageModel):
        raise ValueError(f"{name} is a {type(model).__name__}, which generates no text; open it with kvtrain.load")
    if not isinstance(model, CachedLanguageModel):
        model = retrofit(model, method or Full())
    elif method is not None:
        raise UsageError(f"{name} is a {type(model).__name__} already; a method is given to a plain model")
    if device is not None:
        model.to(device)
    return model.eval(), load_tokenizer(str(name), **_hub_options(kwargs))


def _refuse_megatron(path: str) -> None:
    """Say why published weights of DMC are not read, which exist in this form alone.

    Raises:
        UsageError: They are Megatron's.
    """
    place = Path(path)
    if place.name == _MEGATRON or (place.is_dir() and next(place.glob(f"**/{_MEGATRON}"), None)):
        raise UsageError(
            f"{path} holds Megatron's pickles, which can run code and are never read here; retrofit the base instead "
            "(recipes/dmc_llama7b.yaml), or let Megatron write its weights as a Hugging Face folder"
        )


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}


def _trust(path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Whether code that comes with a model may run, and which: of a folder, or of one commit.

    Raises:
        UsageError: It could be other code tomorrow.
    """
    if not kwargs.get("trust_remote_code"):
        return {"trust_remote_code": False}
    revision, code_revision = str(kwargs.get("revision")), kwargs.get("code_revision")
    if not Path(path).is_dir():
        if not _COMMIT.fullmatch(revision):
            from huggingface_hub import HfApi

            commit = HfApi().model_info(path, revision=kwargs.get("revision"), token=kwargs.get("token")).sha
            raise UsageError(f"trust_remote_code runs what {path} holds: read it, and pin it with revision={commit!r}")
        logger.warning("code of %s at commit %s may run", path, revision)
    settings, _ = PreTrainedConfig.get_config_dict(path, **_hub_options(kwargs))
    elsewhere = [str(place) for place in settings.get("auto_map", {}).values() if "--" in str(place)]
    if (elsewhere or code_revision) and not _COMMIT.fullmatch(str(code_revision)):
        place = elsewhere[0].split("--")[0] if elsewhere else path
        raise UsageError(f"trust_remote_code runs code of {place}: pin it with code_revision, a commit of 40 digits")
    return {"trust_remote_code": True, **({"code_revision": code_revision} if code_revision else {})}
