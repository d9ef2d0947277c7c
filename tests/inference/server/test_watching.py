"""Metrics, the page's files, and the live facts."""

import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.inference.server.servers import KEY, ended, until

HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served.url, headers=HEADERS, timeout=30) as http:
        yield http


def metrics(http):
    """Values of all samples without labels, and the rest by name and label."""
    samples = [s for family in text_string_to_metric_families(http.get("/metrics").text) for s in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_metrics_are_the_engine_s_figures(served, client, http):
    served.engine.drop_kept_prefixes()
    before, others = metrics(http), ended(served.engine)
    asked = {"model": "small", "prompt": "import os\n", "temperature": 0, "max_tokens": 30, "n": 2}
    client.completions.create(extra_body={"ignore_eos": True}, **asked)
    client.chat.completions.create(model="small", messages=[{"role": "user", "content": "x"}], max_tokens=3)
    until(lambda: ended(served.engine) == others + 3)
    after, stats = metrics(http), served.engine.stats()
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    assert 60 < grown[("kvtrain_generated_tokens_total",)] <= 63
    new = grown[("kvtrain_generated_tokens_total",)]
    assert grown[("kvtrain_time_to_first_token_seconds_count",)] == 3
    assert grown[("kvtrain_inter_token_seconds_count",)] == new - 3
    assert 0 < grown[("kvtrain_inter_token_seconds_sum",)] < 60
    assert grown[("kvtrain_finished_sequences_total", "length")] >= 2
    held, budget = after[("kvtrain_kv_held_bytes",)], after[("kvtrain_kv_budget_bytes",)]
    assert (held, budget) == (stats.held_bytes, stats.budget_bytes) and held > 0
    assert after[("kvtrain_kv_free_bytes",)] == budget - held
    assert after[("kvtrain_running_sequences",)] == after[("kvtrain_queued_sequences",)] == 0
    assert after[("kvtrain_up",)] == 1 and after[("kvtrain_tokens_per_second",)] == 0
    assert after[("kvtrain_kv_compression",)] == 1 and ("kvtrain_preemptions_total",) in after
    assert after[("kvtrain_compilations_total",)] == stats.compilations == 0


def test_the_page_is_three_files_of_our_own_under_a_strict_policy(http):
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for path in ("/", "/page.js", "/page.css"):
        reply = http.get(path)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in reply.text
    assert "<script" in page.text and "onclick" not in page.text and "style=" not in page.text
    script = http.get("/page.js").text
    assert not any(
        word in script for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
    )
    assert http.get("/page.json").json() == {"model": "small", "chat": True}


def test_live_facts_follow_a_request(served, http):
    body = {"model": "small", "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body), http.stream("GET", "/live") as live:
        assert live.headers["content-type"].startswith("text/event-stream")
        for line in live.iter_lines():
            facts = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if facts.get("seen_tokens", 0) > 20:
                break
    assert facts["ok"] and facts["running"] == 1 and facts["queued"] == 0
    assert facts["running_bytes"] == facts["held_bytes"] - facts["kept_bytes"] > 0
    assert facts["plain_bytes"] == facts["seen_tokens"] * 2 * 2 * 2 * 8 * 8
    assert [len(layer) for layer in facts["kept_share"]] == [2, 2]
    assert all(0 < share <= 1 for layer in facts["kept_share"] for share in layer)


def test_the_description_of_the_routes_is_complete(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions", "/health"}
    responses = paths["/v1/completions"]["post"]["responses"]
    assert {"200", "4XX", "5XX"} == set(responses)
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
