"""Each cloud's interruption notice, read from a real HTTP server that answers as that cloud's manual says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest

from jobs import notices
from jobs.notices import NOTICES, Azure, Ec2, Gcp, MetadataError, NoMetadataServerError, Notice, detect
from tests.metadata import EC2_ACTION, EC2_REBALANCE, FakeAzure, FakeEc2, FakeGcp, Reply, always, serving
from tests.support import free_port

SOON = float(int(time.time()) + 100)
FAKES = {"ec2": FakeEc2, "gcp": FakeGcp, "azure": FakeAzure}


def azure_event(kind: str, machines: object, seconds: float, status: str = "Scheduled") -> dict[str, object]:
    """One scheduled event, `seconds` from now."""
    when = format_datetime(datetime.fromtimestamp(time.time() + seconds, UTC), usegmt=True)
    not_before = "" if status == "Started" else when
    return {"EventId": "1", "EventType": kind, "Resources": machines, "EventStatus": status, "NotBefore": not_before}


@pytest.mark.parametrize("name", list(NOTICES))
def test_most_of_the_time_there_is_no_notice(name):
    """A machine that nobody wants back has neither notice nor hint, on every cloud."""
    with serving(FAKES[name]()) as url:
        source = NOTICES[name](url)
        source.identify()
        assert (source.notice(), source.hint()) == (None, None)


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_ec2_says_what_and_when(action):
    """EC2's notice has its action and the exact time; a token was asked for first."""
    cloud = FakeEc2()
    cloud.announce(SOON, action)
    with serving(cloud) as url:
        assert Ec2(url).notice() == Notice(action, SOON, f"EC2 will {action} this spot instance")
    assert len(cloud.tokens) == 1


def test_an_ec2_notice_without_a_readable_time_is_still_a_notice():
    """A time that cannot be read loses the deadline, not the notice."""
    cloud = FakeEc2({EC2_ACTION: '{"action": "terminate", "time": "soon"}'})
    with serving(cloud) as url:
        notice = Ec2(url).notice()
    assert notice is not None
    assert (notice.kind, notice.deadline) == ("terminate", None)


def test_an_ec2_token_is_used_again_and_renewed_before_it_ends():
    """One token serves many questions; when most of its time is over a new one is asked for, unprompted."""
    now = [0.0]
    cloud = FakeEc2()
    with serving(cloud) as url:
        source = Ec2(url, clock=lambda: now[0])
        for _ in range(3):
            source.notice()
        assert len(cloud.tokens) == 1
        now[0] = notices.TOKEN_TTL_S - 60.0
        assert source.notice() is None
    assert len(cloud.tokens) == 2


def test_an_ec2_token_that_ended_early_is_renewed():
    """Where the server refuses a token that should be good, a new one is asked for and the question repeated."""
    cloud = FakeEc2()
    with serving(cloud) as url:
        source = Ec2(url)
        source.notice()
        cloud.valid.clear()
        cloud.announce(SOON)
        notice = source.notice()
    assert notice is not None
    assert len(cloud.tokens) == 2


def test_ec2s_recommendation_is_a_hint_and_no_notice():
    """A rebalance recommendation does not count as an interruption."""
    cloud = FakeEc2({EC2_REBALANCE: '{"noticeTime": "2026-11-05T08:22:00Z"}'})
    with serving(cloud) as url:
        source = Ec2(url)
        hint = source.hint()
        assert source.notice() is None
    assert hint is not None
    assert (hint.kind, hint.deadline) == ("rebalance", None)


def test_ec2_refusals_say_why():
    """A token that is refused twice (401), and a service that is switched off (403), are faults with their meaning."""
    cloud = FakeEc2()
    with (
        serving(lambda m, p, h: cloud(m, p, h) if m == "PUT" else Reply(401)) as url,
        pytest.raises(MetadataError, match="answered 401: the token was refused"),
    ):
        Ec2(url).notice()
    assert len(cloud.tokens) == 2  # asked again once, not for ever
    with (
        serving(always(Reply(403))) as url,
        pytest.raises(MetadataError, match="answered 403: metadata is switched off, or not allowed from here"),
    ):
        Ec2(url).notice()


