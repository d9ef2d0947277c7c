"""Models as the released code keeps them (NVIDIA Model Optimizer, ``experimental/dms``)."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtrain.models.dms.config import DMS
from kvtrain.models.dms.convert import PROJECTION
from kvtrain.models.host import retrofit
from kvtrain.models.weights import map_weights


def load_published(path: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Open a model in the released code's layout: a Qwen3 with ``dms_`` settings, whose own code is not run.

    Its decisions come from adapters among its weights, or from a channel of its queries (nvidia/Qwen3-8B-DMS-8x).

    Args:
        path: Folder or Hub id.
        dtype: Of the weights; as stored by default.

    Raises:
        ValueError: It has no settings of DMS, evictions are switched off, or adapters are missing from its weights.
    """
    host = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    settings = published_settings(host.config, path)
    for name in [name for name in vars(host.config) if name.startswith("dms_")]:
        delattr(host.config, name)
    model = retrofit(host, settings)
    if settings.decide_by == "adapter":
        expected = {name for name in model.state_dict() if f".{PROJECTION}" in name}  # both names begin with it
        found = {name: tensor for name, tensor in map_weights(path).items() if name in expected}
        if missing := sorted(expected - found.keys()):
            raise ValueError(
                f"{path}: its settings say that decisions come from adapters, and it has no {missing[0]}; fetch the "
                "folder anew, all of its files"
            )
        model.load_state_dict(found, strict=False)
    return model


def published_settings(config: PreTrainedConfig, path: str) -> DMS:
    """Settings from the ``dms_`` fields of a released configuration; where one is absent, what the code takes it for.

    Args:
        config: It.
        path: Where it comes from, for messages.

    Raises:
        ValueError: There are none, or evictions are switched off.
    """
    if not any(name.startswith("dms_") for name in vars(config)):
        raise ValueError(f"{path}: its config.json has no dms_ settings; open it with kvtrain.load")
    if getattr(config, "dms_disable_eviction", False):
        raise ValueError(f"{path}: dms_disable_eviction is set, this is a plain model; open it with kvtrain.load")
    separate = bool(getattr(config, "dms_separate_alpha", False))
    return DMS(
        compression=float(getattr(config, "dms_cr", 8)),
        window=int(getattr(config, "dms_window_size", 512)),
        trainable="adapter" if separate else "all",
        temperature=float(getattr(config, "dms_tau", 0.1)),
        decide_by="adapter" if separate else "query_channel",
        shared_decisions=getattr(config, "dms_alpha_per", "head") == "layer",
        decision_scale=float(getattr(config, "dms_alpha_scale", 100.0)),
        init_bias=float(getattr(config, "dms_initial_alpha_offset", 5.0)),
    )
