"""`hfms chat` against a server on loopback: real processes, real sockets, and a real terminal where it matters."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest

DONE = b"data: [DONE]\n\n"


def chat_event(text: str | None = None, finish: str | None = None, **delta: str) -> dict[str, Any]:
    """One event of a streamed chat completion."""
    content = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": {**content, **delta}, "finish_reason": finish}]}


def sse(*events: dict) -> bytes:
    return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events)


def answer(*texts: str) -> list[bytes]:
    return [*[sse(chat_event(t)) for t in texts], sse(chat_event(finish="stop")), DONE]


def count_turns(body: dict) -> list[bytes]:
    """Answers with how much it was told."""
    return answer(f"{len(body['messages'])} messages, last {body['messages'][-1]['content']!r}")


# Once, not on a terminal


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_prompt_is_answered_once_with_the_first_model(hfms, server, suffix):
    server.stream = answer("Hello", ", ", "world")
    done = hfms("chat", "Say hello", "--url", server.url + suffix)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello, world\n", "")
    assert [(m, p) for m, p, _ in server.asked] == [("GET", "/v1/models"), ("POST", "/v1/chat/completions")]
    assert server.asked[-1][2] == {
        "model": "first-model",
        "messages": [{"role": "user", "content": "Say hello"}],
        "stream": True,
    }


def test_options_are_sent_as_openai_names_them(hfms, server):
    server.stream = answer("ok")
    options = ["--model", "mine", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "5"]
    assert hfms("chat", "Hi", "--url", server.url, *options).returncode == 0
    ((_, _, body),) = server.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("mine", 0.0, 5)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_standard_input_is_the_prompt(hfms, server):
    server.stream = answer("ok")
    assert hfms("chat", "--url", server.url, stdin="What is\nthis?\n").stdout == "ok\n"
    assert server.asked[-1][2]["messages"] == [{"role": "user", "content": "What is\nthis?"}]


def test_empty_standard_input_is_told(hfms, server):
    done = hfms("chat", "--url", server.url)
    assert (done.returncode, server.asked) == (1, [])
    assert "nothing to ask" in done.stderr


def test_answer_in_one_piece_is_printed_too(hfms, server):
    whole = {"choices": [{"message": {"role": "assistant", "content": "All at once"}, "finish_reason": "stop"}]}
    server.replies["POST", "/v1/chat/completions"] = (200, whole)
    assert hfms("chat", "Hi", "--url", server.url).stdout == "All at once\n"


def test_stream_may_be_cut_anywhere_and_hold_comments_and_crlf(hfms, server):
    raw = b": warming up\r\n\r\n" + b"".join(answer("Grü", "ße 🌍")).replace(b"\n", b"\r\n")
    raw = raw.replace(b'"choices"', b'\r\ndata: "choices"')
    server.stream = [raw[i : i + 7] for i in range(0, len(raw), 7)]
    assert hfms("chat", "Hi", "--url", server.url).stdout == "Grüße 🌍\n"


def test_thoughts_are_not_part_of_a_piped_answer(hfms, server):
    server.stream = [sse(chat_event(reasoning_content="Hmm.")), *answer("Yes")]
    assert hfms("chat", "Hi", "--url", server.url).stdout == "Yes\n"


def test_half_a_surrogate_pair_does_not_stop_the_answer(hfms, server):
    server.stream = answer("a\ud83d", "b")
    assert hfms("chat", "Hi", "--url", server.url).stdout == "a?b\n"


# The key


def test_key_comes_from_the_variable_and_goes_as_a_bearer_token(hfms, server):
    server.stream = answer("ok")
    hfms("chat", "Hi", "--url", server.url, env={"HFMS_API_KEY": "hf_one"})
    assert server.headers[-1]["Authorization"] == "Bearer hf_one"
    hfms("chat", "Hi", "--url", server.url, "--key-env", "MY_KEY", env={"HFMS_API_KEY": "hf_one", "MY_KEY": "two"})
    assert server.headers[-1]["Authorization"] == "Bearer two"


def test_variable_that_is_named_and_not_set_is_a_usage_error(hfms, server):
    done = hfms("chat", "Hi", "--url", server.url, "--key-env", "MY_KEY")
    assert (done.returncode, done.stderr) == (2, "error: --key-env names MY_KEY, which is not set\n")


def test_missing_key_says_where_to_put_one(hfms, server):
    envelope = {"error": {"message": "Missing API key.", "type": "invalid_request_error", "code": "invalid_api_key"}}
    server.replies["GET", "/v1/models"] = (401, envelope)
    done = hfms("chat", "Hi", "--url", server.url)
    assert done.returncode == 1
    assert "answered 401: Missing API key." in done.stderr
    assert "HFMS_API_KEY" in done.stderr


def test_key_is_never_in_a_message(hfms, server):
    server.replies["GET", "/v1/models"] = (403, {"error": {"message": "No."}})
    done = hfms("chat", "Hi", "--url", server.url, env={"HFMS_API_KEY": "hf_secret"})
    assert "hf_secret" not in done.stdout + done.stderr


# Faults


def test_nobody_there_exits_3_and_says_what_to_do(hfms, unused_tcp_port):
    done = hfms("chat", "Hi", "--url", f"http://127.0.0.1:{unused_tcp_port}")
    assert done.returncode == 3
    assert done.stderr == (
        f"error: no server answers at http://127.0.0.1:{unused_tcp_port}; "
        "start one with `hfms serve`, or name it with --url\n"
    )


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://host", "http://", "http://h:99999", "http://[::1", "http://h/v1?key=1", "http://h:0"],
)
def test_address_that_is_none_is_a_usage_error(hfms, url):
    done = hfms("chat", "Hi", "--url", url)
    assert done.returncode == 2
    assert "which is not an address such as http://127.0.0.1:8000" in done.stderr


def test_password_in_the_address_is_refused_and_not_repeated(hfms):
    done = hfms("chat", "Hi", "--url", "http://user:hunter2@host")
    assert done.returncode == 2
    assert "hunter2" not in done.stderr


def test_error_event_ends_the_answer_with_its_message_and_exit_1(hfms, server):
    server.stream = [sse(chat_event("So far")), sse({"error": {"message": "The engine died.", "code": "engine_died"}})]
    done = hfms("chat", "Hi", "--url", server.url)
    assert (done.returncode, done.stdout) == (1, "So far\n")
    assert done.stderr == "error: the server ended the answer with an error: The engine died.\n"


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ([sse(chat_event("So far"))], "broke off before its end"),
        ([b"data: {oops\n\n"], "not JSON"),
        ([b"data: [1]\n\n"], "not an object"),
        ([sse({"choices": ["text"]})], "no chat completion"),
        ([sse({"choices": 5})], "no chat completion"),
    ],
)
def test_answer_that_is_none_is_told(hfms, server, stream, said):
    server.stream = stream
    done = hfms("chat", "Hi", "--url", server.url)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("status", "text"), [(500, "<html>oops</html>"), (404, ""), (302, ""), (200, "hello")])
def test_page_that_is_no_openai_api_is_told(hfms, server, status, text):
    server.replies["GET", "/v1/models"] = (status, text)
    done = hfms("chat", "Hi", "--url", server.url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("listing", [{"data": "none"}, {"data": [1]}, [], {}])
def test_list_of_models_that_is_none_is_told(hfms, server, listing):
    server.replies["GET", "/v1/models"] = (200, listing)
    assert "does not list its models" in hfms("chat", "Hi", "--url", server.url).stderr


def test_server_without_models_says_how_to_load_one(hfms, server):
    server.models = []
    done = hfms("chat", "Hi", "--url", server.url)
    assert done.returncode == 1
    assert "hfms models load" in done.stderr


# On a terminal


class Terminal:
    """`hfms` on a pseudo-terminal: what a person would type and see."""

    def __init__(self, args: list[str], env: dict[str, str], cwd: str) -> None:
        self.here, there = pty.openpty()
        settings = termios.tcgetattr(there)
        settings[3] &= ~termios.ECHO  # what is typed is not to be found again in what is seen
        termios.tcsetattr(there, termios.TCSANOW, settings)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hfms_cli", *args],
            stdin=there,
            stdout=there,
            stderr=there,
            env=env | {"TERM": "dumb"},
            cwd=cwd,
            start_new_session=True,
        )
        os.close(there)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.here, text.encode())

    def until(self, text: str) -> str:
        """What is shown up to and with `text`."""
        while text not in self.seen:
            ready, _, _ = select.select([self.here], [], [], 20)
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            try:
                data = os.read(self.here, 4096)
            except OSError:  # Linux's word for: the other side is closed
                data = b""
            assert data, f"it ended; waited for {text!r}, saw {self.seen!r}"
            self.seen += data.decode()
        shown, _, self.seen = self.seen.partition(text)
        return (shown + text).replace("\r\n", "\n")

    def ask(self, line: str) -> str:
        """Type a line, and return what is shown until the next prompt."""
        self.type(line + "\n")
        return self.until("> ").removesuffix("> ")


@pytest.fixture
def terminal(server, environment, tmp_path) -> Iterator[Terminal]:
    server.stream = count_turns
    made = Terminal(["chat", "--url", server.url], environment, str(tmp_path))
    made.until("> ")
    yield made
    if made.process.poll() is None:
        made.process.kill()
    made.process.wait(20)
    os.close(made.here)


def test_history_is_kept_and_reset_forgets_it(terminal):
    assert "1 messages, last 'one'" in terminal.ask("one")
    assert "3 messages, last 'two'" in terminal.ask("two")
    terminal.ask("/reset")
    assert "1 messages, last 'three'" in terminal.ask("three")


def test_ctrl_d_leaves_with_status_0(terminal):
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


def test_exit_leaves_with_status_0(terminal):
    terminal.type("/exit\n")
    assert terminal.process.wait(20) == 0


def test_model_shows_and_changes_the_model(terminal, server):
    terminal.ask("one")
    assert "* first-model\n  second-model" in terminal.ask("/model")
    terminal.ask("/model second-model")
    terminal.ask("two")
    assert server.asked[-1][2]["model"] == "second-model"


def test_save_writes_the_talk_and_never_over_a_file(terminal, tmp_path):
    terminal.ask("one")
    assert "saved talk.json" in terminal.ask("/save talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == {
        "model": "first-model",
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1 messages, last 'one'"},
        ],
    }
    assert "error: talk.json was not written: File exists" in terminal.ask("/save talk.json")


def test_unknown_command_lists_those_there_are(terminal, server):
    shown = terminal.ask("/frobnicate")
    assert "error: /frobnicate is no command here" in shown
    assert "/reset" in shown
    assert server.asked == []


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(terminal, server):
    server.stream = [sse(chat_event("It was a dark ")), ...]
    terminal.type("Tell me a story\n")
    terminal.until("It was a dark ")
    terminal.process.send_signal(signal.SIGINT)
    assert "(stopped)" in terminal.until("> ")
    assert server.left.wait(20), "the server was not told"
    server.stream = count_turns
    assert "3 messages" in terminal.ask("go on")
    assert server.asked[-1][2]["messages"][1] == {"role": "assistant", "content": "It was a dark "}


def test_error_leaves_the_talk_as_it_was(terminal, server):
    server.stream = [sse({"error": {"message": "Too busy."}})]
    assert "error: the server ended the answer with an error: Too busy." in terminal.ask("one")
    server.stream = count_turns
    assert "1 messages, last 'two'" in terminal.ask("two")


def test_model_cannot_drive_the_terminal(terminal, server):
    server.stream = answer("\x1b]0;title\x07plain\x9b2J")
    shown = terminal.ask("Hi")
    assert "plain" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


def test_ctrl_c_while_answering_once_exits_130(server, environment, tmp_path):
    server.stream = [sse(chat_event("It was a dark ")), ...]
    process = subprocess.Popen(
        [sys.executable, "-m", "hfms_cli", "chat", "Tell me a story", "--url", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=tmp_path,
    )
    assert process.stdout.read(14) == b"It was a dark "
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"\n", b"")
