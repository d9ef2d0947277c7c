"""How much an engine takes on."""

from dataclasses import dataclass, fields

from kvtrain.errors import UsageError, require_at_least

_MAY_BE_ZERO = ("kept_prefixes", "swap_bytes", "max_logprobs", "compiled_rows")


@dataclass(frozen=True)
class Limits:
    """Limits of an engine; the byte budget stands apart.

    Args:
        max_requests: Sequences that run at a time; an answer is a sequence.
        max_queue: Sequences that wait; more are refused.
        max_prompt_tokens: Of a request; None leaves that to the budget.
        max_new_tokens: Of an answer; None leaves that to the budget.
        max_n: Answers to a request.
        max_logprobs: Alternatives that a token may come with.
        step_tokens: Tokens that a step feeds the model; decoding rows come first, prompts take the rest.
        kept_prefixes: Rows kept after their use, for prompts that begin alike; 0 keeps none.
        shared_tokens: A beginning that prompts have in common is read once from this length on.
        swap_bytes: Host memory for preempted rows; those that find none read their tokens again. None is the budget.
        page_size: Slots in a page of the cache, for models whose caches have pages; None is the model's own.
        compiled_rows: Decoding passes over so many rows at most are compiled as a whole, for each number of rows again,
            and as often as what they hold doubles; such a pass may take a minute. 0 compiles nothing.

    Raises:
        ValueError: A limit is too small.
    """

    max_requests: int = 64
    max_queue: int = 1024
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_n: int = 16
    max_logprobs: int = 20
    step_tokens: int = 512
    kept_prefixes: int = 64
    shared_tokens: int = 16
    swap_bytes: int | None = None
    page_size: int | None = None
    compiled_rows: int = 0

    def __post_init__(self) -> None:
        for limit in fields(self):
            least = 0 if limit.name in _MAY_BE_ZERO else 1
            require_at_least(least, limit.name, getattr(self, limit.name))
        if self.step_tokens <= self.max_requests:
            raise UsageError(
                f"step_tokens must be above max_requests ({self.max_requests}), not {self.step_tokens}: "
                "every running sequence may take one, and prompts want the rest"
            )
