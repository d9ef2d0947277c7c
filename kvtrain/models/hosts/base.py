"""What differs between families of hosts, as far as surgery and caches must know."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvtrain.models.extra_losses import ExtraLoss

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
QUERY_KEY_NORMS = ("q_norm", "k_norm")
_SLIDING = "sliding_attention"
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")

KeyValueShape = tuple[int, int]  # key-value heads, and the channels of each


class HostAdapter:
    """Names the modules of one family and reads its configuration; the values here are Llama's.

    All families have the outline of Llama's decoder, and no attribute says so: ``model.embed_tokens``,
    ``model.layers`` and ``model.rotary_emb``; RMS norms with ``weight`` and ``variance_epsilon``, where ``norm`` knows
    of no others; a gated MLP of ``gate_proj``, ``up_proj`` and ``down_proj``, where ``feed_forward`` knows of no other
    part; an attention with ``PROJECTIONS``.

    Attributes:
        model_type: The family's name in ``config.json``.
        final_norm: Of the decoder, after the last layer.
        norms: Of a layer.
        input_norm: The one of them through which attention reads; None where it reads hidden states as they are.
        attention: The mixer of a layer.
        mlp: Its feed-forward part.
        query_key_norm: Whether ``q_norm`` and ``k_norm`` of an attention normalize each ``"head"`` by itself or
            ``"all"`` together; None where there are none.
        slides_by_layer: Whether ``layer_types`` say which layers see a window of ``sliding_window`` latest tokens; of
            other families all layers do where the configuration has such a window.
        activation: Of the gate in ``feed_forward``: what a configuration calls it, and the one that is computed.
        served_by_vllm: Whether vLLM's class of the family has been held against ours.
        attention_sinks: Whether an attention has ``sinks (H,)``: of every query head the score of a key that has no
            value and that all its queries see.
    """

    model_type: ClassVar[str]
    final_norm: ClassVar[str] = "norm"
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    input_norm: ClassVar[str | None] = "input_layernorm"
    attention: ClassVar[str] = "self_attn"
    mlp: ClassVar[str] = "mlp"
    query_key_norm: ClassVar[Literal["head", "all"] | None] = None
    slides_by_layer: ClassVar[bool] = False
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    served_by_vllm: ClassVar[bool] = True
    attention_sinks: ClassVar[bool] = False

    @property
    def attention_norms(self) -> tuple[str, ...]:
        """Names of the norms in an attention."""
        return () if self.query_key_norm is None else QUERY_KEY_NORMS

    @property
    def attention_parts(self) -> frozenset[str]:
        """Names of all modules and parameters in an attention."""
        return frozenset((*PROJECTIONS, *self.attention_norms, *(["sinks"] if self.attention_sinks else [])))

    def attention_name(self, layer_idx: int) -> str:
        """A layer's attention by its name in the model, with which the names of its weights begin."""
        return f"model.layers.{layer_idx}.{self.attention}"

    def key_value_shape(self, config: PreTrainedConfig, layer_idx: int) -> KeyValueShape:
        """Key-value heads of a layer, and the channels of each."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_key_value_heads), int(head_dim)

    def window(self, config: PreTrainedConfig, layer_idx: int) -> int | None:
        """Latest tokens that a layer sees, the current one included; None: all."""
        window = getattr(config, "sliding_window", None)
        slides = not self.slides_by_layer or config.layer_types[layer_idx] == _SLIDING
        return int(window) if slides and window is not None else None

    def embedding(self, embedding: nn.Module) -> nn.Module:
        """What takes the place of the word embedding; as a rule nothing does."""
        return embedding

    def norm(self, norm: nn.Module) -> nn.Module:
        """What takes the place of a norm, and owns the same parameters by the same names."""
        from kvtrain.models.modules import RMSNorm  # settings read adapters, and import no modelling code

        return RMSNorm(norm)

    def feed_forward(self, mlp: nn.Module, layer_idx: int) -> nn.Module:
        """What takes the place of a layer's feed-forward part, and owns the same parameters by the same names.

        Args:
            mlp: The host's.
            layer_idx: Under which it ``note``s what ``extra_losses`` are made of.
        """
        from kvtrain.models.modules import GatedMLP

        return GatedMLP(mlp)

    def stored_weights(self, weights: Mapping[str, Tensor], config: PreTrainedConfig) -> Mapping[str, Tensor]:
        """Weights by their names in the model, of those that a folder's files hold.

        Args:
            weights: By their names in the files; to be looked at no more than ``LateTensor`` does.
            config: The host's.
        """
        return weights

    def file_weights(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """What files of the host's family hold in the place of a weight: ``stored_weights`` the other way round.

        Args:
            name: In the model.
            weight: The weight.
        """
        return {name: weight}

    def rotary_parameters(self, config: PreTrainedConfig, layer_idx: int) -> Mapping[str, Any]:
        """What a configuration says of the rotary embedding of a layer, ``rope_theta`` and the like."""
        return getattr(config, "rope_parameters", None) or {}

    def rotary_embedding(self, config: PreTrainedConfig, layer_idx: int) -> nn.Module:
        """A layer's angles by position, for caches, which have no model at hand.

        Args:
            config: The host's.
            layer_idx: The layer.
        """
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        from kvtrain.models.modules import RotaryEmbedding

        own: Any = copy.copy(config)
        own.rope_parameters = dict(self.rotary_parameters(config, layer_idx))
        return RotaryEmbedding(LlamaRotaryEmbedding(own))

    def decoder_rotary(self, rotary: nn.Module, config: PreTrainedConfig) -> nn.Module:
        """What takes the place of the decoder's rotary embedding, and is called as it is.

        Args:
            rotary: The host's.
            config: Its configuration.
        """
        from kvtrain.models.modules import RotaryEmbedding

        return RotaryEmbedding(rotary)

    def extra_losses(self, config: PreTrainedConfig) -> Sequence[ExtraLoss]:
        """Losses of the family beside that of the tokens, such as a router's, with the host's coefficients."""
        return ()

    def validate(self, config: PreTrainedConfig) -> None:
        """Refuse what the modules that take the place of the host's would silently ignore.

        Raises:
            ValueError: With the remedy.
        """
        _refuse_layer_types(config)
        for layer_idx in range(config.num_hidden_layers):
            _refuse_rotary(self.rotary_parameters(config, layer_idx))
        _refuse_quantized(config)
        if getattr(config, "attention_dropout", 0.0):
            raise ValueError("attention dropout is not supported; set attention_dropout=0.0")
        name, known = self.activation
        if (found := getattr(config, name, known)) != known:
            raise ValueError(f"feed-forward activation {found!r} is not supported; use {known!r}")


def _refuse_layer_types(config: PreTrainedConfig) -> None:
    unknown = sorted({*(getattr(config, "layer_types", None) or [])} - {"full_attention", _SLIDING})
    if unknown:
        raise ValueError(f"layers of type {unknown[0]!r} are not supported; take a host of full and sliding attention")


def _refuse_quantized(config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        kind = settings.get("quant_method")
        raise ValueError(
            f"weights quantized by {getattr(kind, 'value', kind)!r} are not supported; load the host dequantized "
            "(mxfp4: quantization_config=Mxfp4Config(dequantize=True)), save it, and use that folder"
        )


def _refuse_rotary(rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        raise ValueError(f"rotary embedding of type {kind!r} is not supported; use {', '.join(_STATIC_ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial rotary embedding is not supported; the whole head must rotate")
