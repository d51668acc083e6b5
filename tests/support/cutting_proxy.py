"""A TCP proxy that interrupts the responses of a server."""

import contextlib
import socket
import threading
from typing import Self

REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class CuttingProxy:
    """Forwards connections to ``target``.

    While ``cuts`` is positive, a response is cut off after ``after`` bytes and its connection is closed. While
    ``refusals`` is positive, a request gets status 403. Both count down to zero.
    """

    def __init__(self, target: tuple[str, int], after: int) -> None:
        self.target, self.after = target, after
        self.cuts = self.refusals = 0
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def url(self, bucket: str, path: str) -> str:
        """The URL of an object, read through the proxy."""
        return f"s3://{bucket}/{path}?endpoint_override={self.endpoint}&scheme=http"

    def _count_down(self, name: str) -> bool:
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.target)
                threading.Thread(target=self._forward_requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._forward_responses, args=(server, client), daemon=True).start()

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self._count_down("refusals"):
                    client.sendall(REFUSAL)
                    break
                server.sendall(data)
            _end(client, server)

    def _forward_responses(self, server: socket.socket, client: socket.socket) -> None:
        forwarded = 0
        with client, server, contextlib.suppress(OSError):
            while data := server.recv(65536):
                forwarded += len(data)
                if forwarded > self.after and self._count_down("cuts"):
                    client.sendall(data[: len(data) // 2])
                    break
                client.sendall(data)
            _end(client, server)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
