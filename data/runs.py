"""What surrounds a training run: its processes, its folder's lock and log, progress bars."""

import contextlib
import importlib
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import click
import torch
import torch.distributed as dist


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


@contextlib.contextmanager
def processes(device: str):
    """Join the processes that torchrun started, if it did; only the main one prints and writes.

    CPU tensors are exchanged by gloo, GPU tensors by nccl, each process on a GPU of its own. A
    process that waits ten minutes in vain for the others gives up.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    # Imported later, its functions would have the group as a default: the group's threads would
    # then live on and, once in hundreds of runs, abort the process when it ends.
    importlib.import_module("torch.distributed.nn")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                            timeout=timedelta(minutes=10))
    try:
        with open(os.devnull, "w") as null:
            with contextlib.redirect_stdout(null if dist.get_rank() else sys.stdout):
                yield
        dist.barrier()  # none leaves while another still asks for it
    finally:
        dist.destroy_process_group()


def track(items, label: str, length: int | None = None):
    """The items, with a progress bar of the main process where there is a terminal."""
    hidden = dist.is_initialized() and dist.get_rank() or not sys.stderr.isatty()
    with click.progressbar(items, length, label, file=sys.stderr, hidden=hidden) as bar:
        yield from bar


@contextlib.contextmanager
def handled(handlers: dict):
    """Handlers {signal: function} while it lasts, in the main thread only."""
    before = {}
    with contextlib.suppress(ValueError):  # another thread
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def catch_signals():
    """Give a function that returns the number of the last SIGINT or SIGTERM, 0 if none came."""
    caught = [0]
    with handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda n, _: caught.append(n))):
        yield lambda: caught[-1]
