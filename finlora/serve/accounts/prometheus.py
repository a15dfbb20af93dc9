"""Prometheus metrics of a server, in Ray's metrics endpoint beside Ray Serve's own; named by Prometheus' conventions."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from finlora.serve.stage_states import Snapshot

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0]


class Measures:
    """Metrics of one replica. The tag `adapter` is `base` for the base alone."""

    def __init__(self) -> None:
        self._requests = Counter(
            "finlora_http_requests_total", "HTTP requests answered, by path and status.", ("path", "status")
        )
        self._request_seconds = Histogram(
            "finlora_http_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            _SECONDS,
            ("path",),
        )
        self._answers = Counter(
            "finlora_answers_total", "Answers of the model, by how they ended.", ("adapter", "outcome")
        )
        self._prompt_tokens = Counter("finlora_prompt_tokens_total", "Prompt tokens.", ("adapter",))
        self._cached_tokens = Counter(
            "finlora_cached_tokens_total", "Prompt tokens that were in the prefix cache.", ("adapter",)
        )
        self._new_tokens = Counter("finlora_new_tokens_total", "Generated tokens.", ("adapter",))
        self._first = Histogram(
            "finlora_time_to_first_token_seconds",
            "Seconds until the first text of an answer, or until the label.",
            _SECONDS,
            ("adapter",),
        )
        self._each = Histogram(
            "finlora_time_per_token_seconds",
            "Mean seconds between two tokens of an answer.",
            _TOKEN_SECONDS,
            ("adapter",),
        )
        self._queue = Gauge("finlora_requests_waiting", "Requests in the queue.")
        self._active = Gauge("finlora_requests_active", "Requests in flight.")
        self._cache_used = Gauge("finlora_kv_cache_rows_used", "KV cache positions held by requests in flight.")
        self._cache_total = Gauge("finlora_kv_cache_rows", "KV cache positions in all.")
        self._busy = Gauge(
            "finlora_stage_busy_ratio",
            "Share of the last half second in which a stage computed; 0 when idle.",
            ("stage",),
        )
        self._bubble = Gauge(
            "finlora_pipeline_bubble_ratio",
            "Share of the last half second in which stages waited although there was work; 0 when idle.",
        )
        self._ready = Gauge("finlora_ready", "1 while all stages run, else 0.")
        self._losses = Gauge("finlora_stage_losses", "Crashes of stages since the start.")
        self._repairs = Gauge("finlora_stage_repairs", "Crashes after which only the crashed stages restarted.")
        self._recovery = Gauge(
            "finlora_stage_recovery_seconds", "Seconds from the last crash until all stages ran again."
        )
        self._adapters = Gauge("finlora_adapters_loaded", "Adapters in memory.")

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request."""
        self._requests.inc(tags={"path": path, "status": str(status)})
        self._request_seconds.observe(max(seconds, 1e-6), tags={"path": path})

    def count_answer(
        self,
        adapter: str,
        outcome: str,
        prompt_tokens: int,
        cached_tokens: int,
        new_tokens: int,
        first_s: float | None,
        each_s: float | None,
    ) -> None:
        """Count an answer of the model. Ray's counters refuse an increment of 0."""
        tags = {"adapter": adapter}
        self._answers.inc(tags={**tags, "outcome": outcome})
        for counter, count in (
            (self._prompt_tokens, prompt_tokens),
            (self._cached_tokens, cached_tokens),
            (self._new_tokens, new_tokens),
        ):
            if count:
                counter.inc(count, tags=tags)
        for histogram, seconds in ((self._first, first_s), (self._each, each_s)):
            if seconds is not None:
                histogram.observe(max(seconds, 1e-6), tags=tags)

    def show(self, snapshot: Snapshot, *, is_ready: bool) -> None:
        """Set the gauges."""
        self._queue.set(snapshot.queue)
        self._active.set(snapshot.active)
        self._cache_used.set(snapshot.kv_used)
        self._cache_total.set(snapshot.kv_total)
        self._bubble.set(snapshot.bubble)
        self._ready.set(float(is_ready))
        self._losses.set(snapshot.num_losses)
        self._repairs.set(snapshot.num_repairs)
        self._adapters.set(len(snapshot.adapters))
        if snapshot.recovery_s is not None:
            self._recovery.set(snapshot.recovery_s)
        for stage, busy in enumerate(snapshot.busy):
            self._busy.set(busy, tags={"stage": str(stage)})
