"""`hfms models ...` as a process, beside a Hub that this process serves."""

from __future__ import annotations

import asyncio
import subprocess
import sys


async def start(env: dict[str, str], *args: str, **more) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hfms_cli", "models", *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=env["HOME"],
        **more,
    )


async def hfms(env: dict[str, str], *args: str, **more) -> tuple[int, str, str]:
    """Exit status, output and errors of one `hfms models ...`."""
    process = await start(env, *args, **more)
    out, err = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, out.decode(), err.decode()
