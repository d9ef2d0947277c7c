"""Figures for Prometheus: the engine's own, read when they are asked for, and what tokens take."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvtrain.inference.engine import Engine, EngineStats

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Name, what it says, attribute of the statistics.
_GAUGES = (
    ("kvtrain_queued_sequences", "Answers that wait", "queued"),
    ("kvtrain_running_sequences", "Answers that are being written", "running"),
    ("kvtrain_kept_prefixes", "Rows kept for prompts to come", "kept_prefixes"),
    ("kvtrain_kv_held_bytes", "Bytes held by all rows, kept prefixes included", "held_bytes"),
    ("kvtrain_kv_kept_bytes", "Those of kept prefixes", "kept_bytes"),
    ("kvtrain_kv_free_bytes", "Bytes that rows may still take", "free_bytes"),
    ("kvtrain_kv_budget_bytes", "Bytes that rows may hold", "budget_bytes"),
    ("kvtrain_kv_reserved_bytes", "Bytes allocated for the cache", "reserved_bytes"),
    ("kvtrain_kv_swapped_bytes", "Bytes of preempted rows, on the host", "swapped_bytes"),
    ("kvtrain_kv_plain_bytes", "What running rows would hold if every token were kept everywhere", "plain_bytes"),
    ("kvtrain_kv_compression", "Tokens seen for each that is kept", "compression"),
)
_COUNTERS = (
    ("kvtrain_generated_tokens", "Tokens generated", "new_tokens"),
    ("kvtrain_prompt_tokens", "Tokens of prompts that were read", "prompt_tokens"),
    ("kvtrain_cached_prompt_tokens", "Tokens of prompts that a kept row held", "cached_prompt_tokens"),
    ("kvtrain_preemptions", "Answers that made room for older ones", "preemptions"),
    ("kvtrain_steps", "Steps of the engine", "steps"),
    ("kvtrain_compilations", "Graphs made of decoding passes", "compilations"),
)


class ServerMetrics:
    """What ``/metrics`` shows, of one engine.

    Args:
        engine: Whose figures are read.

    Attributes:
        first_token: Seconds from a request to the first token of an answer.
        inter_token: Seconds from each token to the next.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.first_token = Histogram(
            "kvtrain_time_to_first_token_seconds",
            "From a request to the first token of an answer",
            buckets=_FIRST_TOKEN,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "kvtrain_inter_token_seconds",
            "From a token to the next one of its answer",
            buckets=_INTER_TOKEN,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of it, in Prometheus' own form."""
        return generate_latest(self._registry)


def tokens_per_second(stats: EngineStats) -> float:
    """Speed now: an engine at rest does not look at its clock."""
    return stats.tokens_per_second if stats.running or stats.queued else 0.0


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, words, attribute in _GAUGES:
            yield GaugeMetricFamily(name, words, value=getattr(stats, attribute))
        yield GaugeMetricFamily("kvtrain_tokens_per_second", "New tokens lately", value=tokens_per_second(stats))
        yield GaugeMetricFamily("kvtrain_up", "Whether requests are taken", value=float(self._engine.health().ok))
        for name, words, attribute in _COUNTERS:
            yield CounterMetricFamily(name, words, value=getattr(stats, attribute))
        finished = CounterMetricFamily("kvtrain_finished_sequences", "Answers that have ended", labels=["reason"])
        for reason, count in stats.finished:
            finished.add_metric([reason], count)
        yield finished
