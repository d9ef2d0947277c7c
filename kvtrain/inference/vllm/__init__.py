"""A plugin by which vLLM serves what ``kvtrain export`` writes, each cache as small as it is.

vLLM finds it by the package's entry point and calls ``register`` in every one of its processes; nothing here imports
vLLM before that. Which models it serves, and why not the others, is said by ``kvtrain.models.paged_layers``.
"""


def register() -> None:
    """Tell vLLM our configurations and classes; calling it again changes nothing."""
    from kvtrain.inference.vllm.registration import register_all

    register_all()
