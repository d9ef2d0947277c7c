"""Scores of key-value heads that need no training: what a head looks for, and what a window would take from it.

``model.binarize(sparsity, gates=...)`` takes what ``razor_gates`` and ``free_signal`` return.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvtrain.kernels.attention import attention
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.models.attention import HostAttention
from kvtrain.models.context import ForwardContext
from kvtrain.models.duo.attention import DuoStep
from kvtrain.models.duo.config import Duo
from kvtrain.models.duo.patterns import AttentionPatterns
from kvtrain.models.sliding import SlidingAttention

# Arguments of an attention that say who sees whom.
# The published prompt: so many ids, drawn from this range of the vocabulary.
_PERIOD, _PUBLISHED_IDS = 2500, range(10_000, 12_501)


class RazorScores(NamedTuple):
    """What heads do with a text that repeats itself (RazorAttention, arXiv 2407.15891, section 3.2).

    Attributes:
        induction: ``(layers, H_kv)`` probability that falls on the tokens behind earlier copies of the current one.
        echo: ``(layers, H_kv)`` probability that falls on those copies.
    """

    induction: Tensor
    echo: Tensor


@torch.no_grad()
def razor_scores(
    model: Any,
    *,
    period: int | None = None,
    repeats: int = 4,
    rows: int = 1,
    seed: int = 0,
    vocabulary: Sequence[int] | Tensor | None = None,
) -> RazorScores:
    """Let the model read random ids again and again, and see where its heads look.

    A prompt is one special token and ``period`` random ids, ``repeats`` times over. Scores are means over all tokens
    behind the first copy, and of the query heads that share a key-value head the largest counts. No matrix of
    attention is made: only the pairs that count are.

    Args:
        model: One with ``kvtrain.Full()`` or with the gates of ``kvtrain.Duo()``, which count as open.
        period: Ids that repeat; 2,500 as published, or as many as the model's positions allow.
        repeats: Copies of them.
        rows: Prompts, one after the other.
        seed: Of the ids.
        vocabulary: Ids to draw from, for a model that copies only some words: on others none of its heads shows what
            it does. Absent, they are drawn as published if the model's vocabulary has those ids, otherwise from all
            but the special ones.

    Raises:
        ValueError: The model has no plain attention to look at, the prompt does not fit it, or it lacks an id.
    """
    config = _plain_model(model).config.host_config
    limit = int(config.max_position_embeddings)
    period = min(_PERIOD, (limit - 1) // max(repeats, 1)) if period is None else period
    if repeats < 2 or period < 2 or rows < 1 or period * repeats >= limit:
        raise ValueError(
            f"{rows} prompts of {repeats} x {period} ids behind a special token do not fit a model of {limit} "
            "positions; give at least 1 prompt and 2 repeats of a period of 2, and make the period shorter"
        )

    def look(module: HostAttention, heads: tuple[Tensor, Tensor, Tensor], _: ForwardContext) -> Tensor:
        lse = module.with_sinks(attention(*heads, scale=module.scaling))[1]
        return _repeats_seen(*heads[:2], lse, period, module.scaling)

    generator, ids = torch.Generator().manual_seed(seed), _ids_to_draw(config, vocabulary)
    prompts = (_prompt(config, ids, period, repeats, generator).to(model.device) for _ in range(rows))
    total = torch.stack([_observe(model, prompt, look) for prompt in prompts]).mean(0)  # (layers, 2, H)
    grouped = total.unflatten(-1, (int(config.num_key_value_heads), -1)).amax(-1)
    return RazorScores(grouped[:, 0], grouped[:, 1])


def razor_gates(scores: RazorScores, induction_share: float = 0.14, echo_share: float = 0.01) -> Tensor:
    """Gates from scores: rounded at any sparsity, they keep the best heads of both kinds, in the ratio of the shares.

    First comes the published choice: the best ``induction_share`` of all heads by induction and the best
    ``echo_share`` by echo, both rounded up. Then both shares grow, their ratio kept, and heads follow in the order in
    which one kind or the other reaches them; of two reached at once, the better one by induction.

    Args:
        scores: Of ``razor_scores``.
        induction_share: Share of heads, 0 to leave this kind out.
        echo_share: Likewise.

    Returns:
        ``(layers, H_kv)`` float64, all different, the first head's 1.

    Raises:
        ValueError: A share is not from 0 to 1, or both are 0.
    """
    if not (0.0 <= induction_share <= 1.0 and 0.0 <= echo_share <= 1.0 and induction_share + echo_share > 0.0):
        raise ValueError(
            f"shares of heads are from 0 to 1 and one of them is above 0, not {induction_share} and {echo_share}"
        )
    induction, echo = (_ranks(kind.flatten()) for kind in scores)
    enters = torch.minimum(_over(induction, induction_share), _over(echo, echo_share))
    order = induction.argsort()
    order = order[enters[order].argsort(stable=True)]
    gates = torch.empty(len(order), dtype=torch.float64)
    gates[order] = 1.0 - torch.arange(len(order), dtype=torch.float64) / len(order)
    return gates.view(scores.induction.shape)


@torch.no_grad()
def free_signal(
    model: Any,
    input_ids: Tensor,
    supervised: Tensor,
    *,
    settings: Duo | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """How far each head's output would move if it streamed, all else unchanged: one forward pass, no training.

    The mean over tokens of ``||W_O (full - window)||^2``, the query heads of a key-value head together.

    Args:
        model: One with ``kvtrain.Full()`` or with the gates of ``kvtrain.Duo()``, which count as open.
        input_ids: ``(B, T)``.
        supervised: ``(B, T)`` bool, tokens that count, such as ``labels != -100``.
        settings: Whose window; the model's own where absent.
        attention_mask: ``(B, T)`` padding mask, or None.
        document_ids: ``(B, T)``, or None.

    Returns:
        ``(layers, H_kv)`` float64, as a share of the largest; zeros where no window hides anything.

    Raises:
        ValueError: The model has no plain attention to look at, no window is named, or no token counts.
    """
    own = _plain_model(model).method
    settings = settings or (own if isinstance(own, Duo) else None)
    if settings is None:
        raise ValueError("the model's method has no window; pass settings=kvtrain.Duo(sink=..., recent=...)")
    window, counted = settings, supervised.bool()
    if not bool(counted.any()):
        raise ValueError("no token is supervised; mark at least one, for example by labels != -100")

    def look(module: HostAttention, heads: tuple[Tensor, Tensor, Tensor], context: ForwardContext) -> Tensor:
        patterns = AttentionPatterns.of(window, module.scaling, context)
        full, streaming = (
            at_least_float32(module.with_sinks(seen)[0]) for seen in (patterns.full(*heads), patterns.streaming(*heads))
        )
        moved = full - streaming
        return _energies(moved.transpose(1, 2)[counted.to(moved.device)], module)

    energies = _observe(model, input_ids, look, attention_mask=attention_mask, document_ids=document_ids)
    return energies / energies.max().clamp(min=torch.finfo(torch.float64).tiny)


def _plain_model(model: Any) -> Any:
    """Refuse a model whose attention is not, or is no longer, the host's own.

    Raises:
        ValueError: With the remedy.
    """
    method = getattr(model, "method", None)
    name = getattr(method, "name", "none")
    if name not in ("full", "duo") or getattr(method, "full_heads", None) is not None:
        raise ValueError(
            "heads are scored in a model with kvtrain.Full() or with kvtrain.Duo() before its gates are rounded; "
            f"this one's method is {name!r}"
        )
    return model


def _observe(
    model: Any,
    input_ids: Tensor,
    look: Callable[[HostAttention, tuple[Tensor, Tensor, Tensor], ForwardContext], Tensor],
    **arguments: Any,
) -> Tensor:
    """Run the decoder with open gates, and stack what ``look`` makes of each layer's heads, in float64 on the CPU."""
    seen: list[Tensor] = []

    def before(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        assert isinstance(module, HostAttention)
        heads = module.project(kwargs["hidden_states"], kwargs["position_embeddings"], kwargs["context"].parallel)
        seen.append(look(module, heads, kwargs["context"]).double().cpu())

    attentions = [module for module in model.modules() if isinstance(module, HostAttention)]
    attentions = [attention for attention in attentions if not isinstance(attention, SlidingAttention)]
    hooks = [attention.register_forward_pre_hook(before, with_kwargs=True) for attention in attentions]
    try:
        model.model(input_ids, use_cache=False, step=DuoStep(full_attention=True), **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def _special_ids(config: PreTrainedConfig) -> list[int]:
    """The one that prompts begin with comes first."""
    given = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    return [token for ids in given if ids is not None for token in (ids if isinstance(ids, list) else [ids])]


def _ids_to_draw(config: PreTrainedConfig, vocabulary: Sequence[int] | Tensor | None) -> Tensor:
    """Those asked for, ``(n,)``, or what ``razor_scores`` says otherwise.

    Raises:
        ValueError: There are none, or the model has no such ids.
    """
    size = int(config.vocab_size)
    if vocabulary is None:
        if size >= _PUBLISHED_IDS.stop:
            return torch.tensor(_PUBLISHED_IDS)
        special = _special_ids(config)
        return torch.tensor([token for token in range(size) if token not in special])
    ids = torch.as_tensor(vocabulary).cpu()
    if ids.dim() != 1 or not ids.numel() or ids.is_floating_point() or not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"vocabulary is a list of ids, each from 0 to {size - 1}; give one or more, or leave it out")
    return ids


def _prompt(config: PreTrainedConfig, ids: Tensor, period: int, repeats: int, generator: torch.Generator) -> Tensor:
    """``(1, 1 + period * repeats)``: a special token, and random ones of ``ids (n,)`` that repeat."""
    drawn = ids[torch.randint(len(ids), (period,), generator=generator)]
    return torch.cat([torch.tensor(_special_ids(config)[:1] or [0]), drawn.repeat(repeats)]).unsqueeze(0)


def _repeats_seen(query: Tensor, key: Tensor, lse: Tensor, period: int, scale: float) -> Tensor:
    """Induction and echo ``(2, H)``: mean probabilities of queries behind the first copy, the special token apart.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, T, D)``.
        lse: ``(B, H, T)``.
        period: Tokens of a copy.
        scale: Factor on the scores.
    """
    lse = lse.unflatten(1, (key.shape[1], -1))[..., 1:]  # (B, H_kv, G, n)
    query, key = at_least_float32(query).unflatten(1, (key.shape[1], -1))[..., 1:, :], at_least_float32(key)[:, :, 1:]
    length = key.shape[2]

    def at(lag: int, start: int) -> Tensor:
        """Probability of the key ``lag`` tokens back, summed over the queries from ``start`` on."""
        keys = key[:, :, None, start - lag : length - lag]
        score = (query[..., start:, :] * keys).sum(-1) * scale
        total: Tensor = (score - lse[..., start:]).exp().sum((0, -1)).flatten()
        return total

    copies = range(period, length, period)
    induction, echo = (sum(at(lag - behind, lag) for lag in copies) for behind in (1, 0))
    return torch.stack([torch.as_tensor(induction), torch.as_tensor(echo)]) / (query.shape[0] * (length - period))


def _energies(moved: Tensor, module: HostAttention) -> Tensor:
    """``(n, H, D)`` through the output projection, squared lengths ``(H_kv,)``, means over n."""
    weights = at_least_float32(module.o_proj.weight).split(module.num_groups * module.head_dim, 1)
    grouped = moved.unflatten(1, (module.num_key_value_heads, -1)).flatten(2)  # (n, H_kv, G * D)
    pairs = zip(grouped.unbind(1), weights, strict=True)
    return torch.stack([(head @ weight.T).square().sum(-1).mean() for head, weight in pairs])


def _ranks(scores: Tensor) -> Tensor:
    """Place of each score, 0 for the largest; equal ones in order."""
    ranks = torch.empty(len(scores), dtype=torch.long)
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(len(scores))
    return ranks


def _over(ranks: Tensor, share: float) -> Tensor:
    """Factor by which a share must grow until it reaches each rank."""
    return ranks.double() / (share * len(ranks)) if share else torch.full_like(ranks, torch.inf, dtype=torch.float64)
