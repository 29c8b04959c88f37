"""Counting requests, tokens and seconds, and writing them in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # upper ends, seconds
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values up to each end of BUCKETS, and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for end, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{end}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """The measurements of a server. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._seconds, self._first = Histogram(), Histogram()
        self._in_flight = self._waiting = self._batches = self._batched = self._reused = 0

    def began(self) -> None:
        """A request was accepted."""
        with self._lock:
            self._in_flight += 1

    def ended(self) -> None:
        """An accepted request is over."""
        with self._lock:
            self._in_flight -= 1

    def answered(
        self, path: str, status: int, seconds: float | None, first: float | None, prompt: int = 0, completion: int = 0
    ) -> None:
        """A request got an answer. seconds, first: until its end and until its first byte, of those that generated text."""
        with self._lock:
            self._requests[path, status] += 1
            self._tokens["prompt"] += prompt
            self._tokens["completion"] += completion
            if seconds is not None:
                self._seconds.add(seconds)
            if first is not None:
                self._first.add(first)

    def waiting(self, count: int) -> None:
        """So many requests wait for others to end."""
        with self._lock:
            self._waiting = count

    def reused(self, tokens: int) -> None:
        """So many tokens of prompts were not read again."""
        with self._lock:
            self._reused += tokens

    def batch(self, size: int) -> None:
        """So many requests have begun together."""
        with self._lock:
            self._batches += 1
            self._batched += size

    def text(self) -> str:
        """All measurements."""
        with self._lock:
            return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from _about("requests_total", "counter", "Requests by path and status.")
        for (path, status), count in sorted(self._requests.items()):
            yield f'halfplate_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _about("tokens_total", "counter", "Tokens of prompts and of answers.")
        for kind in ("prompt", "completion"):
            yield f'halfplate_tokens_total{{kind="{kind}"}} {self._tokens[kind]}'
        yield from _about("request_seconds", "histogram", "Seconds until the end of an answer.")
        yield from self._seconds.lines("halfplate_request_seconds")
        yield from _about("first_byte_seconds", "histogram", "Seconds until the first text of an answer.")
        yield from self._first.lines("halfplate_first_byte_seconds")
        yield from _about("requests_in_flight", "gauge", "Requests that run or wait.")
        yield f"halfplate_requests_in_flight {self._in_flight}"
        yield from _about("requests_waiting", "gauge", "Requests that wait for others to end.")
        yield f"halfplate_requests_waiting {self._waiting}"
        yield from _about("batches_total", "counter", "Groups of requests that began together.")
        yield f"halfplate_batches_total {self._batches}"
        yield from _about("batched_requests_total", "counter", "Requests of these groups.")
        yield f"halfplate_batched_requests_total {self._batched}"
        yield from _about("reused_prompt_tokens_total", "counter", "Tokens of prompts that were not read again.")
        yield f"halfplate_reused_prompt_tokens_total {self._reused}"


def _about(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP halfplate_{name} {text}"
    yield f"# TYPE halfplate_{name} {kind}"
