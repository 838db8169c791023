"""API keys: who may enter, until when, and how much they may ask for. Only hashes of keys are kept.

A key file is JSON or YAML at any URL that sceneray.storage reads:

    keys:
      - id: alice                       # stands in the access log
        sha256: 9f86d081884c7d65...     # of the key itself, which nobody but its owner has
        expires: 2027-01-01T00:00:00Z   # optional
        requests_per_s: 5               # optional, as all that follow
        pixels_per_s: 4000000
        pixels_per_day: 20000000000
        burst_s: 10                     # seconds of a rate that may be saved up and spent at once

An endpoint looks at the file every few seconds and takes over what changed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from sceneray import storage
from sceneray.errors import ConfigError

KEY_BYTES = 32  # of randomness: too many to guess, so a plain sha256 of the key is safe to store
PREFIX = "sr_"  # by it a scanner for leaked secrets knows a key
DEFAULT_BURST_S = 10.0
SECONDS_PER_DAY = 86_400.0

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Allowance:
    """A token bucket's rule: `rate` tokens a second flow in, up to `burst`."""

    rate: float
    burst: float


class Key(BaseModel):
    """One key as a file has it, without the key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")
    sha256: str
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    requests_per_s: Rate | None = None
    pixels_per_s: Rate | None = None
    pixels_per_day: Rate | None = None
    burst_s: Rate = DEFAULT_BURST_S

    @field_validator("sha256")
    @classmethod
    def _digest(cls, value: str) -> str:
        if len(value) != 64 or set(value.lower()) - set("0123456789abcdef"):
            raise ValueError("sha256 takes the digest of a key (64 hex digits), never the key: `sceneray keys new`")
        return value.lower()

    def is_valid(self, now: datetime) -> bool:
        """True until the key expires."""
        return self.expires is None or now < self.expires

    @property
    def allowances(self) -> dict[str, Allowance]:
        """The key's quotas by name; none: as much as the endpoint can."""
        found = {}
        if self.requests_per_s is not None:
            # At least one whole request, or a rate below 1 / burst_s would let nothing through.
            found["requests"] = Allowance(self.requests_per_s, max(1.0, self.requests_per_s * self.burst_s))
        if self.pixels_per_s is not None:
            found["pixels_per_s"] = Allowance(self.pixels_per_s, self.pixels_per_s * self.burst_s)
        if self.pixels_per_day is not None:
            found["pixels_per_day"] = Allowance(self.pixels_per_day / SECONDS_PER_DAY, self.pixels_per_day)
        return found


class KeyFile(BaseModel):
    """What a key file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Key, ...] = ()

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        for name in ("id", "sha256"):
            values = [getattr(key, name) for key in keys]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"two keys have the {name} {twice[0]}")
        return keys


@dataclass(frozen=True)
class KeyRing:
    """The keys that may enter now. `open`: no key is asked for."""

    keys: tuple[Key, ...] = ()
    open: bool = False
    _digests: tuple[bytes, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_digests", tuple(bytes.fromhex(key.sha256) for key in self.keys))

    def find(self, presented: str, now: datetime | None = None) -> Key | None:
        """The valid key that `presented` is; None where it is none."""
        digest = hashlib.sha256(presented.encode()).digest()
        # Every digest is compared, each in constant time: the time taken says nothing about the keys.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if True not in matches:
            return None
        key = self.keys[matches.index(True)]
        return key if key.is_valid(now or datetime.now(UTC)) else None


def digest_of(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A fresh key: printed once, for its owner."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def of_digests(digests: Sequence[str]) -> tuple[Key, ...]:
    """Keys without quotas from bare sha256 digests (ServeArgs.api_keys, SCENERAY_API_KEY); their ids are numbers."""
    return tuple(Key(id=f"key-{number}", sha256=digest) for number, digest in enumerate(digests, 1))


def read(url: str) -> tuple[Key, ...]:
    """The keys of the file at `url`. Raises ConfigError where it is absent, malformed, or names one twice."""
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise ConfigError(
            f"no key file at {url}: write one with `sceneray keys new --file {url} --id NAME`."
        ) from error
    return parse(data, url)


def parse(data: bytes, url: str) -> tuple[Key, ...]:
    """The keys of a key file's bytes. Raises ConfigError; its message never quotes a value of the file."""
    try:
        # JSON is YAML. A timestamp without quotes comes as a datetime, which is what is wanted.
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"the key file {url} is neither JSON nor YAML; repair it or write a new one.") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"the key file {url} must hold a list under the name `keys`, got {type(content).__name__}.")
    try:
        return KeyFile.model_validate(_aware(content)).keys
    except ValidationError as error:
        raise ConfigError(f"the key file {url} is malformed: {_reasons(error)}.") from error


def to_json(keys: Sequence[Key]) -> bytes:
    """A key file that holds `keys`."""
    import json

    return (json.dumps(KeyFile(keys=tuple(keys)).model_dump(mode="json", exclude_none=True), indent=1) + "\n").encode()


def _aware(content: Mapping[str, Any]) -> dict[str, Any]:
    """YAML reads a timestamp with a zone as UTC without saying so; times are in UTC here."""
    keys = content.get("keys")
    if not isinstance(keys, list):
        return dict(content)

    def utc(value: Any) -> Any:
        return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value

    return {**content, "keys": [{k: utc(v) for k, v in e.items()} if isinstance(e, Mapping) else e for e in keys]}


def _reasons(error: ValidationError) -> str:
    """Where and why, without the values: one might be a key that somebody put in place of its digest."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
