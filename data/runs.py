"""The folder of a training run: its lock and its log."""

import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def locked(out: Path):
    """A folder, made if need be, with an exclusive lock until the process ends (not on Windows).

    It is removed again if nothing was written to it.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    fd = None
    with contextlib.suppress(ImportError):
        import fcntl
        fd = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ValueError(f"{out}: another run writes to this folder; choose another --out, or "
                             "wait for its end") from None
        except OSError:  # a file system without locks
            pass
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()
        if fd is not None:
            os.close(fd)


def truncate_log(log: Path, step: int) -> float:
    """Remove what a killed run left half-written, and its log lines after a step.

    Returns the seconds that had passed at the last line that stays.
    """
    for part in log.parent.glob(".ckpt.pt.*.part"):
        part.unlink()
    keep, elapsed = [], 0.0
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                elapsed = float(json.loads(line)["elapsed"])
                keep.append(line + "\n")
    if log.exists():
        part = log.with_name(f".{log.name}.part")
        part.write_text("".join(keep))
        part.replace(log)
    return elapsed
