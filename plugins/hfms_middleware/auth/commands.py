"""`hfms keys`: on the running server where one is named with --url, else on the store of the configuration.

A secret is printed once, to standard output and nowhere else, and never taken as an argument.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import typer

from hfms_cli import (
    AsJson,
    BadRequest,
    Client,
    Config,
    ConfigFile,
    Unavailable,
    admin_key,
    load_config,
    parse_fields,
    print_json,
    print_table,
    printable,
)
from hfms_middleware.auth.admin import KeyAdmin, KeyRequest, RotateRequest
from hfms_middleware.auth.audit import AUDIT_FILE, Actor, AuditLog
from hfms_middleware.auth.keys import StoredKey, is_key_id
from hfms_middleware.auth.options import AuthOptions
from hfms_middleware.auth.store import StoreUnavailable, no_such_key, open_store

keys = typer.Typer(help="Create, list, revoke and rotate keys.", no_args_is_help=True)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

Server = Annotated[
    str | None, typer.Option("--url", help="Ask this running server; without it the configured store is used.")
]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="The id of a key, as `hfms keys list` shows it.")]


class Keys(Protocol):
    """What the verbs need: the store's own administration, or a server's."""

    def create(self, asked: dict[str, Any]) -> dict[str, Any]: ...
    def all(self) -> list[dict[str, Any]]: ...
    def show(self, key_id: str) -> dict[str, Any]: ...
    def revoke(self, key_id: str) -> dict[str, Any]: ...
    def rotate(self, key_id: str, asked: dict[str, Any]) -> dict[str, Any]: ...
    def export(self) -> list[StoredKey]: ...
    def load(self, keys: list[StoredKey], *, replace_known: bool) -> tuple[int, int]: ...
    def audit(self, last: int) -> list[dict[str, Any]]: ...


class OfServer:
    """A running server's keys, by its admin routes."""

    def __init__(self, url: str) -> None:
        self._client = Client(url, admin_key())

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._ask(lambda c: c.post("/admin/keys/generate", asked))

    def all(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self._ask(lambda c: c.get("/admin/keys/list"))["data"]
        return listed

    def show(self, key_id: str) -> dict[str, Any]:
        return self._ask(lambda c: c.get(f"/admin/keys/{_checked(key_id)}"))

    def revoke(self, key_id: str) -> dict[str, Any]:
        return self._ask(lambda c: c.post(f"/admin/keys/{_checked(key_id)}/revoke", {}))

    def rotate(self, key_id: str, asked: dict[str, Any]) -> dict[str, Any]:
        return self._ask(lambda c: c.post(f"/admin/keys/{_checked(key_id)}/rotate", asked))

    def export(self) -> list[StoredKey]:
        return msgspec.convert(self._ask(lambda c: c.get("/admin/keys/export"))["data"], list[StoredKey])

    def load(self, keys: list[StoredKey], *, replace_known: bool) -> tuple[int, int]:
        asked = {"keys": msgspec.to_builtins(keys), "replace": replace_known}
        done = self._ask(lambda c: c.post("/admin/keys/import", asked))
        return done["imported"], done["present"]

    def audit(self, last: int) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = self._ask(lambda c: c.get(f"/admin/keys/audit?last={last}"))["data"]
        return lines

    def _ask(self, question: Callable[[Client], Coroutine[Any, Any, Any]]) -> dict[str, Any]:
        import asyncio

        async def ask() -> Any:
            async with self._client as client:
                return await question(client)

        answer = asyncio.run(ask())
        if not isinstance(answer, dict):
            raise BadRequest(f"{self._client.url} does not answer as hfms does")
        return answer


class OfStore:
    """The keys of the configured store, without a server."""

    def __init__(self, admin: KeyAdmin) -> None:
        self._admin = admin

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._admin.create(parse_fields(KeyRequest, asked), _me())

    def all(self) -> list[dict[str, Any]]:
        return self._admin.all()

    def show(self, key_id: str) -> dict[str, Any]:
        return self._admin.show(key_id)

    def revoke(self, key_id: str) -> dict[str, Any]:
        return self._admin.revoke(key_id, _me())

    def rotate(self, key_id: str, asked: dict[str, Any]) -> dict[str, Any]:
        return self._admin.rotate(key_id, parse_fields(RotateRequest, asked), _me())

    def export(self) -> list[StoredKey]:
        return self._admin.export(_me())

    def load(self, keys: list[StoredKey], *, replace_known: bool) -> tuple[int, int]:
        return self._admin.load(keys, replace_known=replace_known, actor=_me())

    def audit(self, last: int) -> list[dict[str, Any]]:
        return self._admin.audit(last)


@keys.command()
def create(
    name: Annotated[str, typer.Option(help="What it is called; means nothing.")] = "",
    admin: Annotated[bool, typer.Option("--admin", help="It may load and unload models and administer keys.")] = False,
    priority: Annotated[
        str, typer.Option(help="The highest it may ask for: LOW, NORMAL, HIGH or CRITICAL.")
    ] = "NORMAL",
    rate_limit: Annotated[int | None, typer.Option(help="Requests a minute.")] = None,
    token_limit: Annotated[int | None, typer.Option(help="Tokens a minute.")] = None,
    daily_token_limit: Annotated[int | None, typer.Option(help="Tokens a day.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="A model it may use; may be given again. Default: all.")
    ] = None,
    cache_group: Annotated[
        str, typer.Option(metavar="NAME", help="Share cached prompts and answers with the keys of this group.")
    ] = "",
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="In 12h, 30d, 8w; or a date and time with its zone.")
    ] = None,
    url: Server = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Create a key. It is printed this once; only a digest is kept."""
    asked = {
        "name": name,
        "admin": admin,
        "priority": priority,
        "rate_limit": rate_limit,
        "token_limit": token_limit,
        "daily_token_limit": daily_token_limit,
        "allowed_models": model or [],
        "cache_group": cache_group,
        "expires_at": _moment(expires),
    }
    _print_secret(_with(url, config, lambda k: k.create(asked)), as_json)


@keys.command("list")
def list_keys(url: Server = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List all keys: what each may do, and when it was last used."""
    rows = _with(url, config, lambda k: k.all())
    if as_json:
        print_json(rows)
        return
    columns = ["KEY ID", "NAME", "STATUS", "ADMIN", "PRIORITY", "REQ/MIN", "TOK/MIN", "TOK/DAY", "MODELS", "EXPIRES",
               "LAST USED"]  # fmt: skip
    print_table(columns, [_row(r) for r in rows])


@keys.command()
def show(key_id: KeyId, url: Server = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show one key."""
    _print_key(_with(url, config, lambda k: k.show(key_id)), as_json)


@keys.command()
def revoke(key_id: KeyId, url: Server = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Make a key worthless for good; every server knows within a second."""
    row = _with(url, config, lambda k: k.revoke(key_id))
    if as_json:
        print_json(row)
        return
    typer.echo(printable(f"{row['key_id']} is {row['status']}"))


@keys.command()
def rotate(
    key_id: KeyId,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="How long the old secret stays good: 0, 90s, 1h, 7d.")
    ] = "0",
    url: Server = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret, which is printed this once."""
    asked = {"grace_seconds": int(_duration(grace, "--grace"))}
    _print_secret(_with(url, config, lambda k: k.rotate(key_id, asked)), as_json)


@keys.command()
def export(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A new file; by default standard output.")
    ] = None,
    url: Server = None,
    config: ConfigFile = None,
) -> None:
    """Write all keys as JSON, to `import` them elsewhere. Digests, and no secrets."""
    data = msgspec.json.format(msgspec.json.encode(_with(url, config, lambda k: k.export())))
    if file is None:
        sys.stdout.write(data.decode() + "\n")
        return
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data + b"\n")
    except OSError as exc:
        raise BadRequest(f"{file} cannot be written: {exc.strerror}") from exc


@keys.command("import")
def import_keys(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `hfms keys export` wrote; - is standard input.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace keys that are there and differ.")] = False,
    url: Server = None,
    config: ConfigFile = None,
) -> None:
    """Take in exported keys. Their secrets go on to be good."""
    try:
        found = msgspec.json.decode(
            sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes(), type=list[StoredKey]
        )
    except OSError as exc:
        raise BadRequest(f"{file} cannot be read: {exc.strerror}") from exc
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BadRequest(f"{file} is not what `hfms keys export` writes: {exc}") from exc
    done, left = _with(url, config, lambda k: k.load(found, replace_known=replace))
    typer.echo(f"{done} imported, {left} there already")


@keys.command()
def audit(
    last: Annotated[int, typer.Option(min=1, max=10_000, help="How many lines, the newest last.")] = 50,
    url: Server = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what administrators did, on this machine or on the server's."""
    lines = _with(url, config, lambda k: k.audit(last))
    if as_json:
        print_json(lines)
        return
    named = ("time", "action", "by", "from", "key")
    print_table(["TIME", "ACTION", "BY", "FROM", "KEY"], [[line.get(n, "-") for n in named] for line in lines])


def _with(url: str | None, config: Path | None, work: Callable[[Keys], Any]) -> Any:
    """Do something with the keys of the server that is named, or of the configured store."""
    if url is not None:
        return work(OfServer(url))
    with _administration(load_config(config)) as admin:
        return work(OfStore(admin))


@contextmanager
def _administration(config: Config) -> Iterator[KeyAdmin]:
    """The store of a configuration, opened for a while."""
    options: AuthOptions = config.plugin_options("middleware", "auth", AuthOptions)
    store = open_store(options.store, config.state_dir)
    try:
        yield KeyAdmin(store, AuditLog(config.state_dir / AUDIT_FILE, time.time))
    except StoreUnavailable as exc:  # who stands at the machine may read why
        raise Unavailable(f"the key store cannot be reached: {exc.reason}") from exc
    finally:
        store.close()


def _me() -> Actor:
    """Who types: the user of this machine."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = str(os.getuid())
    return Actor(f"cli:{user}", socket.gethostname())


def _checked(key_id: str) -> str:
    """An id as part of a path; what cannot be one is never sent."""
    if not is_key_id(key_id):
        raise no_such_key(key_id)
    return key_id


def _moment(text: str | None) -> str | float | None:
    """`30d` from now as Unix seconds; a date is left as it is."""
    if text is None or not re.fullmatch(r"\d+[smhdw]", text):
        return text
    return time.time() + _duration(text, "--expires")


def _duration(text: str, option: str) -> float:
    found = re.fullmatch(r"(\d+)([smhdw]?)", text)
    if not found:
        raise BadRequest(f"{option} is {text!r}; write 90s, 12h, 30d or 8w")
    return float(int(found[1]) * _SECONDS.get(found[2], 1))


def _print_secret(row: dict[str, Any], as_json: bool) -> None:
    """The key alone on standard output, so that `KEY=$(hfms keys create)` works; the rest beside it."""
    if as_json:
        print_json(row)
        return
    print(printable(str(row["api_key"])), flush=True)
    typer.echo(f"{printable(str(row['key_id']))}: the key above is shown this once; keep it well", err=True)


def _print_key(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    for field, value in row.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        typer.echo(printable(f"{field.replace('_', ' '):20}{'-' if shown in (None, '') else shown}"))


def _row(row: dict[str, Any]) -> list[str]:
    fields = (
        "key_id", "name", "status", "admin", "priority", "rate_limit", "token_limit", "daily_token_limit",
        "allowed_models", "expires_at", "last_used_at",
    )  # fmt: skip
    cells = []
    for field in fields:
        value = row.get(field)
        if isinstance(value, bool):
            value = "yes" if value else "-"
        elif isinstance(value, list):
            value = ", ".join(value) or "all"
        cells.append("-" if value in (None, "") else str(value))
    return cells
