"""Where a cloud tells a machine that it is about to be taken away: one class a cloud, in NOTICES.

Each source asks the metadata server of its own machine (plain HTTP on a link-local address) and answers a `Notice` or
None. What is asked and how long the notice is, by the clouds' own manuals:

    ec2    `spot/instance-action`: two minutes before an instance is stopped or terminated; hibernation begins at once
    gcp    `instance/preempted`: 30 seconds; `instance/maintenance-event`: 60 seconds, more on GPU machines
    azure  `scheduledevents`: at least 30 seconds for Preempt, 5 to 15 minutes for the others
"""

from __future__ import annotations

import json
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sceneray.errors import ScenerayError

LINK_LOCAL = "http://169.254.169.254"  # the same on all three clouds
TIMEOUT_S = 2.0  # for each step of a request, and for its whole body
MOST_BYTES = 64 * 1024
TOKEN_TTL_S = 21600  # the longest that EC2 gives
EC2_ACTIONS = ("terminate", "stop", "hibernate")
GCP_PREEMPTED_S = 30.0
GCP_MAINTENANCE_S = 60.0
# Azure announces repairs days ahead, and sometimes takes them back: further away than this is no reason to leave.
AZURE_HORIZON_S = 900.0
# Freeze pauses a machine for seconds: nothing is lost.
AZURE_LEAVING = ("Preempt", "Terminate", "Redeploy", "Reboot")
GCP_HEADERS = {"Metadata-Flavor": "Google"}
AZURE_HEADERS = {"Metadata": "true"}
MEANINGS = {
    401: "the token was refused",
    403: "metadata is switched off, or not allowed from here",
    404: "no such item, so another cloud or an older metadata service",
}


class MetadataError(ScenerayError):
    """A metadata server did not answer as it should; it may the next time."""


class NoMetadataServerError(MetadataError):
    """Nothing listens there: this is no machine of a cloud, or its metadata service is switched off."""


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away at `deadline` (unix seconds; None: not said). `kind` is the cloud's word."""

    kind: str
    deadline: float | None
    text: str


@dataclass(frozen=True)
class Answer:
    """What a metadata server answered; names of headers are without case."""

    status: int
    text: str
    headers: Mapping[str, str]


class Source(ABC):
    """The notices of one cloud. `every` is how many seconds to wait between two questions.

    The server is asked without proxy, redirect or long wait, and a long answer is not read.
    """

    every: float

    def __init__(self, url: str = LINK_LOCAL) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(
            timeout=TIMEOUT_S,
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_keepalive_connections=0),  # one that idles between polls may be half-closed
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # plain HTTP: certificates would be memory for nothing
        )

    @abstractmethod
    def identify(self) -> None:
        """Return where the metadata server is this cloud's. Raises MetadataError where it is not, or does not say."""

    @abstractmethod
    def notice(self) -> Notice | None:
        """The notice that stands, None where there is none. Raises MetadataError where that is not known."""

    def hint(self) -> Notice | None:
        """A weaker and earlier sign that this machine may be taken, where the cloud gives one."""
        return None

    def ask(
        self, path: str, headers: Mapping[str, str], *, method: str = "GET", accept: tuple[int, ...] = (200,)
    ) -> Answer:
        """One request. Raises NoMetadataServerError where nothing listens, MetadataError for any other fault.

        A status that is not in `accept` is a fault.
        """
        what = f"{method} {self.url}{path}"
        try:
            headers = {"Accept-Encoding": "identity", **headers}
            with self._client.stream(method, self.url + path, headers=headers) as response:
                if response.status_code not in accept:
                    meaning = MEANINGS.get(response.status_code, "an answer of no use")
                    raise MetadataError(f"{what} answered {response.status_code}: {meaning}.")
                return Answer(response.status_code, _read(response, what), response.headers)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NoMetadataServerError(
                f"no metadata server answers at {self.url} ({error or 'timed out'}). Is this a machine of that cloud, "
                "and its metadata service on?"
            ) from error
        except httpx.HTTPError as error:
            raise MetadataError(
                f"{what} failed: {error or type(error).__name__}. In a container with a network of its own, the "
                "machine's hop limit for metadata must be 2."
            ) from error