@pytest.mark.parametrize("text", ["", "<html>", "[]", "null", '{"action": 3}', '{"action": "dance"}', "[" * 60000])
def test_an_ec2_answer_that_makes_no_sense_is_a_fault(text):
    """What is no notice is neither taken for one nor for none."""
    with serving(FakeEc2({EC2_ACTION: text})) as url, pytest.raises(MetadataError, match="must"):
        Ec2(url).notice()


@pytest.mark.parametrize("token", [b"", b"a\nb", "tök".encode(), b"x" * 2000])
def test_an_ec2_token_that_is_none_is_a_fault(token):
    """A token that no header could carry is refused with a sentence."""
    with serving(always(Reply(body=token))) as url, pytest.raises(MetadataError, match="must answer a token"):
        Ec2(url).notice()


def test_gcp_preempts_with_30_seconds():
    """TRUE means that the machine ends within 30 seconds of now."""
    cloud = FakeGcp()
    cloud.items["preempted"] = "TRUE"
    with serving(cloud) as url:
        before = time.time()
        notice = Gcp(url).notice()
        after = time.time()
    assert notice is not None
    assert notice.kind == "preempted"
    assert notice.deadline is not None
    assert before + 30 <= notice.deadline <= after + 30


@pytest.mark.parametrize(
    ("event", "kind"), [("TERMINATE_ON_HOST_MAINTENANCE", "maintenance"), ("MIGRATE_ON_HOST_MAINTENANCE", None)]
)
def test_gcp_maintenance_counts_where_it_ends_the_machine(event, kind):
    """A machine that maintenance ends has a notice; one that is migrated goes on."""
    cloud = FakeGcp()
    cloud.items["maintenance-event"] = event
    with serving(cloud) as url:
        notice = Gcp(url).notice()
    assert (notice.kind if notice else None) == kind


@pytest.mark.parametrize(("name", "word"), [("preempted", "maybe"), ("maintenance-event", "")])
def test_a_gcp_answer_that_makes_no_sense_is_a_fault(name, word):
    """An unknown word is neither TRUE nor FALSE."""
    cloud = FakeGcp()
    cloud.items[name] = word
    with serving(cloud) as url, pytest.raises(MetadataError, match="must answer one of"):
        Gcp(url).notice()


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Redeploy", "Reboot"])
def test_azure_announces_this_machine(kind):
    """An event that names this machine and ends what runs on it is a notice with its time."""
    cloud = FakeAzure(events=[azure_event(kind, ["other", "spot-7"], 30)])
    with serving(cloud) as url:
        notice = Azure(url).notice()
    assert notice is not None
    assert notice.kind == kind.lower()
    assert notice.deadline is not None
    assert abs(notice.deadline - time.time()) <= 31


@pytest.mark.parametrize(
    "event",
    [
        azure_event("Preempt", ["spot-70"], 30),
        azure_event("Preempt", "spot-7", 30),
        azure_event("Preempt", None, 30),
        azure_event("Freeze", ["spot-7"], 30),
        azure_event("Redeploy", ["spot-7"], 3 * 86400),
    ],
    ids=["another machine", "no list", "no machine", "a pause", "in three days"],
)
def test_azure_events_that_are_no_reason_to_leave(event):
    """Events of others, pauses, and repairs that are days away are no notice."""
    with serving(FakeAzure(events=[event])) as url:
        assert Azure(url).notice() is None


