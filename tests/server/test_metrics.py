"""What /metrics and /stats say follows what was asked."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.server.live import LiveServer


def samples(server: LiveServer) -> dict[str, float]:
    text = httpx.get(server.url + "/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "le")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_counters_follow_requests(server: LiveServer) -> None:
    server.wait_idle()
    before = samples(server)
    body = {"prompt": "The serval " * 12, "max_tokens": 7, "ignore_eos": True, "n": 2}
    for _ in range(2):
        usage = httpx.post(server.url + "/v1/completions", json=body).json()["usage"]
    httpx.post(server.url + "/v1/completions", json={"prompt": ""})
    httpx.get(server.url + "/nothing")
    after = samples(server)

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert gained("serval_generation_tokens_total") == 2 * usage["completion_tokens"] == 28
    assert gained("serval_prompt_tokens_total") == 2 * usage["prompt_tokens"]
    assert gained("serval_sequences_finished_total{reason=length}") == 4
    assert gained("serval_http_requests_total{route=/v1/completions,status=200}") == 2
    assert gained("serval_http_requests_total{route=/v1/completions,status=400}") == 1
    assert gained("serval_http_requests_total{route=unmatched,status=404}") == 1
    assert gained("serval_time_to_first_token_seconds_count") == 4
    # Tokens that piled up while the loop was busy arrive as one event, with one latency.
    assert 4 <= gained("serval_inter_token_latency_seconds_count") <= 24
    assert gained("serval_request_duration_seconds_count") == 2
    assert gained("serval_prefix_cache_hit_tokens_total") >= 32
    assert gained("serval_prefix_cache_query_tokens_total") == 2 * usage["prompt_tokens"]
    assert after["serval_requests_running"] == after["serval_requests_waiting"] == 0
    assert after["serval_cache_usage_ratio"] == 0
    assert "serval_preemptions_total" in after


def test_stats(server: LiveServer) -> None:
    stats = httpx.get(server.url + "/stats").json()
    assert stats["model"] == "tiny"
    assert stats["max_model_len"] == 256
    assert stats["cache_bytes"] > 0
