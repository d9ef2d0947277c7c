"""What a server is given beside its engine."""

from dataclasses import dataclass, field

from kvtrain.errors import UsageError, require_at_least


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server; what the engine takes on stands in its ``Limits``.

    Args:
        model_name: What requests call the model.
        keys: Any of these opens every route; none leaves them open to all who reach the address.
        allowed_hosts: What browsers may call this server, so that no web page reaches it under a name of its own;
            None asks for nothing, as behind a proxy that looks itself.
        max_body_bytes: Of a request.
        max_connections: Requests that are answered at a time, pages that watch included.
        default_new_tokens: Of an answer in a chat that names no number.
        request_timeout: Seconds from a request to its last token; what there is by then is the answer.
        body_timeout: Seconds in which a request must have arrived.

    Raises:
        ValueError: A limit is too small.
    """

    model_name: str
    keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: frozenset[str] | None = None
    max_body_bytes: int = 4 << 20
    max_connections: int = 1024
    default_new_tokens: int = 256
    request_timeout: float = 600.0
    body_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_connections", "default_new_tokens"):
            require_at_least(1, name, getattr(self, name))
        for name in ("request_timeout", "body_timeout"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
