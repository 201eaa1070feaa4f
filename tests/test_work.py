"""Work that is spread over processes ends with the one that asked for it."""

from __future__ import annotations

import subprocess
import sys

WORKER = """
import time
from recbole_uip.work import stop_with_parent
stop_with_parent()
print("started", flush=True)
try:
    for _ in range(600):
        time.sleep(0.1)
finally:
    print("tidied", flush=True)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_worker_tidies_and_ends_when_its_parent_is_killed():
    command = [sys.executable, "-c", PARENT, WORKER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        # the pipe is the worker's as well, so this waits for the worker's end
        assert parent.stdout.read() == "tidied\n"
