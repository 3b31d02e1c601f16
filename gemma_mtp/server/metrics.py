"""What /metrics tells Prometheus, with vLLM's names after the colon."""

import time
from collections.abc import AsyncGenerator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gemma_mtp.async_engine import AsyncEngine, AsyncStream
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.generation import Piece

_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
    def __init__(self, engine: AsyncEngine):
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gemma_mtp:{name}", text, labels, registry=self._registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"gemma_mtp:{name}", text, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gemma_mtp:{name}", text, buckets=buckets, registry=self._registry)

        gauge("num_requests_running", "Sequences in the passes.").set_function(lambda: engine.running)
        gauge("num_requests_waiting", "Sequences that wait for a place.").set_function(lambda: engine.waiting)
        gauge("kv_cache_usage_perc", "Share of the KV cache's memory that requests hold, 1 being all.").set_function(
            lambda: engine.memory.held / engine.memory.limit if engine.memory.limit else 0.0
        )
        gauge("kv_cache_bytes", "Bytes of the KV cache, cached prefixes included.").set_function(
            lambda: engine.memory.allocated
        )
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.")
        self._hits = counter("prefix_cache_hits", "Those of them that were there.")
        self._preemptions = counter("num_preemptions", "How often a sequence gave its memory up and resumed later.")
        self._requests = counter("request_success", "Sequences that ended, by why.", "finished_reason")
        self._failed = counter("request_failed", "Sequences that ended in an error of the server's.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._tokens = counter("generation_tokens", "Tokens generated.")
        self._drafts = counter("spec_decode_num_drafts", "Rounds that drafted.")
        self._drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were kept.")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens kept, by place in the draft.", "position"
        )
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token.", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "From token to token, even within a round.", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end.", _WHOLE)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    async def watch(self, stream: AsyncStream) -> AsyncGenerator[list[Piece], None]:
        """The passes of a stream, counted. The stream is closed when this ends, however it does."""
        last = start = time.perf_counter()
        seen = 0
        self._prompt_tokens.inc(stream.generation.stats.prompt_tokens)
        try:
            while (pieces := await stream.next_pass()) is not None:
                now, count = time.perf_counter(), sum(len(piece.tokens) for piece in pieces)
                if count and not seen:
                    self._first.observe(now - start)
                for _ in range(count if seen else 0):
                    self._between.observe((now - last) / count)
                if count:
                    last, seen = now, seen + count
                    self._tokens.inc(count)
                yield pieces
        except Exception:
            self._failed.inc()
            raise
        except BaseException:  # the client went away, which closes this generator or cancels its task
            self._requests.labels("cancelled").inc()
            raise
        else:
            self._requests.labels(stream.generation.finish_reason).inc()
        finally:
            stream.close()
            self._whole.observe(time.perf_counter() - start)
            self._count_drafts(stream.generation.stats)
            self._count_cache(stream.generation.stats)

    def _count_cache(self, stats: Stats) -> None:
        self._queries.inc(stats.prompt_tokens)
        self._hits.inc(stats.cached_tokens)
        self._preemptions.inc(stats.preemptions)

    def _count_drafts(self, stats: Stats) -> None:
        self._drafts.inc(stats.tried_per_depth[0] if stats.tried_per_depth else 0)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        for position, accepted in enumerate(stats.accepted_per_depth):
            self._accepted_at.labels(str(position)).inc(accepted)
