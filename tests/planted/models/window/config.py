"""Settings of the window."""

from dataclasses import dataclass
from typing import ClassVar

from kvtrain.metrics import Table
from kvtrain.models.method import Method

SEEN = Table("window_seen.csv", ("layer", "tokens"))


@dataclass(frozen=True)
class Window(Method):
    """Every head sees the first tokens of its row and the latest ones.

    Args:
        sink: First tokens.
        recent: Latest tokens, the token itself included.

    Raises:
        ValueError: No token would be seen.
    """

    name: ClassVar[str] = "window"

    sink: int = 2
    recent: int = 6

    def __post_init__(self):
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1 (the token itself), not {self.recent}")
