"""Configuration of TransNormer, and the settings that were published."""

from typing import Any, Literal, Self, get_args

from kvtrain.models.portable import PortableConfig
from kvtrain.renamed import with_new_names

Variant = Literal["T1", "T2"]
NormKind = Literal["rms", "batch"]
Positions = Literal["sinusoidal", "learned", "none"]
Relative = Literal["lrpe", "rope"]
Decay = Literal["none", "released", "paper"]
Pooling = Literal["mean", "first"]
Initialization = Literal["xavier", "normal"]

MODEL_TYPE = "transnormer"
_ENDLESS = 1 << 30  # tokens

_LM = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 267744}
_ROBERTA = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50265,
    "causal": False,
    "pre_norm": False,
    "position_embedding": "learned",
    "scale_embedding": False,
    "embedding_norm": True,
    "attention_dropout": 0.1,
    "initialization": "normal",
}
_LRA = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 16,
    "causal": False,
    "norm": "batch",
    "relative_position": "rope",
    "gated_mlp": False,
    "hidden_act": "gelu",
    "scale_embedding": False,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
}
_PRESETS: dict[str, dict[str, Any]] = {"lm": _LM, "roberta": _ROBERTA, "lra": _LRA}


class TransNormerConfig(PortableConfig):
    """Settings of a TransNormer: the first half of its layers attend within blocks (Diag), the others linearly (Norm).

    The defaults are those of the published causal language model but for its sizes; ``preset`` has them all.

    Args:
        variant: ``"T1"``: elu features, ReLU attention with a norm in the blocks; ``"T2"``: 1 + elu, softmax.
        vocab_size: Tokens.
        hidden_size: Width D.
        num_hidden_layers: Layers; of an odd number the larger half is linear.
        num_attention_heads: Heads H; each has D / H channels, an even number.
        num_block_heads: Heads of the block layers; as many where absent.
        intermediate_size: Width of the feed-forward layers; ``8 D / 3`` gated and ``4 D`` plain where absent.
        block_size: Tokens of a block, w.
        causal: Whether tokens see later ones.
        norm: ``"rms"``: over all channels, without weights; ``"batch"``: over tokens, with weights (Long Range Arena).
        norm_eps: Added to the root mean square, as in the released code, or ...
        norm_eps_in_root: ... to the mean square under the root, as in the paper. Batch norm has 1e-5.
        pre_norm: Norms before the layers' parts, and one at the end; otherwise after them.
        position_embedding: Added to the embedding: ``"sinusoidal"``, ``"learned"`` or ``"none"``.
        max_position_embeddings: Positions that are learnt.
        relative_position: ``"lrpe"``: a reflection and learnt angles; ``"rope"``: fixed angles.
        scale_embedding: Multiply the embedding by the root of D.
        embedding_norm: A layer norm after the embedding.
        gated_mlp: A gated linear unit, or two plain layers.
        hidden_act: ``"silu"`` (the paper), ``"identity"`` (the released code's gate) or ``"gelu"``.
        decay: Past tokens fade in linear layers: ``"released"``: as in the code of Lightning Attention and in MiniMax;
            ``"paper"``: equation 10 of arXiv 2405.17381.
        hidden_dropout: After the embedding and after each part of a layer.
        attention_dropout: On the weights within blocks.
        pooling: What a classifier looks at: the ``"mean"`` over a row's tokens, or its ``"first"``.
        initialization: ``"xavier"`` (the published language model) or ``"normal"``.
        initializer_range: Standard deviation of ``"normal"``.
        use_cache: Generate with a cache.
        tie_word_embeddings: The head has the embedding's weights.
        pad_token_id: Token that pads, where there is one; likewise ...
        bos_token_id: ... that begins a text, and ...
        eos_token_id: ... that ends one.

    Raises:
        ValueError: A value is out of range.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    variant: str = "T2"
    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_block_heads: int | None = None
    intermediate_size: int | None = None
    block_size: int = 64
    causal: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-8
    norm_eps_in_root: bool = False
    pre_norm: bool = True
    position_embedding: str = "sinusoidal"
    max_position_embeddings: int = 512
    relative_position: str = "lrpe"
    scale_embedding: bool = True
    embedding_norm: bool = False
    gated_mlp: bool = True
    hidden_act: str = "silu"
    decay: str = "none"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.0
    pooling: str = "mean"
    initialization: str = "xavier"
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = with_new_names(kwargs)
        self.initialization = kwargs.pop("initialization", self.initialization)
        if self.intermediate_size is None:
            self.intermediate_size = 8 * self.hidden_size // 3 if self.gated_mlp else 4 * self.hidden_size
        if self.num_block_heads is None:
            self.num_block_heads = self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check()

    def summary(self, size: str) -> str:
        """See ``PortableConfig``."""
        kinds = f"{self.num_block_layers} layers of attention within blocks, then linear ones"
        return f"TransNormer {self.variant}, {size}, {self.num_hidden_layers} layers: {kinds}."

    @classmethod
    def preset(cls, name: str, variant: Variant = "T2", **changes: Any) -> Self:
        """Settings as published.

        Args:
            name: ``"lm"``: WikiText-103, 156M parameters; ``"roberta"``: masked language model of RoBERTa's base size;
                ``"lra"``: ListOps of the Long Range Arena.
            variant: ``"T1"`` or ``"T2"``.
            **changes: Other values of some fields.

        Raises:
            ValueError: There is no such preset, or a value is out of range.
        """
        if name not in _PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(_PRESETS)}")
        return cls(variant=variant, **{**_PRESETS[name], **changes})

    @property
    def tasks(self) -> tuple[str, ...]:
        """See ``PortableConfig``; classifiers read in either direction."""
        return ("CausalLM" if self.causal else "MaskedLM", "SequenceClassification")

    @property
    def num_block_layers(self) -> int:
        """Layers that attend within blocks: the first half, rounded down."""
        return self.num_hidden_layers // 2

    @property
    def model_max_length(self) -> int | None:
        """What engines that look for it, such as vLLM, may let texts come to; None where positions have been learnt."""
        return None if self.position_embedding == "learned" else _ENDLESS

    def heads(self, layer_idx: int) -> int:
        """Heads of a layer."""
        heads = self.num_block_heads if layer_idx < self.num_block_layers else self.num_attention_heads
        assert heads is not None
        return heads

    def slopes(self, layer_idx: int) -> list[float] | None:
        """How fast each head of a linear layer forgets: a token's weight falls by ``exp(-slope)`` a step.

        The two published rules do not agree, and their weights do not fit each other.
        """
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        if self.decay == "none":
            return None
        if self.decay == "paper":
            return [8 * (head + 1) / heads * (1 - layer_idx / layers) for head in range(heads)]
        fade = 1 - layer_idx / max(1, layers - 1) + 1e-5
        return [2 ** (-8 * (head + 1) / heads) * fade for head in range(heads)]

    def _check(self) -> None:
        _check_choice("variant", self.variant, get_args(Variant))
        _check_choice("norm", self.norm, get_args(NormKind))
        _check_choice("position_embedding", self.position_embedding, get_args(Positions))
        _check_choice("relative_position", self.relative_position, get_args(Relative))
        _check_choice("decay", self.decay, get_args(Decay))
        _check_choice("pooling", self.pooling, get_args(Pooling))
        _check_choice("initialization", self.initialization, get_args(Initialization))
        _check_choice("hidden_act", self.hidden_act, ("silu", "identity", "gelu"))
        for name in ("num_attention_heads", "num_block_heads"):
            heads = getattr(self, name)
            if heads < 1 or self.hidden_size % (2 * heads):
                raise ValueError(
                    f"{name} is {heads}, which leaves no even number of channels a head; "
                    f"let hidden_size ({self.hidden_size}) be a multiple of twice the heads"
                )
        for name in ("num_hidden_layers", "block_size", "vocab_size", "intermediate_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.norm_eps <= 0:  # ReLU attention gives rows of zeros
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, not {value!r}")
