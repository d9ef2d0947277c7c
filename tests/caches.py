"""One line a method: a model whose cache the conformance suite puts through its paces."""

from collections.abc import Callable

from transformers import PreTrainedModel

import kvtrain
from tests.hosts import dmc_at_rate, random_ids

Retrofit = Callable[[PreTrainedModel], PreTrainedModel]

CACHES: dict[str, Retrofit] = {
    "full": lambda host: kvtrain.retrofit(host, kvtrain.Full()),
    "dmc": lambda host: dmc_at_rate(host, 0.6, random_ids(2, 40, seed=7), page_size=4, window=5),
}
