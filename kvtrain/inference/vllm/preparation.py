"""What vLLM's configuration must be for a model of ours: refused, or set, before any weight is read."""

import logging

from transformers import PreTrainedConfig
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig

from kvtrain.inference.vllm.ring_pages import block_tokens
from kvtrain.inference.vllm.roles import Role, role_of_layers
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.paged_layers import PagedLayer, paged_layers
from kvtrain.models.registry import own_models

log = logging.getLogger(__name__)


def prepare(vllm_config: VllmConfig) -> None:
    """Refuse what is not served, and set what a state of constant size needs.

    Raises:
        ValueError: The model is not served, or not with one of the options; what to do.
    """
    config = vllm_config.model_config.hf_config
    layers = paged_layers(config)
    role = role_of_layers(layers)
    if role is Role.PAGED:
        _refuse_stages(layers, vllm_config)
        return
    _refuse_options(_title(config), vllm_config)
    _without_prefix_caching(_title(config), vllm_config)
    _run_eagerly(vllm_config)
    if role is Role.HYBRID:
        _fit_blocks(layers[0], vllm_config)


def _title(config: PreTrainedConfig) -> str:
    """The name by which users know what they serve."""
    if isinstance(config, KVTrainConfig):
        return type(config.method).__name__
    return next(own.prefix for own in own_models() if isinstance(config, own.config))


def _refuse_stages(layers: list[PagedLayer], vllm_config: VllmConfig) -> None:
    shared = any(layer.source != index for index, layer in enumerate(layers))
    if shared and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "layers that share keys and values run on one pipeline stage; leave out --pipeline-parallel-size"
        )


def _refuse_options(title: str, vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for option, size in (
        ("tensor-parallel-size", parallel.tensor_parallel_size),
        ("pipeline-parallel-size", parallel.pipeline_parallel_size),
    ):
        if size > 1:
            raise ValueError(f"{title} runs on one device; leave out --{option}")
    if vllm_config.lora_config is not None:
        raise ValueError(
            f"{title} is served without LoRA; merge adapters by kvtrain export, and leave out --enable-lora"
        )
    if vllm_config.speculative_config is not None:
        raise ValueError(
            f"{title} takes no tokens back in vLLM; leave out --speculative-config, or use kvtrain generate"
        )
    if vllm_config.cache_config.cache_dtype != "auto":
        raise ValueError(f"{title} keeps its state in the model's dtype; leave out --kv-cache-dtype")


def _without_prefix_caching(title: str, vllm_config: VllmConfig) -> None:
    """On by default where a model has blocks and a state; vLLM does not tell a default from a wish."""
    if vllm_config.cache_config.enable_prefix_caching:
        log.warning("%s is served without prefix caching: a state holds all of a row, and not its beginning", title)
        vllm_config.cache_config.enable_prefix_caching = False


def _run_eagerly(vllm_config: VllmConfig) -> None:
    """A step groups requests by their new tokens, which no captured graph does."""
    vllm_config.model_config.enforce_eager = True
    vllm_config.compilation_config.mode = CompilationMode.NONE
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


def _fit_blocks(layer: PagedLayer, vllm_config: VllmConfig) -> None:
    """Let a block of the paged heads and a piece of the ring have the same bytes, as vLLM's pages must."""
    assert layer.ring is not None
    cache, model = vllm_config.cache_config, vllm_config.model_config
    model.model_arch_config.total_num_kv_heads = layer.num_paged_heads  # of which vLLM computes its pages
    if not cache.user_specified_block_size:
        cache.block_size = block_tokens(layer)
        cache.user_specified_block_size = True  # or the platform would choose again
