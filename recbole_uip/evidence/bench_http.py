"""The HTTP service under load: a server process, and the load generator hey."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recbole_uip.evidence.figures import Figure

__all__ = ["http_figures"]

# Requests a second, over so many connections, for so many seconds.
RATE, CONNECTIONS, SECONDS = 200, 4, 10
START_SECONDS = 120


def http_figures(folder: Path, user: str) -> list[Figure]:
    """Latency of look-ups over HTTP at a steady rate; the floor is an empty answer's.

    Parameters
    ----------
    folder : path
        The bank.
    user : str
        The user who is looked up.

    Returns
    -------
    list of Figure
        Empty where ``hey`` or the extra ``serve`` is not installed.
    """
    if shutil.which("hey") is None:
        return []
    with _server(folder) as url:
        if url is None:
            return []
        body = json.dumps({"users": [user]})
        floor = _latencies(["-m", "GET", f"{url}/health"])
        look_up = _latencies(["-m", "POST", "-T", "application/json", "-d", body, f"{url}/look_up"])
    return [
        Figure(
            "http",
            f"look-up over HTTP at {RATE} a second, p{percent} ({len(look_up):,} requests)",
            float(np.percentile(look_up, percent)),
            "s",
            float(np.percentile(floor, percent)),
            {"requests": len(look_up), "percentile": percent},
        )
        for percent in (50, 99)
    ]


def _latencies(arguments: list[str]) -> np.ndarray:
    """Seconds of each request."""
    command = ["hey", "-z", f"{SECONDS}s", "-c", str(CONNECTIONS)]
    command += ["-q", str(RATE // CONNECTIONS), "-o", "csv", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = list(csv.DictReader(io.StringIO(answer.stdout)))
    failed = [row["status-code"] for row in rows if row["status-code"] != "200"]
    if failed or not rows:
        raise RuntimeError(f"{len(failed)} of {len(rows)} requests failed: {set(failed)}")
    return np.array([float(row["response-time"]) for row in rows])


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str | None]:
    """A process that serves ``folder``; its address, or None if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"from recbole_uip.cli.bank_serve import serve; serve({str(folder)!r}, port={port})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        yield url if _answers(process, url) else None
    finally:
        process.terminate()
        process.wait()


def _answers(process: subprocess.Popen, url: str) -> bool:
    waited_until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < waited_until:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return True
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    return False
