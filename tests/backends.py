"""Which backend runs an operation is chosen, and said, once a process: tests begin anew."""

from kvtrain.kernels import dispatch


def forget_backends() -> None:
    """Let operations choose again, and say so again."""
    dispatch._chosen.cache_clear()
    dispatch.log_backend.cache_clear()
