"""Sockets for several processes on one port."""

from __future__ import annotations

import contextlib
import socket

import pytest

from hfms_cli.serving.listen import listen


@contextlib.contextmanager
def closing(shares: list[list[socket.socket]]):
    try:
        yield shares
    finally:
        for sock in (s for share in shares for s in share):
            sock.close()


async def test_every_process_has_a_socket_of_its_own_on_the_same_port():
    with closing(await listen("127.0.0.1", 0, 3)) as shares:
        assert [len(share) for share in shares] == [1, 1, 1]
        assert len({share[0].getsockname() for share in shares}) == 1
        assert len({share[0].fileno() for share in shares}) == 3


@pytest.mark.parametrize("taken_by", [1, 2])
@pytest.mark.parametrize("wanted_by", [1, 2])
async def test_a_port_that_is_taken_is_an_error_even_where_its_holder_would_share(taken_by, wanted_by):
    with closing(await listen("127.0.0.1", 0, taken_by)) as shares:
        port = shares[0][0].getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            await listen("127.0.0.1", port, wanted_by)


async def test_a_name_of_several_addresses_listens_on_those_that_this_machine_has():
    with closing(await listen("localhost", 0, 2)) as shares:
        assert shares[0]
        with socket.create_connection(("127.0.0.1", shares[0][0].getsockname()[1])) as there:
            assert there.getpeername()[0] == "127.0.0.1"


async def test_an_address_of_another_machine_is_an_error():
    with pytest.raises(OSError, match=r"192\.0\.2\.1|assign"):
        await listen("192.0.2.1", 0, 2)
