"""Faults on demand, at start and at run time, and what the real client makes of them."""

from __future__ import annotations

import http.client

import pytest

from hubsae.localhub import Fault, LocalHubError

PUSH = "from huggingface_hub import HfApi\napi = HfApi()\napi.create_repo('x', exist_ok=True)\n"


def test_a_status_for_the_next_requests_only(local_hub, raw_for):
    raw = raw_for(local_hub)
    raw.create()
    local_hub.inject_fault(r"/tree/main", method="GET", status=429, count=2, rate_limit=1)
    answers = [raw("GET", "/api/models/local/x/tree/main") for _ in range(3)]
    assert [a.status for a in answers] == [429, 429, 200]
    assert answers[0].headers["ratelimit"] == '"api";r=0;t=1'
    assert raw("GET", "/api/models/local/x").status == 200


def test_lines_are_cut_before_or_after_the_work(local_hub, raw_for):
    raw = raw_for(local_hub)
    raw.create()
    local_hub.inject_fault("/commit/", drop="before")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        raw.commit({"a": b"1"})
    assert len(raw("GET", "/api/models/local/x/commits/main").json) == 1
    local_hub.inject_fault("/commit/", drop="after")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        raw.commit({"a": b"1"})
    assert len(raw("GET", "/api/models/local/x/commits/main").json) == 2, "the work was done"
    local_hub.inject_fault("/commit/", drop="after", lost_status=504)
    assert raw.commit({"b": b"1"}).status == 504
    assert len(raw("GET", "/api/models/local/x/commits/main").json) == 3


def test_faults_can_be_there_from_the_start(local_hub_factory, raw_for):
    raw = raw_for(local_hub_factory(faults=(Fault("/api/whoami", status=503, count=2),)))
    assert [raw("GET", "/api/whoami-v2").status for _ in range(3)] == [503, 503, 200]


def test_skip_lets_some_through_and_clear_ends_it(local_hub, raw_for):
    raw = raw_for(local_hub)
    local_hub.inject_fault("/api/whoami", status=503, skip=2, count=None)
    assert [raw("GET", "/api/whoami-v2").status for _ in range(4)] == [200, 200, 503, 503]
    local_hub.clear_faults()
    assert raw("GET", "/api/whoami-v2").status == 200


def test_faults_at_run_time_need_the_admin_token(local_hub, raw_for):
    raw = raw_for(local_hub)
    rule = {"path": "/api/whoami", "status": 503}
    assert raw("POST", "/_local/faults", rule).status == 403
    admin = local_hub.hub.admin_token
    assert raw("POST", "/_local/faults", rule, token=admin).status == 200
    assert raw("GET", "/api/whoami-v2").status == 503
    assert raw("POST", "/_local/faults", {"path": "(", "status": 503}, token=admin).status == 400
    assert raw("POST", "/_local/faults", {"nonsense": 1}, token=admin).status == 400
    assert raw("DELETE", "/_local/faults", token=admin).status == 200
    assert raw("GET", "/_local/faults", token=admin).json == []


def test_the_client_repeats_what_it_can_and_raises_what_it_cannot(local_hub, script):
    local_hub.inject_fault("/preupload/", status=503)
    local_hub.inject_fault("/v1/xorbs/", status=503)
    script(
        local_hub,
        PUSH
        + "open('w.bin','wb').write(b'w' * 99999)\n"
        + "api.upload_file(path_or_fileobj='w.bin', path_in_repo='w.bin', repo_id='local/x')",
    )
    local_hub.inject_fault("/commit/", status=503)
    out = script(
        local_hub,
        PUSH + "try:\n    api.upload_file(path_or_fileobj=b'1', path_in_repo='a.txt', repo_id='local/x')\n"
        "except Exception as e:\n    print(type(e).__name__, e.response.status_code)",
    )
    assert out.split() == ["HfHubHTTPError", "503"]


@pytest.mark.parametrize("text", ["", "GET", "GET:/x", "GET:/x:9999", "GET:(:503", "GET:/x:maybe"])
def test_rules_that_make_no_sense_are_refused(text):
    with pytest.raises(LocalHubError):
        Fault.parse(text)
