"""What kvtrain says while it trains, and what other libraries are kept from saying."""

import logging
import sys
import warnings
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

# Matched at the start of a message. None of them is about anything a user of kvtrain did or can change.
_OTHERS_REMARKS = (
    "LightningCLI's args parameter",
    ".*does not have many workers",
    ".*isinstance.treespec, LeafSpec.*",
    ".*LeafSpec.*deprecated",
    ".*Precision .* is not supported by the model summary",
    ".*`weights_only` was not set",
    ".*sync_dist=True",  # the modules reduce their sums themselves
)
# Its only remark is that a process has ended and which; then it ends the others.
_LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"


class _StandardError(logging.StreamHandler[Any]):
    """Writes to standard error as it is now, so that a progress bar that takes it over keeps its own line."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # not setStream, which flushes the one before: it may be closed by now
        super().emit(record)


class _Lines(logging.Formatter):
    """Facts as they are, warnings marked as such."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"kvtrain: {record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def _to_standard_error(record: logging.LogRecord) -> bool:
    """Take over what DeepSpeed would write to standard output, where results stand; its chatter is left out."""
    if record.levelno >= logging.WARNING and "Setting accelerator to CPU" not in record.getMessage():
        print(f"DeepSpeed: {record.getMessage()}", file=sys.stderr)
    return False


def configure_logging() -> None:
    """Send kvtrain's log to standard error, on the first rank, and silence advertisements and internals."""
    handler = _StandardError()
    handler.setFormatter(_Lines())
    own = logging.getLogger("kvtrain")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(_LAUNCHER).setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").addFilter(_to_standard_error)
    for remark in _OTHERS_REMARKS:
        warnings.filterwarnings("ignore", message=remark)
