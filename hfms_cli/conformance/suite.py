"""The checks by name, and how they are run: green, red with the reason, or skipped with the reason."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfms_cli.conformance.server import Server

Body = Callable[["Server"], Awaitable[None]]


class Failed(Exception):
    """What the server did instead."""


class Skipped(Exception):
    """Why there is nothing to check."""


def expect(truth: Any, otherwise: str) -> None:
    """Raise Failed, saying `otherwise`, unless something is so."""
    if not truth:
        raise Failed(otherwise)


class Colour(StrEnum):
    GREEN = "green"
    RED = "red"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Verdict:
    """What became of a check. why: empty where it is green."""

    colour: Colour
    why: str = ""


@dataclass(frozen=True)
class Check:
    """One thing that clients rely on."""

    group: str
    name: str
    body: Body

    async def run(self, server: Server) -> Verdict:
        """Ask the server. Whatever it does, there is a verdict."""
        import aiohttp

        try:
            await self.body(server)
        except Skipped as exc:
            return Verdict(Colour.SKIPPED, str(exc))
        except Failed as exc:
            return Verdict(Colour.RED, str(exc))
        except TimeoutError:
            return Verdict(Colour.RED, "did not answer in time")
        except aiohttp.ClientError as exc:
            return Verdict(Colour.RED, f"the connection broke ({type(exc).__name__})")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
            # The answer has not the shape that the check takes apart.
            return Verdict(Colour.RED, f"answered in another shape ({type(exc).__name__}: {exc})")
        return Verdict(Colour.GREEN)


_found: list[Check] = []


def check(group: str, name: str) -> Callable[[Body], Body]:
    """Add an async function of a server to the checks. It raises Failed, by `expect`, or Skipped."""

    def mark(body: Body) -> Body:
        _found.append(Check(group, name, body))
        return body

    return mark


def all_checks() -> list[Check]:
    """Every check, in the order of `checks.GROUPS`."""
    from hfms_cli.conformance import checks

    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"{checks.__name__}.{module.name}")
    return sorted(_found, key=lambda c: checks.GROUPS.index(c.group))


async def judge(checks: list[Check], servers: list[Server]) -> AsyncIterator[tuple[Check, list[Verdict]]]:
    """Run each check on all servers, one after the other on each, and tell the verdicts in the order of the servers."""
    for one in checks:
        yield one, list(await asyncio.gather(*(one.run(server) for server in servers)))
