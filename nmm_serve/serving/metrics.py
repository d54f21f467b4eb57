"""What the server counts, in Prometheus' format. Labels never come from clients."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from nmm_serve.serving.scheduler import Job, Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry for one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nmm_requests", "Answers that have ended, by outcome.", ["outcome"], registry=self.registry
        )
        for outcome in ("success", "error", "aborted"):
            self.requests.labels(outcome)
        self.rejected = Counter("nmm_rejected", "Requests turned away since the line was full.", registry=self.registry)
        self.prompt_tokens = Counter("nmm_prompt_tokens", "Prompt tokens computed.", registry=self.registry)
        self.new_tokens = Counter("nmm_generation_tokens", "New tokens.", registry=self.registry)
        self.running = Gauge("nmm_requests_running", "Answers in the making.", registry=self.registry)
        self.waiting = Gauge("nmm_requests_waiting", "Answers waiting for a slot.", registry=self.registry)
        self.limit = Gauge("nmm_requests_limit", "Answers in the making at most.", registry=self.registry)
        self.ttft = Histogram("nmm_time_to_first_token_seconds", "From arrival to the first token.", buckets=SECONDS,
                              registry=self.registry)  # fmt: skip
        self.e2e = Histogram("nmm_request_seconds", "From arrival to the last token.", buckets=SECONDS,
                             registry=self.registry)  # fmt: skip

    def watch(self, scheduler: Scheduler) -> None:
        self.running.set_function(lambda: len(scheduler.running) + (scheduler.arriving is not None))
        self.limit.set(scheduler.runtime.slots)
        self.waiting.set_function(lambda: len(scheduler.waiting))

    def ended(self, job: Job) -> None:
        self.requests.labels(job.outcome).inc()
        self.prompt_tokens.inc(job.done)
        self.new_tokens.inc(len(job.decoding.tokens))
        if job.decoding.token_s:
            self.ttft.observe(job.decoding.token_s[0])
        if job.outcome == "success":
            self.e2e.observe(time.perf_counter() - job.submitted)

    def page(self) -> bytes:
        return generate_latest(self.registry)
