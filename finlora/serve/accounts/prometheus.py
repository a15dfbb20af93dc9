"""Prometheus metrics of a server, in Ray's metrics endpoint beside Ray Serve's own; named by Prometheus' conventions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from finlora.evaluate.reference import Reference
from finlora.serve.accounts.label_monitor import Watched, WindowFigures
from finlora.serve.stage_states import Snapshot

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0]
_PROBABILITIES = [round(0.05 * number, 2) for number in range(1, 21)]


class Measures:
    """Metrics of one replica. The tag `adapter` is `base` for the base alone, `version` empty for an adapter without versions."""

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
        self._labels = Counter(
            "finlora_labels_total",
            "Labelled texts by their most probable label, also where it is below the threshold.",
            ("adapter", "version", "task", "label"),
        )
        self._label_abstentions = Counter(
            "finlora_label_abstentions_total",
            "Labelled texts whose most probable label is below the threshold of the request.",
            ("adapter", "version", "task"),
        )
        self._label_top = Histogram(
            "finlora_label_top_probability",
            "Probability of the most probable label.",
            _PROBABILITIES,
            ("adapter", "version", "task"),
        )
        self._label_calibrated = Counter(
            "finlora_label_calibrated_probability_total",
            "Sum of the calibrated probabilities of the most probable labels. Divided by the labelled texts it is the estimated "
            "accuracy. Only with a reference.",
            ("adapter", "version", "task"),
        )
        self._label_window = Gauge(
            "finlora_label_window_answers",
            "Labelled texts in the window, the last 1,000 of a process.",
            ("adapter", "version", "task"),
        )
        self._label_abstention = Gauge(
            "finlora_label_abstention_ratio",
            "Share of the window below the threshold of the request.",
            ("adapter", "version", "task"),
        )
        self._label_tested_abstention = Gauge(
            "finlora_label_tested_abstention_ratio",
            "Share that the thresholds of the window give on the test split.",
            ("adapter", "version", "task"),
        )
        self._label_estimated = Gauge(
            "finlora_label_estimated_accuracy",
            "Estimate of the accuracy: mean calibrated probability of the most probable label in the window.",
            ("adapter", "version", "task"),
        )
        self._label_psi = Gauge(
            "finlora_label_psi",
            "Population stability index of the labels in the window against those answered on the test split.",
            ("adapter", "version", "task"),
        )
        self._label_psi_by_chance = Gauge(
            "finlora_label_psi_by_chance",
            "Index that chance alone exceeds in 1 of 100 windows of this size.",
            ("adapter", "version", "task"),
        )
        self._label_reference = Gauge(
            "finlora_label_reference_answers",
            "Test answers in the adapter's reference; 0: it has none, and the metrics that need one are absent.",
            ("adapter", "version", "task"),
        )
        self._label_tested_accuracy = Gauge(
            "finlora_label_tested_accuracy",
            "Accuracy on the test split, of the reference.",
            ("adapter", "version", "task"),
        )
        self._label_tested = Gauge(
            "finlora_label_tested_ratio",
            "Share of the label among the answers on the test split, of the reference.",
            ("adapter", "version", "task", "label"),
        )
        self._held: dict[Gauge, set[tuple[str, ...]]] = {}

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

    def count_label(
        self, watched: Watched, label: str, probability: float, calibrated: float | None, *, is_abstained: bool
    ) -> None:
        """Count a labelled text."""
        tags = watched._asdict()
        self._labels.inc(tags={**tags, "label": label})
        self._label_top.observe(min(probability, 1.0), tags=tags)
        if is_abstained:
            self._label_abstentions.inc(tags=tags)
        if calibrated:
            self._label_calibrated.inc(calibrated, tags=tags)

    def show_reference(self, watched: Watched, reference: Reference | None, shares: Mapping[str, float]) -> None:
        """Set the gauges of a reference; None: there is none."""
        tags = watched._asdict()
        self._label_reference.set(reference.num_answers if reference else 0, tags=tags)
        self._set_or_end(self._label_tested_accuracy, tags, reference.accuracy if reference else None)
        for label in {*shares, *(each[-1] for each in self._held.get(self._label_tested, ()) if each[:-1] == watched)}:
            self._set_or_end(self._label_tested, {**tags, "label": label}, shares.get(label))

    def show_window(self, watched: Watched, figures: WindowFigures) -> None:
        """Set the gauges of a window."""
        tags = watched._asdict()
        self._label_window.set(figures.num_answers, tags=tags)
        for gauge, value in (
            (self._label_abstention, figures.abstention),
            (self._label_tested_abstention, figures.tested_abstention),
            (self._label_estimated, figures.estimated_accuracy),
            (self._label_psi, figures.stability_index),
            (self._label_psi_by_chance, figures.chance_index),
        ):
            self._set_or_end(gauge, tags, value)

    def _set_or_end(self, gauge: Gauge, tags: dict[str, str], value: float | None) -> None:
        """Set a gauge. None: one that was never set stays absent, one that was set becomes NaN, since Ray cannot take it back."""
        held = self._held.setdefault(gauge, set())
        key = tuple(tags.values())
        if value is not None:
            held.add(key)
            gauge.set(value, tags=tags)
        elif key in held:
            held.remove(key)
            gauge.set(math.nan, tags=tags)
