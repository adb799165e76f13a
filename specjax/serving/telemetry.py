"""Prometheus metrics under vLLM's names, so that its dashboards and `vllm bench serve` read them."""

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from specjax.serving.exchange import Observer
from specjax.serving.requests import Engine, Increment, Submission

FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
BETWEEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    80.0,
)
WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(mantissa * 10**power) for power in range(6) for mantissa in (1, 2, 5))
FEW = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Buckets, in seconds or tokens: vLLM's."""

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", FIRST),
    "inter_token_latency_seconds": ("Seconds a token, between the deliveries of a sequence.", BETWEEN),
    "request_time_per_output_token_seconds": ("Seconds a token after the first, by sequence.", BETWEEN),
    "e2e_request_latency_seconds": ("From arrival to the end of a sequence.", WHOLE),
    "request_queue_time_seconds": ("From arrival to the start of the prefill.", WHOLE),
    "request_prefill_time_seconds": ("Of the prefill.", WHOLE),
    "request_decode_time_seconds": ("From the first token to the last.", WHOLE),
    "request_inference_time_seconds": ("Prefill and decoding.", WHOLE),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("New tokens of a sequence.", TOKENS),
    "request_params_max_tokens": ("What a request asked for at most.", TOKENS),
    "request_params_n": ("Sequences of a prompt.", FEW),
    "iteration_tokens_total": ("Tokens of one sequence that came at once.", TOKENS),
}

_CREATED = re.compile(rb"^(# (HELP|TYPE) )?\S+_created[ {].*\n", re.MULTILINE)
"""Lines of when a metric was made, which nobody reads; the library's own switch holds for the whole process."""


class _OfEngine(Collector):
    """Reads an engine's snapshot when metrics are asked for."""

    def __init__(self, engine: Engine, labels: dict[str, str]):
        self._engine, self._names, self._values = engine, tuple(labels), tuple(labels.values())

    def describe(self) -> list[Metric]:
        """Nothing: the engine is not asked before metrics are."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The counters and gauges."""
        now = self._engine.snapshot()
        capacity = max(now.capacity_tokens, 1)
        gauges = {
            "vllm:num_requests_running": ("Sequences that decode.", now.running),
            "vllm:num_requests_waiting": ("Sequences that wait for a slot.", now.waiting),
            "vllm:kv_cache_usage_perc": ("Share of the cache in use, 0 to 1.", now.used_tokens / capacity),
            "specjax:num_slots": ("Sequences that can decode at once.", now.num_slots),
            "specjax:num_draft_tokens": (
                "Mean number of draft tokens of a row in the last call: K now.",
                now.num_draft_tokens,
            ),
            "specjax:prefix_cache_bytes": ("Memory of the prefix cache.", now.prefix_bytes),
            "specjax:engine_alive": ("1 while the engine's thread runs.", float(self._engine.alive)),
        }
        counters = {
            "vllm:prompt_tokens": ("Tokens of prompts, cached ones included.", now.prompt_tokens),
            "vllm:generation_tokens": ("New tokens.", now.generated_tokens),
            "vllm:prefix_cache_queries": ("Tokens looked up in the prefix cache.", now.prefix_queries),
            "vllm:prefix_cache_hits": ("Tokens found there.", now.prefix_hits),
            "vllm:num_preemptions": ("Sequences that lost their slot: none does.", 0),
            "vllm:spec_decode_num_drafts": ("Steps of a row that drafted.", now.draft_steps),
            "vllm:spec_decode_num_draft_tokens": ("Draft tokens that were judged.", now.drafted),
            "vllm:spec_decode_num_accepted_tokens": ("Draft tokens that were accepted.", now.accepted),
            "specjax:compilations": ("Programs compiled since the engine was ready.", now.compilations),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=self._names)
            gauge.add_metric(self._values, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=self._names)
            counter.add_metric(self._values, value)
            yield counter
        by_place = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by their position in the draft.",
            labels=(*self._names, "position"),
        )
        for position, accepted in enumerate(now.accepted_at):
            by_place.add_metric((*self._values, str(position)), accepted)
        yield by_place
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The cache.", labels=(*self._names, "num_slots", "max_model_len")
        )
        config.add_metric((*self._values, str(now.num_slots), str(self._engine.max_len)), 1)
        yield config


class Telemetry:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, engine: Engine, model: str, name: str = "0"):
        """Registers everything.

        Args:
          engine: whose state is told.
          model: the name that is served, a label.
          name: of the engine, a label.
        """
        self._labels = {"model_name": model, "engine": name}
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine, self._labels))
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, tuple(self._labels), registry=self._registry, buckets=buckets).labels(
                **self._labels
            )
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._success = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason.",
            (*self._labels, "finished_reason"),
            registry=self._registry,
        )
        self._refused = Counter(
            "specjax:requests_refused",
            "Requests that were answered with an error, by status.",
            (*self._labels, "status"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(**self._labels, finished_reason=reason)

    @property
    def observer(self) -> Observer:
        """What an `Office` tells of requests."""
        return Observer(self._observe("time_to_first_token_seconds"), self._tokens, self._ended)

    def _observe(self, name: str):
        return self._histograms[name].observe

    def _tokens(self, count: int, seconds: float) -> None:
        self._observe("iteration_tokens_total")(count)
        for _ in range(count):
            self._observe("inter_token_latency_seconds")(seconds / count)

    def _ended(self, submission: Submission, part: Increment, seconds: float) -> None:
        reasons = {"cancelled": "abort", "timeout": "abort"}
        reason = reasons.get(str(part.finish_reason), str(part.finish_reason))
        self._success.labels(**self._labels, finished_reason=reason).inc()
        usage, options = part.usage, submission.options
        observed = {
            "e2e_request_latency_seconds": seconds,
            "request_params_max_tokens": options.max_new_tokens,
            "request_params_n": options.n,
        }
        if usage is not None:
            observed |= {
                "request_queue_time_seconds": usage.queue_seconds,
                "request_prefill_time_seconds": usage.prefill_seconds,
                "request_decode_time_seconds": usage.decode_seconds,
                "request_inference_time_seconds": usage.prefill_seconds + usage.decode_seconds,
                "request_prompt_tokens": usage.prompt_tokens,
                "request_generation_tokens": usage.completion_tokens,
            }
            if usage.completion_tokens > 1:
                observed["request_time_per_output_token_seconds"] = usage.decode_seconds / (usage.completion_tokens - 1)
        for name, value in observed.items():
            self._observe(name)(value)

    def refused(self, status: int) -> None:
        """Counts an answer that is an error."""
        self._refused.labels(**self._labels, status=str(status)).inc()

    def text(self) -> tuple[bytes, str]:
        """The metrics and their content type."""
        return _CREATED.sub(b"", generate_latest(self._registry)), CONTENT_TYPE_LATEST
