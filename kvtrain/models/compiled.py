"""A decode step as one graph: every row of a cache goes on by a token, and ``torch.compile`` takes the step whole."""

import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from kvtrain.cache.base import KVCache
from kvtrain.cache.rows import fixed_step
from kvtrain.errors import first_line
from kvtrain.models.context import ForwardContext

logger = logging.getLogger("kvtrain")

_Step = Callable[[Any, KVCache, Tensor], Tensor]


class CompiledStep:
    """Runs decode steps of a model over one of its caches.

    What a step takes, and what depends on what tensors hold, is found before it, eagerly: pages are taken ahead, and
    the list of those that rows own is padded to a power of two. What is left has the same shapes in most steps, and is
    compiled once for each: for so many rows, about as often as the longest row and all pages double.

    A step that cannot be compiled runs eagerly, which is said once, and so do all after it; those of layers
    without ``has_fixed_step`` do so from the start.

    Args:
        model: In evaluation mode.
        cache: Of ``model.make_cache(budget, preallocate=True)``.
        backend: Of ``torch.compile``.

    Attributes:
        compilations: How many graphs have been made.
        eager: Whether steps run eagerly from now on.

    Raises:
        ValueError: The cache's pages are not reserved.
    """

    def __init__(self, model: Any, cache: KVCache, backend: str = "inductor") -> None:
        self.model, self.cache = model, cache
        self.eager = not all(layer.has_fixed_step for layer in cache.layers)
        if self.eager:
            logger.warning("decode steps run eagerly, for what this cache forgets is decided in each of them")
        else:
            with cache.fixed():  # raises
                pass
        self.compilations = 0
        self._backend: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        self._steps: dict[tuple[int, int], _Step] = {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits ``(B, V)`` behind one more token of every row, ``input_ids (B, 1)``, which enters the cache.

        Raises:
            ValueError: The cache has another number of rows.
            CacheFullError: The new tokens may not fit into its budget; nothing has changed.
        """
        self.cache.prepare(*input_ids.shape)
        logits = _step(self.model, self.cache, input_ids) if self.eager else self._run(input_ids)
        self.cache.advance(torch.ones_like(input_ids, dtype=torch.bool))
        return logits

    def _run(self, input_ids: Tensor) -> Tensor:
        with self.cache.fixed() as shape, fixed_step():
            if shape not in self._steps:
                self._steps[shape] = self._compiled()
            try:
                return self._steps[shape](self.model, self.cache, input_ids)
            except torch._dynamo.exc.TorchDynamoException as error:  # before anything has run
                self.eager = True
                logger.warning("decode steps run eagerly, for they cannot be compiled: %s", first_line(error))
        return _step(self.model, self.cache, input_ids)

    def _compiled(self) -> _Step:
        """The step with code of its own: a compiler keeps what it makes by the code, and gives up after some shapes."""
        step = FunctionType(_step.__code__.replace(), _step.__globals__)
        compiled: _Step = torch.compile(step, fullgraph=True, dynamic=False, backend=self._compile)
        return compiled

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.compilations += 1
        return self._backend(graph, inputs)


def _step(model: Any, cache: KVCache, input_ids: Tensor) -> Tensor:
    """One more token of every row ``(B, 1)`` through all layers and the head, ``(B, V)``; the caller counts it."""
    context = ForwardContext(
        cache.tokens[:, None],
        cache=cache,
        valid=torch.ones_like(input_ids, dtype=torch.bool),
        prefill=torch.zeros_like(input_ids[:, 0], dtype=torch.bool),
        decodes=True,
        single=True,
        parallel=model.context_parallel,
    )
    output = model.model.forward(
        input_ids=input_ids, position_ids=context.positions, use_cache=False, return_dict=True, context=context
    )
    logits: Tensor = model.lm_head(output.last_hidden_state[:, -1])
    return logits
