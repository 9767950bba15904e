"""Kill a process that creates keys, again and again, and look whether a key that it told of is lost.

    python -m tests.middleware.auth.crash STORE_URL [CYCLES]

A key counts as told once its line is whole on standard output. Each cycle starts a process that creates keys without
end, waits for a random number of lines, kills it (SIGKILL) at a random moment, and checks every key told so far.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from hfms_middleware.auth.keys import read_secret
from hfms_middleware.auth.store import open_store

CREATOR = """
import sys, time
from pathlib import Path
from hfms_middleware.auth.admin import KeyAdmin, KeyRequest
from hfms_middleware.auth.audit import Actor, AuditLog
from hfms_middleware.auth.store import open_store
folder = Path(sys.argv[2])
admin = KeyAdmin(open_store(sys.argv[1], folder), AuditLog(folder / "audit.jsonl", time.time))
while True:
    print(admin.create(KeyRequest(), Actor("crash", "here"))["api_key"], flush=True)
"""


def cycles(url: str, folder: Path, count: int, seed: int) -> tuple[int, list[str]]:
    """Keys that were told in so many lives, and those of them that the store does not have."""
    chance, told = random.Random(seed), set()
    for _ in range(count):
        creator = subprocess.Popen([sys.executable, "-c", CREATOR, url, str(folder)], stdout=subprocess.PIPE, text=True)
        assert creator.stdout is not None
        for _ in range(chance.randint(1, 20)):
            told.add(creator.stdout.readline())
        time.sleep(chance.random() * 0.02)  # into the middle of whatever it does
        creator.kill()
        told.update(line for line in creator.stdout if line.endswith("\n"))
        creator.wait()
    store = open_store(url, folder)
    kept = {key.id: key for key in store.changes(0)[1]}
    store.close()
    lost = []
    for line in told:
        secret = read_secret(line.strip())
        assert secret is not None, f"the creator said {line!r}"
        if secret.id not in kept or kept[secret.id].digest != secret.digest:
            lost.append(secret.id)
    return len(told), lost


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
        told, lost = cycles(sys.argv[1] if len(sys.argv) > 1 else "", Path(folder), count, seed=random.randrange(2**32))
    print(f"{count} cycles, {told} keys told, {len(lost)} lost")
    sys.exit(bool(lost))
