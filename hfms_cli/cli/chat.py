"""`hfms chat`: talk to a model of any server that speaks OpenAI's API."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfms_cli.cli.client import Client, Refused
from hfms_cli.cli.output import printable
from hfms_cli.errors import BadRequest, ConfigError, HfmsError

if TYPE_CHECKING:
    import asyncio

DEFAULT_KEY_ENV = "HFMS_API_KEY"
COMMANDS = "/reset forgets the talk, /model [NAME] shows or changes the model, /save FILE writes the talk, /exit leaves"


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this once and leave; without it: talk.")] = None,
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The model; by default the first of /v1/models.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
    key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"The environment variable with the key.  [default: {DEFAULT_KEY_ENV}]"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is exact, 2 is wild.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
) -> None:
    """Talk to a model, or ask it once.

    From a pipe, standard input is what it is asked.
    """
    import asyncio

    if key_env and key_env not in os.environ:
        raise ConfigError(f"--key-env names {key_env}, which is not set")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal's encoding cannot
    client = Client(url, os.environ.get(key_env or DEFAULT_KEY_ENV))
    sampling = {"temperature": temperature, "max_tokens": max_tokens}
    talk = Talk(client, model, system, {k: v for k, v in sampling.items() if v is not None})
    with asyncio.Runner() as runner:
        if prompt is None and sys.stdin.isatty():
            converse(talk, runner)
            return
        text = sys.stdin.read().strip() if prompt is None else prompt
        if not text:
            raise BadRequest("there is nothing to ask: give a PROMPT, or text on standard input")
        runner.run(talk.ask(text))


@dataclass
class Talk:
    """A conversation with one model: what was said, and how to ask on."""

    client: Client
    model: str | None
    system: str | None
    sampling: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that the model is told, in OpenAI's form."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    async def models(self) -> list[str]:
        """Names of the models that the server has."""
        async with self.client as client:
            return await client.models()

    async def ask(self, text: str) -> None:
        """Print the answer as it comes, and remember it. What was said before a Ctrl-C stays in the talk."""
        if self.model is None:
            names = await self.models()
            if not names:
                raise Refused(f"{self.client.url} serves no model; load one with `hfms models load NAME`")
            self.model = names[0]
        question = {"role": "user", "content": text}
        body = {**self.sampling, "model": self.model, "messages": [*self.messages, question], "stream": True}
        said: list[str] = []
        try:
            await self._print_answer(body, said)
        finally:
            if said:
                self.turns += [question, {"role": "assistant", "content": "".join(said)}]

    async def _print_answer(self, body: dict[str, Any], said: list[str]) -> None:
        from contextlib import aclosing

        finished = False
        try:
            async with self.client as client, aclosing(client.stream("/v1/chat/completions", body)) as events:
                async for event in events:
                    for piece in pieces(event):
                        if piece.thought:
                            _write_thought(piece.thought)
                        if piece.text:
                            said.append(piece.text)
                            _write(piece.text)
                        finished = finished or piece.last
        finally:
            if said:
                _write("\n")
        if not finished:
            raise Refused("the answer broke off before its end")


@dataclass(frozen=True)
class Piece:
    """A piece of an answer."""

    text: str
    thought: str
    last: bool


def pieces(event: dict[str, Any]) -> list[Piece]:
    """What an event of a chat completion says, streamed or whole. Raises Refused where it is something else."""
    try:
        found = []
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice.get("message") or {}
            text, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
            found.append(Piece(str(text), str(thought), choice.get("finish_reason") is not None))
        return found
    except (AttributeError, TypeError) as exc:
        raise Refused("the server sent something that is no chat completion") from exc


def converse(talk: Talk, runner: asyncio.Runner) -> None:
    """Read, answer, again, until /exit or Ctrl-D."""
    _with_line_editing()
    print(f"{talk.client.url}: {COMMANDS}; Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith("/"):
                if line.strip() == "/exit":
                    return
                obey(line.strip(), talk, runner)
            elif line.strip():
                runner.run(talk.ask(line))
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except HfmsError as exc:
            print(f"error: {printable(exc.message)}", file=sys.stderr)


def obey(line: str, talk: Talk, runner: asyncio.Runner) -> None:
    """Do what a line with a slash says. Raises BadRequest where there is no such command."""
    verb, _, argument = line.partition(" ")
    argument = argument.strip()
    match verb:
        case "/reset":
            talk.turns.clear()
        case "/model" if argument:
            talk.model = argument
        case "/model":
            for name in runner.run(talk.models()):
                print(printable(f"{'*' if name == talk.model else ' '} {name}"))
        case "/save" if argument:
            save(Path(argument).expanduser(), talk)
        case _:
            raise BadRequest(f"{verb} is no command here, or lacks its argument: {COMMANDS}")


def save(path: Path, talk: Talk) -> None:
    """Write the talk as JSON that can be sent again. Raises BadRequest; never overwrites."""
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump({"model": talk.model, "messages": talk.messages}, file, indent=2, ensure_ascii=False)
            file.write("\n")
    except OSError as exc:
        raise BadRequest(f"{path} was not written: {exc.strerror}") from exc
    print(f"saved {path}", file=sys.stderr)


def _write(text: str) -> None:
    # A model's words must not drive the terminal; into a file or a pipe they go as they are.
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _write_thought(text: str) -> None:
    """A thinking model's thoughts, dim on a terminal and nowhere else: they are no part of the answer."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\x1b[2m{printable(text)}\x1b[22m")
        sys.stdout.flush()


def _with_line_editing() -> None:
    try:
        import readline  # noqa: F401 -- importing it gives input() line editing and a history
    except ImportError:
        return  # a Python without readline reads lines all the same
