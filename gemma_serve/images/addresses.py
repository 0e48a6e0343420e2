"""Which addresses of the internet an image may be fetched from."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

IPAddress = IPv4Address | IPv6Address

Resolve = Callable[[str], Awaitable[tuple[IPAddress, ...]]]
"""Host name to addresses, best first. Raises ``OSError`` or ``UnicodeError`` if there are none."""

# `is_global` says yes to these on some of the Python versions that we support.
_NOT_PUBLIC_IPV4: Final = tuple(
    IPv4Network(network)
    for network in (
        "192.0.0.0/24",  # IETF protocol assignments; Oracle Cloud's metadata is 192.0.0.192
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's wire server, in public space but inside every machine
    )
)
_GLOBAL_UNICAST_IPV6: Final = IPv6Network("2000::/3")
# Tunnels name an IPv4 address that the writer of the URL chooses, and are out of use.
_TUNNELS_IPV6: Final = (IPv6Network("2001::/32"), IPv6Network("2002::/16"))  # Teredo, 6to4
_DOCUMENTATION_IPV6: Final = IPv6Network("3fff::/20")  # RFC 9637, newer than Python's tables
_NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052; how IPv6-only networks reach IPv4


async def resolve_host(host: str) -> tuple[IPAddress, ...]:
    """Ask the system's resolver, which also reads odd spellings such as ``0x7f.1``."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # A link-local address may come with the name of its network interface ("fe80::1%eth0").
    return tuple(
        ip_address(str(socket_address[0]).partition("%")[0]) for *_, socket_address in found
    )


def is_public(address: IPAddress) -> bool:
    """Whether ``address`` is global unicast, by itself and in any IPv4 address it stands for."""
    if isinstance(address, IPv4Address):
        return (
            address.is_global
            and not address.is_multicast
            and not any(address in network for network in _NOT_PUBLIC_IPV4)
        )
    embedded = address.ipv4_mapped or _nat64_target(address)
    if embedded is not None:
        return is_public(embedded)
    return (
        address.is_global
        and address in _GLOBAL_UNICAST_IPV6
        and address not in _DOCUMENTATION_IPV6
        and not any(address in network for network in _TUNNELS_IPV6)
    )


def _nat64_target(address: IPv6Address) -> IPv4Address | None:
    return IPv4Address(int(address) & 0xFFFF_FFFF) if address in _NAT64 else None
