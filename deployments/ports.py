"""Ports of this machine, which several front ends of one application may share."""

import errno
import socket

from gemma_serve.errors import ConfigurationError


def bind_shared(host: str, port: int) -> socket.socket:
    """A socket to listen at ``host:port`` with, beside others of this kind and user.

    Each connection goes to one of them. Raises ``ConfigurationError`` if none can come to it.
    """
    listener = _socket_for(host)
    # For further front ends on this machine, and for the next one during an update.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    return listener


def require_unused(host: str, port: int) -> None:
    """Raise ``ConfigurationError`` if somebody listens at ``host:port``, willing to share or not.

    Front ends share a port whether they know each other or not, and two servers would each get
    some of the other's connections.
    """
    try:
        with _socket_for(host) as probe:
            probe.bind((host, port))
    except OSError as error:
        # What else is wrong with the address, the front end says.
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"port {port} is in use: stop what listens at {host}:{port}, or set another"
            ) from None


def _socket_for(host: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # Connections of a server that has stopped do not hold the port for another minute.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return opened
