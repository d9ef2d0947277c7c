"""Which method a measured model has."""

from typing import Any

from kvtrain.models.parse_method import method_text


def measured_method(model: Any, given: Any) -> dict[str, Any]:
    """What shrinks a model's cache, and whether it was trained: neither given here nor put in by an export alone.

    Methods read as ``--method`` takes them; a model without a host has its own name in place of one.

    Args:
        model: From ``open_model``.
        given: The method that it was opened with, or None.
    """
    method = getattr(model.config, "method", None)
    if method is None:
        return {"method": type(model.config).__name__.removesuffix("Config") + "()", "trained": True}
    learns = method.has_parallel_form and not method.trains_as_host
    return {"method": method_text(method), "trained": learns and given is None and not model.config.untrained}
