"""What Prometheus reads of a server."""

import httpx

from gemma_serve.errors import UnavailableError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
)
from gemma_serve.openai_api.metrics.exposition import Counter, Histogram, document
from gemma_serve.openai_api.metrics.measured_client import MeasuredClient
from gemma_serve.openai_api.metrics.server_metrics import ServerMetrics
from tests.fakes import FakeGenerationClient, answer, delta
from tests.openai_api.harness import CHAT, HELLO, connect, make_app


def test_counter_has_a_line_for_each_combination_of_labels() -> None:
    counter = Counter("requests_total", "Requests.")
    counter.add(status="200")
    counter.add(2, status="200")
    counter.add(status='a"b\\\n')
    assert document(counter.lines()) == (
        "# HELP requests_total Requests.\n"
        "# TYPE requests_total counter\n"
        'requests_total{status="200"} 3\n'
        'requests_total{status="a\\"b\\\\\\n"} 1\n'
    )


def test_histogram_counts_what_is_at_most_as_large_as_each_bound() -> None:
    histogram = Histogram("wait_seconds", "Waits.", (0.5, 1))
    for value in (0.25, 0.5, 0.75):
        histogram.observe(value)
    histogram.observe(7, times=2)
    assert document(histogram.lines()) == (
        "# HELP wait_seconds Waits.\n"
        "# TYPE wait_seconds histogram\n"
        'wait_seconds_bucket{le="0.5"} 2\n'
        'wait_seconds_bucket{le="1"} 3\n'
        'wait_seconds_bucket{le="+Inf"} 5\n'
        "wait_seconds_sum 15.5\n"
        "wait_seconds_count 5\n"
    )


def test_large_counts_are_exact() -> None:
    counter = Counter("tokens_total", "Tokens.")
    counter.add(10**15 + 1)
    assert document(counter.lines()).endswith("tokens_total 1000000000000001\n")


def samples(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("gemma_serve_"): float(value) for name, _, value in lines}


async def test_tokens_and_times_of_a_request_are_measured() -> None:
    times = iter([0.0, 0.2, 0.25, 0.35])
    script = [
        [delta("a"), delta("x", FinishReason.STOP, index=1)],
        [GenerationDelta(0, "b", (5,))],
        [GenerationDelta(0, "cd", (5, 5), FinishReason.LENGTH)],
    ]
    metrics = ServerMetrics()
    client = MeasuredClient(FakeGenerationClient(*script), metrics, lambda: next(times))
    request = GenerationRequest(
        request_id="r", prompt=TextPrompt("a"), sampling=SamplingParams(), n=2
    )
    async with await client.generate(request) as stream:
        assert [list(deltas) for deltas in [d async for d in stream]] == script
    told = samples(document(metrics.lines(None)))
    assert told["prompt_tokens_total"] == 7
    assert told["completion_tokens_total"] == 5
    assert told['finished_sequences_total{reason="stop"}'] == 1
    assert told['finished_sequences_total{reason="length"}'] == 1
    assert told["time_to_first_token_seconds_count"] == 1
    assert told['time_to_first_token_seconds_bucket{le="0.25"}'] == 1
    assert told["inter_token_latency_seconds_count"] == 3
    assert round(told["inter_token_latency_seconds_sum"], 6) == 0.15
    assert told["generation_duration_seconds_count"] == 1


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    response = await http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(response.text)


async def test_scrape_tells_requests_by_route_and_the_load_without_a_key() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")), api_keys=("sk-one",))
    async with connect(app) as http:
        key = {"authorization": "Bearer sk-one"}
        await http.post(CHAT, json=HELLO, headers=key)
        await http.post(CHAT, json=HELLO)
        await http.get("/v1/models/a/b", headers=key)
        await http.get("/nowhere", headers=key)
        told = await scrape(http)
    assert told[f'http_requests_total{{route="{CHAT}",status="200"}}'] == 1
    assert told['http_requests_total{route="/v1/models/{model_id:path}",status="404"}'] == 1
    assert told['http_requests_total{route="other",status="401"}'] == 1
    assert told['http_requests_total{route="other",status="404"}'] == 1
    assert (told["running_sequences"], told["waiting_sequences"]) == (2, 1)
    assert told["cache_usage_ratio"] == 0.25
    assert told["spec_decode_num_draft_tokens_total"] == 9
    assert told["spec_decode_num_accepted_tokens_total"] == 7
    assert told["completion_tokens_total"] == 2


async def test_scrape_works_while_the_model_loads() -> None:
    client = FakeGenerationClient(health_error=UnavailableError("Loading."))
    async with connect(make_app(client)) as http:
        assert "running_sequences" not in await scrape(http)
