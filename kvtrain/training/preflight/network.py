"""Which address of a machine the others would be told."""

import fcntl
import os
import socket
import struct
from typing import NamedTuple

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


class Address(NamedTuple):
    """Of this process, as a backend of torch.distributed announces it.

    Attributes:
        address: In dots.
        interface: Its name; empty where that cannot be said.
        route: The interface that leads to where all ranks meet; empty where that cannot be said.
    """

    address: str
    interface: str
    route: str


def own_address(backend: str) -> Address:
    """What gloo or NCCL will bind, by the same rules."""
    known, towards = interfaces(), _towards(os.environ.get("MASTER_ADDR"))
    route = next((name for name, address in known.items() if address == towards), "")
    asked = os.environ.get("GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME", "").split(",")[0]
    chosen = _of_host_name() if backend == "gloo" else towards  # NCCL looks for an interface itself
    address = known.get(asked, chosen)
    return Address(address, next((name for name, own in known.items() if own == address), ""), route)


def interfaces() -> dict[str, str]:
    """Addresses of the network interfaces, by name; none but on Linux."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # has no address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _of_host_name() -> str:
    """Gloo's choice: what the host's name resolves to, where that can be bound."""
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return "127.0.0.1"
    return address


def _towards(host: str | None) -> str:
    """The address from which packets to a host leave; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host or "127.0.0.1", 9))
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
