"""Carries the loot away: internet, services of the host, raw packets, the hypervisor."""

import contextlib
import socket
import sys


def internet() -> None:
    """A connection to the outside."""
    socket.create_connection(("1.1.1.1", 443), timeout=1)


def loopback() -> None:
    """The host's own services, which trust local clients."""
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 53))


def raw() -> None:
    """Every packet on the wire."""
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)


def vsock() -> None:
    """From a virtual machine to its hypervisor; no network namespace covers these."""
    socket.socket(40, socket.SOCK_STREAM).bind((2**32 - 1, 5000))


for way in (internet, loopback, raw, vsock):
    with contextlib.suppress(OSError):
        way()
        print(way.__name__)
sys.exit(3)
