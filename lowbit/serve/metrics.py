"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lowbit.runtime.batching import Load

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WHOLE = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The counters of one server. ``loads`` tells what each model holds at the moment that it is asked."""

    def __init__(self, loads: Mapping[str, Callable[[], Load]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(loads))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lowbit_{name}", text, ["model", *labels], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"lowbit_{name}", text, ["model"], buckets=buckets, registry=self._registry)

        self.sequences = counter("sequences", "Sequences that ended, by how", "outcome")
        self.read = counter("prompt_tokens", "Tokens of prompts that were read")
        self.written = counter("generated_tokens", "Tokens that were written")
        self.first = histogram("time_to_first_token_seconds", "From a request to its first token", _FIRST)
        self.each = histogram("token_seconds", "Between two tokens of a sequence", _EACH)
        self.whole = histogram("sequence_seconds", "From a request to its last token", _WHOLE)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Now(Collector):
    def __init__(self, loads: Mapping[str, Callable[[], Load]]) -> None:
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        texts = {
            "waiting": "Sequences in the queue", "running": "Sequences in the batch",
            "slots": "Sequences that the batch holds at most", "kv_bytes": "Memory of keys and values",
        }  # fmt: skip
        found = {model: load() for model, load in self._loads.items()}
        for name, text in texts.items():
            family = GaugeMetricFamily(f"lowbit_{name}", text, labels=["model"])
            for model, load in found.items():
                family.add_metric([model], float(getattr(load, name)))
            yield family
