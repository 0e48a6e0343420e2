"""Streams between two processes of one machine that go past Ray.

An item of a Ray stream passes four threads, which takes 2 to 4 ms on two cores: more than all the
rest of serving. So whoever wants a stream listens at a Unix socket and says so in the request, and
whoever produces it connects. Another machine has no such socket; items then go over Ray.

The socket is in a folder that only the server's user may enter. Who can connect could attach a
debugger to this process just as well, and pickles are as safe here as they are in Ray.
"""

import asyncio
import fcntl
import os
import pickle
import secrets
import shutil
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from weakref import WeakValueDictionary

_LENGTH: Final = struct.Struct("!I")  # bytes of the pickle that follows
_KEY_BYTES: Final = 16
# Like Ray's, not in TMPDIR: the path of a socket has 107 bytes at most.
_FOLDERS: Final = Path("/tmp")
_PREFIX: Final = "gemma-serve-return-"
_LOCK: Final = "lock"


@dataclass(frozen=True, slots=True)
class ReturnAddress:
    """Where a stream is awaited."""

    socket: str
    key: bytes
    """Which of those that are awaited there."""


@dataclass(frozen=True, slots=True)
class _End:
    """The last item of a stream that was sent whole."""


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ReturnedStream:
    """A stream that was asked for. Close it, even if it never comes."""

    def __init__(self, address: ReturnAddress) -> None:
        self.address = address
        self.connection: asyncio.Future[_Connection] = asyncio.get_running_loop().create_future()
        """Done once the sender has connected."""
        self._is_closed = False

    async def receive(self) -> Any:
        """The next item.

        Raises ``StopAsyncIteration`` behind the last one, and ``EOFError`` if the sender left
        before it had sent all.
        """
        await asyncio.wait({self.connection})
        reader, _ = self.connection.result()
        try:
            (num_bytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            item = pickle.loads(await reader.readexactly(num_bytes))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EOFError from error
        if isinstance(item, _End):
            raise StopAsyncIteration
        return item

    def close(self) -> None:
        """What the sender sends next fails; a sender that comes later is turned away."""
        self._is_closed = True
        if self.connection.done():
            _, writer = self.connection.result()
            writer.close()

    def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take the sender's connection."""
        if self._is_closed:
            writer.close()
        else:
            self.connection.set_result((reader, writer))


class ReturnSocket:
    """Where this process awaits streams, all on one event loop."""

    def __init__(self) -> None:
        _remove_left_behind()
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_FOLDERS))  # of mode 0700
        # Another process that starts now must not find a lock that nobody holds yet.
        unnamed = self._folder / "new"
        self._lock = unnamed.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self._folder / _LOCK)
        self._path = str(self._folder / "return")
        # A stream that nobody holds any more is not awaited.
        self._awaited: WeakValueDictionary[bytes, ReturnedStream] = WeakValueDictionary()
        self._starting: asyncio.Task[asyncio.Server] | None = None

    async def expect(self) -> ReturnedStream:
        """A stream whose address can be given away."""
        if self._starting is None:
            self._starting = asyncio.create_task(asyncio.start_unix_server(self._admit, self._path))
        await asyncio.shield(self._starting)
        address = ReturnAddress(self._path, secrets.token_bytes(_KEY_BYTES))
        stream = self._awaited[address.key] = ReturnedStream(address)
        return stream

    def close(self) -> None:
        """Await no more streams; those that are connected go on."""
        if self._starting is not None:
            self._starting.add_done_callback(lambda started: started.result().close())
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            key = await reader.readexactly(_KEY_BYTES)
        except (asyncio.IncompleteReadError, ConnectionError):
            key = b""
        stream = self._awaited.pop(key, None)
        if stream is None:
            writer.close()
        else:
            stream.connect(reader, writer)


def _remove_left_behind() -> None:
    """Remove this user's folders of processes that were killed: nobody holds their locks."""
    for folder in _FOLDERS.glob(f"{_PREFIX}*"):
        # What is gone meanwhile, is locked or has no lock yet is none of them.
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            with (folder / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


class StreamSender:
    """Sends one stream to where it is awaited."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    @classmethod
    async def connect(cls, address: ReturnAddress) -> Self | None:
        """``None`` if there is no such socket on this machine."""
        try:
            _, writer = await asyncio.open_unix_connection(address.socket)
        except OSError:
            return None
        writer.write(address.key)
        return cls(writer)

    async def send(self, item: object) -> None:
        """Waits while the receiver lags. Raises ``ConnectionError`` once it has left."""
        pickled = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._writer.write(_LENGTH.pack(len(pickled)) + pickled)
        await self._writer.drain()

    async def send_end(self) -> None:
        """Say that this was all."""
        await self.send(_End())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._writer.close()
