"""Sockets to listen on, for one process or for several."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket


async def listen(host: str, port: int, processes: int) -> list[list[socket.socket]]:
    """For each process one bound socket an address of `host`. Raises OSError where the port is taken.

    The kernel spreads connections evenly over sockets that share an address (SO_REUSEPORT). All of them are made here:
    so those of a process that died keep what has connected to them until it is there again.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    shares: list[list[socket.socket]] = [[] for _ in range(processes)]
    with contextlib.ExitStack() as undo:
        failed: OSError | None = None
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                # Sharing is not asked first whether others may: so a port in use is an error and not a share of it.
                probe = undo.enter_context(socket.create_server(address, family=family))
            except OSError as exc:
                if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # `localhost` where there is no IPv6
                    failed = exc
                    continue
                raise
            bound = probe.getsockname()
            if processes == 1:
                shares[0].append(probe)
                continue
            probe.close()
            for share in shares:
                share.append(undo.enter_context(socket.create_server(bound, family=family, reuse_port=True)))
        if not shares[0]:
            raise failed or OSError(errno.EADDRNOTAVAIL, f"{host} has no address")
        undo.pop_all()
    return shares