def test_of_azures_events_the_first_counts():
    """With several events the earliest is the notice; one that has started is now."""
    later, first = azure_event("Reboot", ["spot-7"], 600), azure_event("Preempt", ["spot-7"], 0, status="Started")
    with serving(FakeAzure(events=[later, first])) as url:
        before = time.time()
        notice = Azure(url).notice()
        after = time.time()
    assert notice is not None
    assert notice.kind == "preempt"
    assert notice.deadline is not None
    assert before <= notice.deadline <= after


@pytest.mark.parametrize("text", ["", "[]", '{"Events": {}}', '{"Events": ["Preempt"]}', "{}"])
def test_an_azure_answer_that_makes_no_sense_is_a_fault(text):
    """What holds no list of events is a fault."""

    def respond(method, path, headers):
        return Reply(body=b"spot-7" if "compute/name" in path else text.encode())

    with serving(respond) as url, pytest.raises(MetadataError, match="must answer"):
        Azure(url).notice()


@pytest.mark.parametrize("name", list(NOTICES))
def test_each_cloud_is_known_by_its_server(name):
    """`detect` names the cloud whose server answers, and takes none for another."""
    with serving(FAKES[name]()) as url:
        assert detect(url) == name


def test_a_server_of_no_cloud_is_told_apart_from_none():
    """A server that is of no known cloud is refused with each cloud's reason; no server at all with that."""
    with serving(always(Reply(404))) as url:
        with pytest.raises(MetadataError, match=r"of none of the known clouds.*ec2: .*gcp: .*azure: ") as caught:
            detect(url)
        assert not isinstance(caught.value, NoMetadataServerError)
    with pytest.raises(NoMetadataServerError, match="no metadata server answers"):
        detect(f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("name", list(NOTICES))
@pytest.mark.parametrize("status", [302, 307, 429, 500, 503])
def test_a_server_in_trouble_is_a_fault_that_may_pass(name, status):
    """A status of no use is a MetadataError with the status; a redirect is not followed."""
    asked = []

    def respond(method, path, headers):
        asked.append(path)
        return Reply(status, headers={"Location": "/elsewhere"})

    with serving(respond) as url, pytest.raises(MetadataError, match=f"answered {status}") as caught:
        NOTICES[name](url).notice()
    assert not isinstance(caught.value, NoMetadataServerError)
    assert "/elsewhere" not in asked


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets a slow server go when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_a_slow_server_is_not_waited_for(release, monkeypatch):
    """A server that takes the question and says nothing ends in a fault, not in waiting."""
    monkeypatch.setattr(notices, "TIMEOUT_S", 0.2)

    def respond(method, path, headers):
        release.wait(60)
        return Reply(404)

    with serving(respond) as url:
        try:
            with pytest.raises(MetadataError, match=r"failed: .*hop limit"):
                Ec2(url).notice()
        finally:
            release.set()


def test_an_answer_that_drips_is_not_waited_for(release, monkeypatch):
    """A body that comes byte by byte, each in time, ends in a fault too."""
    monkeypatch.setattr(notices, "TIMEOUT_S", 0.3)

    def drip() -> Iterator[bytes]:
        while not release.wait(0.05):
            yield b"x"

    with serving(always(Reply(body=drip()))) as url:
        try:
            with pytest.raises(MetadataError, match=r"took more than 0\.3 s"):
                Gcp(url).notice()
        finally:
            release.set()


def test_a_huge_answer_is_not_read():
    """An answer without end is left after 64 KiB."""
    sent = [0]

    def flood() -> Iterator[bytes]:
        while sent[0] < 1000:
            sent[0] += 1
            yield b"x" * 65536

    with serving(always(Reply(body=flood()))) as url, pytest.raises(MetadataError, match="at most 65536 bytes"):
        Gcp(url).notice()
    assert sent[0] < 1000


def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    """Metadata is asked for directly, whatever proxy the environment names."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    cloud = FakeEc2()
    cloud.announce(SOON)
    with serving(cloud) as url:
        notice = Ec2(url).notice()
    assert notice is not None
    assert json.loads(cloud.items[EC2_ACTION])["action"] == notice.kind