class Ec2(Source):
    """Amazon EC2, by IMDSv2 alone: each question carries a token, renewed before it ends and where it is refused."""

    every = 5.0

    def __init__(self, url: str = LINK_LOCAL, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(url)
        self._clock = clock
        self._token = ""
        self._renew_at = 0.0

    def identify(self) -> None:
        """Only EC2 gives such a token."""
        self._renew()

    def notice(self) -> Notice | None:
        """What `spot/instance-action` says; it is not there before an interruption."""
        path = "/latest/meta-data/spot/instance-action"
        found = self._json(path)
        if found is None:
            return None
        action = str(found.get("action"))
        if action not in EC2_ACTIONS:
            raise MetadataError(
                f"GET {path} must hold one of {', '.join(EC2_ACTIONS)} as 'action', got {str(found)[:80]!r}."
            )
        return Notice(action, _unix(datetime.fromisoformat, found.get("time")), f"EC2 will {action} this spot instance")

    def hint(self) -> Notice | None:
        """The rebalance recommendation: a raised risk, without a time when."""
        if self._json("/latest/meta-data/events/recommendations/rebalance") is None:
            return None
        return Notice("rebalance", None, "EC2 recommends to leave this spot instance (raised risk of interruption)")

    def _json(self, path: str) -> dict[str, Any] | None:
        if not self._token or self._clock() >= self._renew_at:
            self._renew()
        answer = self._ask(path, accept=(200, 401, 404))
        if answer.status == 401:  # a token ends early where the machine was stopped meanwhile
            self._renew()
            answer = self._ask(path, accept=(200, 404))
        return None if answer.status == 404 else _object(answer.text, path)

    def _ask(self, path: str, accept: tuple[int, ...]) -> Answer:
        return self.ask(path, {"X-aws-ec2-metadata-token": self._token}, accept=accept)

    def _renew(self) -> None:
        asked_at = self._clock()
        path = "/latest/api/token"
        token = self.ask(path, {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}, method="PUT").text
        if not (token and token.isascii() and token.isprintable() and len(token) <= 1024):
            raise MetadataError(f"PUT {path} must answer a token in one line of ASCII, got {str(token)[:80]!r}.")
        self._token = token
        self._renew_at = asked_at + TOKEN_TTL_S * 0.9


class Gcp(Source):
    """Google Compute Engine: a word each for preemption and for maintenance that ends the machine."""

    every = 1.0

    def identify(self) -> None:
        """Google's server names its flavour in every answer."""
        path = "/computeMetadata/v1/instance/preempted"
        if self.ask(path, GCP_HEADERS).headers.get("metadata-flavor") != "Google":
            raise MetadataError(f"GET {path} answered without Google's Metadata-Flavor: another cloud.")

    def notice(self) -> Notice | None:
        """Preemption first, which leaves less time."""
        if self._word("preempted", ("TRUE", "FALSE")) == "TRUE":
            return Notice("preempted", time.time() + GCP_PREEMPTED_S, "Compute Engine preempts this machine")
        events = ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE")
        if self._word("maintenance-event", events) == events[2]:  # a migration is survived
            return Notice("maintenance", time.time() + GCP_MAINTENANCE_S, "Compute Engine ends this machine for repair")
        return None

    def _word(self, name: str, known: tuple[str, ...]) -> str:
        path = f"/computeMetadata/v1/instance/{name}"
        word = self.ask(path, GCP_HEADERS).text.strip()
        if word not in known:
            raise MetadataError(f"GET {path} must answer one of {', '.join(known)}, got {str(word)[:80]!r}.")
        return word


class Azure(Source):
    """Azure: scheduled events that name this machine. The first question switches them on and may take two minutes."""

    every = 1.0

    def __init__(self, url: str = LINK_LOCAL) -> None:
        super().__init__(url)
        self._name = ""

    def identify(self) -> None:
        """Only Azure names the machine there. The name is kept: it does not change while the machine runs."""
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        self._name = self.ask(path, AZURE_HEADERS).text.strip()
        if not self._name:
            raise MetadataError(f"GET {path} must answer the machine's name, and answered nothing.")

    def notice(self) -> Notice | None:
        """The first of this machine's events that end what runs on it, where it comes soon."""
        if not self._name:
            self.identify()
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        events = _object(self.ask(path, AZURE_HEADERS).text, path).get("Events")
        if not (isinstance(events, list) and all(isinstance(event, dict) for event in events)):
            raise MetadataError(f"GET {path} must answer a list of Events, got {str(events)[:80]!r}.")
        leaving = [self._of(event) for event in events if self._is_leaving(event)]
        now = time.time()
        soon = [notice for notice in leaving if (notice.deadline or now) <= now + AZURE_HORIZON_S]
        return min(soon, key=lambda notice: notice.deadline or now, default=None)

    def _is_leaving(self, event: dict[str, Any]) -> bool:
        machines = event.get("Resources")
        return isinstance(machines, list) and self._name in machines and event.get("EventType") in AZURE_LEAVING

    def _of(self, event: dict[str, Any]) -> Notice:
        kind = str(event["EventType"]).lower()
        started = event.get("EventStatus") == "Started"  # it has no NotBefore any more
        deadline = time.time() if started else _unix(parsedate_to_datetime, event.get("NotBefore"))
        return Notice(kind, deadline, f"Azure has scheduled {kind} for this machine")


NOTICES: dict[str, type[Source]] = {"ec2": Ec2, "gcp": Gcp, "azure": Azure}


def detect(url: str = LINK_LOCAL) -> str:
    """The name of the cloud whose metadata server answers at `url`. Raises MetadataError where it is none of them."""
    refusals = []
    for name, source in NOTICES.items():
        try:
            source(url).identify()
            return name
        except NoMetadataServerError:  # nor for the others
            raise
        except MetadataError as error:
            refusals.append(f"{name}: {error}")
    raise MetadataError(
        f"the metadata server at {url} is of none of the known clouds ({', '.join(NOTICES)}). Name one with --cloud "
        f"where it should be. {' '.join(refusals)}"
    )


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise MetadataError(f"{what} must answer a JSON object, got {str(text)[:80]!r}.") from error


def _read(response: httpx.Response, what: str) -> str:
    """The body as text. Raises MetadataError where it is long, or drips."""
    until = time.monotonic() + TIMEOUT_S
    body = b""
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MOST_BYTES:
            raise MetadataError(f"{what} must answer at most {MOST_BYTES} bytes, and goes on.")
        if time.monotonic() > until:
            raise MetadataError(f"{what} took more than {TIMEOUT_S:g} s to answer.")
    return body.decode("utf-8", errors="replace")


def _unix(parse: Callable[[str], datetime], value: object) -> float | None:
    """Unix seconds of a time, UTC where it names no zone. None where it is no time: the notice is worth more."""
    try:
        when = parse(str(value))
    except (ValueError, OverflowError):
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
