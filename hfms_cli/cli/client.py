"""A small client of a running server: hfms's own, or any that speaks OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from hfms_cli.config import ServerConfig
from hfms_cli.errors import ConfigError, HfmsError
from hfms_cli.settings import PREFIXES
from hfms_cli.sse import EventReader

if TYPE_CHECKING:
    import aiohttp

CONNECT_SECONDS = 10.0


class Unreachable(HfmsError):
    """Nobody answers at the address."""


class Refused(HfmsError):
    """The server answered with an error, or with what is not an answer."""


class Client:
    """One server. Use it as an async context manager; paths begin at the root (`/v1/models`).

    url: `http://` or `https://`, with or without `/v1` at its end. key: sent as a bearer token.
    Every method raises Unreachable where nobody answers, and Refused where the answer is an error.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = server_root(url)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.key = key

    async def __aenter__(self) -> Self:
        import aiohttp

        # No limit on the whole: a model may take minutes to load, and an answer to be written.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        """Names of the models that the server has."""
        answer = await self.get("/v1/models")
        try:
            return [str(m["id"]) for m in answer["data"]]
        except (KeyError, TypeError) as exc:
            raise Refused(f"{self.url} does not list its models; is it the address of an OpenAI API?") from exc

    async def get(self, path: str) -> Any:
        """The JSON that `GET path` answers."""
        with self._told_plainly():
            async with self._session.get(self.url + path, allow_redirects=False) as response:
                return await self._answer(response)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that `POST path` answers."""
        with self._told_plainly():
            async with self._session.post(self.url + path, json=body, allow_redirects=False) as response:
                return await self._answer(response)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events that `POST path` answers, up to `[DONE]`. An event that is an error is raised as Refused."""
        with self._told_plainly():
            async with self._session.post(self.url + path, json=body, allow_redirects=False) as response:
                if response.status != 200 or response.content_type != "text/event-stream":
                    yield _object(await self._answer(response))  # a server that does not stream answers in one piece
                    return
                events = EventReader()
                async for data in response.content.iter_any():
                    for event in events.feed(data):
                        if event == b"[DONE]":
                            return
                        if event:  # some servers keep a connection warm with empty ones
                            yield _object(_parsed(event.decode(errors="replace")))

    async def _answer(self, response: aiohttp.ClientResponse) -> Any:
        text = await response.text(errors="replace")
        if response.status < 300:
            return _parsed(text)
        raise Refused(self._reason(response.status, text))

    def _reason(self, status: int, text: str) -> str:
        try:
            message = _error_of(json.loads(text))
        except ValueError:
            message = None
        reason = f"{self.url} answered {status}" + (f": {message}" if message else "")
        if status == 401 and not self.key:
            reason += " (no key was sent; hfms reads it from the environment, usually HFMS_API_KEY)"
        return reason

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """aiohttp's errors in words that say what to do."""
        import aiohttp

        try:
            yield
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as exc:
            raise Unreachable(
                f"no server answers at {self.url}; start one with `hfms serve`, or name it with --url"
            ) from exc
        except aiohttp.ClientError as exc:
            raise Refused(f"the connection to {self.url} broke before the answer was complete") from exc


def server_root(url: str) -> str:
    """The address without `/v1` and slashes at its end. Raises ConfigError where it is not an http(s) address."""
    if "@" in url:
        raise ConfigError("--url holds a user name or password; keys are read from the environment only")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # urlsplit's word for a bad port or IPv6 address
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigError(f"--url is {url!r}, which is not an address such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def local_url(server: ServerConfig) -> str:
    """Where a server of this configuration answers on this machine. Raises ConfigError for port 0."""
    if server.port == 0:
        raise ConfigError("[server] port is 0, so the server took a free port; name it with --url")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def admin_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """The key for calls that change the server, from the environment."""
    names = [prefix + name for name in ("ADMIN_API_KEY", "API_KEY") for prefix in PREFIXES]
    return next((environ[n] for n in names if environ.get(n)), None)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise Refused("the server sent something that is not JSON; is this the address of an OpenAI API?") from exc


def _object(answer: Any) -> dict[str, Any]:
    if message := _error_of(answer):
        raise Refused(f"the server ended the answer with an error: {message}")
    if not isinstance(answer, dict):
        raise Refused("the server sent JSON that is not an object; is this the address of an OpenAI API?")
    return answer


def _error_of(answer: Any) -> str | None:
    """The message of OpenAI's envelope, or of what others put in its place."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        return str(error.get("message") or error.get("code") or "no reason given")
    return str(error) if error else None
