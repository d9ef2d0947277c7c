"""What differs between families of hosts, as far as surgery and caches must know."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvtrain.models.extra_losses import ExtraLoss

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
QUERY_KEY_NORMS = ("q_norm", "k_norm")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")

KeyValueShape = tuple[int, int]  # key-value heads, and the channels of each


class HostAdapter:
    """Names the modules of one family and reads its configuration; the values here are Llama's.

    All families have the outline of Llama's decoder, and no attribute says so: ``model.layers`` and
    ``model.rotary_emb``; RMS norms with ``weight`` and ``variance_epsilon``; a gated MLP of ``gate_proj``, ``up_proj``
    and ``down_proj``, where ``feed_forward`` knows of no other part; an attention with ``PROJECTIONS``.

    Attributes:
        model_type: The family's name in ``config.json``.
        final_norm: Of the decoder, after the last layer.
        norms: Of a layer.
        input_norm: The one of them through which attention reads; None where it reads hidden states as they are.
        attention: The mixer of a layer.
        mlp: Its feed-forward part.
        query_key_norm: Whether ``q_norm`` and ``k_norm`` of an attention normalize each ``"head"`` by itself or
            ``"all"`` together; None where there are none.
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

    def feed_forward(self, mlp: nn.Module, layer_idx: int) -> nn.Module:
        """What takes the place of a layer's feed-forward part, and owns the same parameters by the same names.

        Args:
            mlp: The host's.
            layer_idx: Under which it ``note``s what ``extra_losses`` are made of.
        """
        from kvtrain.models.modules import GatedMLP  # settings read adapters, and import no modelling code

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

    def rotary_embedding(self, config: PreTrainedConfig) -> nn.Module:
        """The decoder's angles by position, for caches, which have no model at hand.

        Args:
            config: The host's.
        """
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        from kvtrain.models.modules import RotaryEmbedding

        return RotaryEmbedding(LlamaRotaryEmbedding(config))  # type: ignore[arg-type]

    def extra_losses(self, config: PreTrainedConfig) -> Sequence[ExtraLoss]:
        """Losses of the family beside that of the tokens, such as a router's, with the host's coefficients."""
        return ()

    def validate(self, config: PreTrainedConfig) -> None:
        """Refuse what the modules that take the place of the host's would silently ignore.

        Raises:
            ValueError: With the remedy.
        """
        _refuse_quantized(config)
        _refuse_windows(config)
        _refuse_rotary(config)
        if getattr(config, "attention_dropout", 0.0):
            raise ValueError("attention dropout is not supported; set attention_dropout=0.0")
        if getattr(config, "hidden_act", "silu") != "silu":
            raise ValueError(f"feed-forward activation {config.hidden_act!r} is not supported; use 'silu'")


def _refuse_quantized(config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        kind = settings.get("quant_method")
        raise ValueError(
            f"weights quantized by {getattr(kind, 'value', kind)!r} are not supported; load the host dequantized "
            "(mxfp4: quantization_config=Mxfp4Config(dequantize=True)), save it, and use that folder"
        )


def _refuse_windows(config: PreTrainedConfig) -> None:
    layer_types = getattr(config, "layer_types", None) or []
    sliding = any(kind != "full_attention" for kind in layer_types)
    if not layer_types and getattr(config, "sliding_window", None) is not None:
        sliding = bool(getattr(config, "use_sliding_window", True))
    if sliding:
        raise ValueError("hosts with sliding-window layers are not supported; set sliding_window=None first")


def _refuse_rotary(config: PreTrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        raise ValueError(f"rotary embedding of type {kind!r} is not supported; use {', '.join(_STATIC_ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial rotary embedding is not supported; the whole head must rotate")
