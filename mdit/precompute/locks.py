"""POSIX record locks: bytes of a file that processes on any machines lock one by one, and that fall free with the
process that holds them, however it ends."""

import errno
import fcntl
import os
from pathlib import Path


class RecordLocks:
    """The lock file of a set, held open: its bytes are locked one by one, and say which parts are complete. Opening it
    waits for byte 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, 0)
            if not self.are_removed():
                return
            os.close(self.descriptor)  # removed while this process waited

    def are_removed(self) -> bool:
        """Whether another process has removed the file, as the last one does."""
        return os.fstat(self.descriptor).st_nlink == 0

    def acquire(self, start: int, length: int) -> bool:
        """Lock bytes, all to the end where `length` is 0; False where another process has one of them."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def release(self, start: int, length: int) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, length, start)
