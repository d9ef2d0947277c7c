"""Text from a prompt, with the facts of the cache that it took."""

import math
import time
from dataclasses import dataclass

import torch

from kvtrain.errors import require_at_least, require_seed
from kvtrain.inference.device import AUTO, pick_device
from kvtrain.inference.load import open_model
from kvtrain.inference.prompt import beyond_positions, chat_ids, prompt_ids
from kvtrain.models.method import Method


@dataclass(frozen=True)
class Generation:
    """What ``generate_text`` returns.

    Attributes:
        text: The continuation, without the prompt.
        new_tokens: Tokens generated.
        seconds: Wall time of prefill and decoding.
        seen_tokens: Tokens that went into the cache.
        kept_tokens: Slots kept, averaged over layers and heads.
        kv_bytes: Bytes that the cache has allocated.
    """

    text: str
    new_tokens: int
    seconds: float
    seen_tokens: int
    kept_tokens: float
    kv_bytes: int

    def facts(self) -> str:
        """One line: speed, kept tokens, bytes, compression."""
        return (
            f"{self.new_tokens} tokens at {self.new_tokens / self.seconds:.1f} tok/s · "
            f"kept {self.kept_tokens:.0f} of {self.seen_tokens} tokens "
            f"({self.seen_tokens / self.kept_tokens:.2f}x) · KV cache {self.kv_bytes / 1024:.0f} KiB"
        )


def generate_text(
    model: str,
    prompt: str,
    *,
    method: Method | None = None,
    device: str = AUTO,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat_template: bool = False,
) -> Generation:
    """Continue a prompt, or answer it.

    Args:
        model: Folder, Hub id, or ``kvtrain:tiny``.
        prompt: Text.
        method: For a plain model; see ``open_model``.
        device: See ``pick_device``.
        max_new_tokens: Upper bound.
        temperature: 0 is greedy.
        top_p: Nucleus of the distribution to sample from.
        seed: Of the sampling.
        chat_template: Whether the prompt is what a user says in a chat, to be put into the tokenizer's template.

    Raises:
        ValueError: There is no such model or template, a number is out of range, or the model has too few positions.
    """
    _check(prompt, max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = open_model(model, method=method, device=pick_device(device))
    turn = {"role": "user", "content": prompt}
    ids = chat_ids(tokenizer, [turn]) if chat_template else prompt_ids(tokenizer, prompt)
    if (reason := beyond_positions(loaded.max_positions, len(ids), max_new_tokens)) is not None:
        raise ValueError(reason)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    cache = loaded.make_cache()
    torch.manual_seed(seed)
    began = time.perf_counter()
    output = loaded.generate(
        torch.tensor([ids], device=loaded.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=loaded.device),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )[0]
    seconds = time.perf_counter() - began
    new = output[len(ids) :]
    return Generation(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        new_tokens=len(new),
        seconds=seconds,
        seen_tokens=cache.get_seq_length(),
        kept_tokens=cache.mean_kv_tokens().mean().item(),
        kv_bytes=cache.kv_bytes(),
    )


def _check(prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Refuse numbers out of range and what is no text, before a model is read."""
    require_at_least(1, "max_new_tokens", max_new_tokens)
    require_seed("seed", seed)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number from 0 on, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("the prompt is not UTF-8 text; convert it first")
