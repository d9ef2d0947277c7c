"""What an engine is doing, for whoever looks from outside."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """Whether the engine serves.

    Attributes:
        ok: New requests are taken.
        reason: Why not.
    """

    ok: bool
    reason: str | None = None


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine; the numbers belong together, and may be some steps old.

    Attributes:
        queued: Sequences that wait; an answer is a sequence.
        running: Sequences that hold a row.
        kept_prefixes: Rows that nobody uses, kept for prompts that begin alike.
        held_bytes: Bytes held by all rows, kept prefixes included.
        kept_bytes: Those of kept prefixes.
        reserved_bytes: Bytes that the cache has allocated, whether or not they hold anything.
        swapped_bytes: Bytes of preempted rows, on the host.
        budget_bytes: What rows may hold.
        plain_bytes: What running rows would hold in a cache that keeps every token in every head of every layer.
        seen_tokens: Tokens of running rows.
        kept_tokens: Entries that a head keeps of these, in the mean over layers and heads.
        kept_share: The same as a share, ``[layer][head]``; None for a head that a layer does not have.
        new_tokens: Generated since the start.
        prompt_tokens: Read from prompts since the start.
        cached_prompt_tokens: Taken over from kept rows since the start.
        tokens_per_second: New tokens, in the mean over the last seconds.
        preemptions: Since the start.
        finished: Sequences that have ended since the start, by reason.
        steps: Since the start.
        compilations: Graphs made of decoding passes since the start; see ``Limits.compiled_rows``.
    """

    queued: int = 0
    running: int = 0
    kept_prefixes: int = 0
    held_bytes: int = 0
    kept_bytes: int = 0
    reserved_bytes: int = 0
    swapped_bytes: int = 0
    budget_bytes: int = 0
    plain_bytes: int = 0
    seen_tokens: int = 0
    kept_tokens: float = 0.0
    kept_share: tuple[tuple[float | None, ...], ...] = ()
    new_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    tokens_per_second: float = 0.0
    preemptions: int = 0
    finished: tuple[tuple[str, int], ...] = ()
    steps: int = 0
    compilations: int = 0

    @property
    def free_bytes(self) -> int:
        """What rows may still take."""
        return self.budget_bytes - self.held_bytes

    @property
    def compression(self) -> float:
        """Tokens seen for each that is kept; 1 where nothing runs."""
        return self.seen_tokens / self.kept_tokens if self.kept_tokens else 1.0
