"""A writer of shards that is killed in the middle of a file. A separate module, so that its process needs no torch."""

import os
import signal

from pais_ray.data.shards import writer
from pais_ray.files import storage


def write_and_die(out: str, source: writer.Source, whole: int, layout: dict[str, int]) -> None:
    """Write ``whole`` complete files and a part of the next one, then kill this process."""
    write = writer._write_file

    def write_some(*arguments):
        if sum(name.endswith(writer.NOTE) for name in storage.list_files(out)) == whole:
            with storage.create(storage.join(out, arguments[1])) as file:
                file.write(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    writer._write_file = write_some
    writer.write_shards(out, source, **layout)
