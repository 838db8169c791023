"""Ask a running endpoint for masks, from Python. Needs neither torch nor Ray.

    with Client("http://127.0.0.1:8000", key=os.environ["SCENERAY_API_KEY"]) as client:
        result = client.segment("photo.jpg", classes=["road", "car"])
        for result in client.segment_many(paths):
            ...

An endpoint that is busy (429), away for a moment (503), dies over a request (a proxy's 500 or 502) or breaks the
connection is asked again, as long as the call's time lasts; whatever else it answers is final. To ask twice does no
harm: an image is segmented, nothing is kept.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal, overload

import httpx

from sceneray.client_messages import Model, Picture, Result, encoded, is_passing, json_of, plain, refusal, result
from sceneray.errors import ConfigError, DataError, ScenerayError, ServingError

__all__ = ["Client", "Model", "Picture", "Result"]

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
READY_TIMEOUT_S = 10.0


class Client:
    """A client of one endpoint. Threads may share it; close it, or use it as a context."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 60.0, attempts: int = 5) -> None:
        """`timeout_s`: the longest a call takes with all its attempts and the waits between them."""
        if timeout_s <= 0 or attempts < 1:
            raise ConfigError(
                f"timeout_s must be above 0 and attempts at least 1, got timeout_s={timeout_s} and attempts={attempts}."
            )
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("a key is printable ASCII; this one has other characters in it (a line end?).")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # As many connections as threads ask for.
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.Client(base_url=_base(url), headers=headers, timeout=timeout_s, limits=limits)
        self._timeout_s = timeout_s
        self._attempts = attempts

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def segment(self, image: Picture, classes: Sequence[str] | None = None, confidence: bool = False) -> Result:
        """The mask of one image; `classes` names the only ones wanted, None wants all.

        Raises DataError where the image cannot be read or the endpoint refuses it, ServingError where the endpoint
        refuses or fails otherwise, or does not answer in time.
        """
        started_at = time.monotonic()
        query: dict[str, Any] = {"format": "json", "include": "mask"}
        if classes is not None:
            if isinstance(classes, str) or not classes:
                raise ConfigError(f"classes must be a list of at least one class's name, got {classes!r}.")
            query["classes"] = list(classes)
        if confidence:
            query["confidence"] = "true"
        headers = {"Content-Type": "application/octet-stream"}
        answer = self._ask("POST", "/v1/segment", params=query, content=encoded(image), headers=headers)
        found = result(answer)
        return replace(found, times={**found.times, "call": time.monotonic() - started_at})

    @overload
    def segment_many(
        self,
        images: Iterable[Picture],
        parallel: int = 8,
        classes: Sequence[str] | None = None,
        confidence: bool = False,
        errors: Literal["raise"] = "raise",
    ) -> Iterator[Result]: ...

    @overload
    def segment_many(
        self,
        images: Iterable[Picture],
        parallel: int = 8,
        classes: Sequence[str] | None = None,
        confidence: bool = False,
        *,
        errors: Literal["return"],
    ) -> Iterator[Result | DataError]: ...

    def segment_many(
        self,
        images: Iterable[Picture],
        parallel: int = 8,
        classes: Sequence[str] | None = None,
        confidence: bool = False,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Result | DataError]:
        """The results of many images, in their order, `parallel` requests at a time.

        Images are taken as results are, so a generator of thousands is never in memory as a whole. With
        errors="return" an image that is refused has its DataError in its place; otherwise the first one is raised. What
        is not the image's fault is always raised, and ends the iteration.
        """
        if parallel < 1:
            raise ConfigError(f"parallel must be at least 1, got {parallel}.")
        return self._segment_many(images, parallel, classes, confidence, errors == "return")

    def model(self) -> dict[str, Any]:
        """The model that is served: name, version, digest, classes, metrics, input rule, as `GET /v1/model` says."""
        about = json_of(self._ask("GET", "/v1/model"))
        if not isinstance(about, dict):
            raise ServingError(f"{plain(self._http.base_url)} is no endpoint of sceneray: /v1/model is no JSON object.")
        return about

    def ready(self) -> bool:
        """Whether the model answers now; asked once. An endpoint that cannot be reached is not ready.

        Raises ServingError where something else answers at that address.
        """
        timeout_s = min(READY_TIMEOUT_S, self._timeout_s)
        try:
            answer = self._http.get("/v2/health/ready", timeout=timeout_s)
        except httpx.RequestError:
            return False
        if answer.status_code == 200 or is_passing(answer):
            return answer.status_code == 200
        raise refusal(answer)

    def _segment_many(
        self,
        images: Iterable[Picture],
        parallel: int,
        classes: Sequence[str] | None,
        confidence: bool,
        keep_errors: bool,
    ) -> Iterator[Result | DataError]:
        pool = ThreadPoolExecutor(parallel, thread_name_prefix="sceneray-client")
        waiting: deque[Future[Result]] = deque()
        try:
            for image in images:
                waiting.append(pool.submit(self.segment, image, classes, confidence))
                # As many again wait for a thread, so that none idles while the first is slow.
                if len(waiting) >= 2 * parallel:
                    yield _outcome(waiting.popleft(), keep_errors)
            while waiting:
                yield _outcome(waiting.popleft(), keep_errors)
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer to one request that is a success, asked for again while that may help and time is left."""
        gives_up_at = time.monotonic() + self._timeout_s
        for attempt in range(1, self._attempts + 1):
            asked: float | None = None
            try:
                answer = self._once(method, path, gives_up_at, request)
            except httpx.RequestError as error:
                last: ScenerayError = ServingError(
                    f"no answer from {plain(self._http.base_url)}: {_cause(error)}. Is an endpoint running there "
                    "(sceneray serve)?"
                )
                last.__cause__ = error
            else:
                if answer.is_success:
                    return answer
                last = refusal(answer)
                if not is_passing(answer):
                    break
                asked = _retry_after_s(answer.headers)
            wait_s = _wait_s(asked, attempt)
            if attempt == self._attempts or time.monotonic() + wait_s >= gives_up_at:
                break  # an answer after the deadline is none: to wait for it would only take longer to fail
            time.sleep(wait_s)
        raise last

    def _once(self, method: str, path: str, gives_up_at: float, request: Mapping[str, Any]) -> httpx.Response:
        """One attempt. Raises httpx.RequestError where no whole answer came in time."""
        left_s = max(0.001, gives_up_at - time.monotonic())
        # The endpoint is told as well: what nobody waits for is not computed.
        headers = {**request.get("headers", {}), "x-request-timeout-s": f"{left_s:.3f}"}
        with self._http.stream(method, path, timeout=left_s, **{**request, "headers": headers}) as answer:
            # httpx bounds the wait for each piece; an endpoint that sends them one by one must end as well.
            body = bytearray()
            for piece in answer.iter_bytes():
                body += piece
                if time.monotonic() > gives_up_at:
                    raise httpx.ReadTimeout("the answer was still coming when the time was over")
            # The body came decoded, so the new answer must not be told that it is encoded.
            kept = [pair for pair in answer.headers.multi_items() if pair[0].lower() != "content-encoding"]
            return httpx.Response(answer.status_code, headers=kept, content=bytes(body), request=answer.request)


def _base(url: str) -> httpx.URL:
    try:
        base = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"an endpoint's URL reads http://HOST:PORT, got {url!r}: {error}.") from error
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigError(f"an endpoint's URL reads http://HOST:PORT, got {url!r}.")
    return base


def _outcome(future: Future[Result], keep_errors: bool) -> Result | DataError:
    try:
        return future.result()
    except DataError as error:
        if keep_errors:
            return error
        raise


def _cause(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """What Retry-After asks for, in seconds or as a date (RFC 9110, 10.2.3); None where it says nothing."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    with contextlib.suppress(ValueError):
        at = parsedate_to_datetime(value)
        return max(0.0, (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp())
    return None


def _wait_s(asked: float | None, attempt: int) -> float:
    """Seconds before the next attempt: what was asked for and a little more, else 0.5, 1, 2, ... give or take half.

    Jittered, so that the clients whom an endpoint sent away together do not come back together.
    """
    if asked is not None:
        return asked * (1 + 0.2 * random.random())
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (attempt - 1)) * (0.5 + random.random())
