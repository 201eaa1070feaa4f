"""``recbole-uip bank serve``: a bank, and perhaps a trained model, over HTTP."""

from __future__ import annotations

import dataclasses
import os
import socket
from argparse import _SubParsersAction
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip.bank.limits import ServiceSettings
from recbole_uip.cli.options import add_command
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["add_serve", "serve"]

HOST, PORT = "127.0.0.1", 8000
# More requests at a time are answered by 503; each may hold a body of max_bytes.
MAX_REQUESTS = 1024
# That a process that is told to stop waits for the requests that it has begun to read.
STOP_SECONDS = 5


def serve(
    folder: str | os.PathLike,
    *,
    host: str = HOST,
    port: int = PORT,
    write: bool = False,
    run: str | os.PathLike | None = None,
    model: str = "DeepFM",
    arm: str = "uip",
    settings: ServiceSettings | None = None,
) -> None:
    """Serve the bank in ``folder`` until the process is told to stop.

    Parameters
    ----------
    folder : path-like
        The bank.
    host, port
        Where to listen. There is no authentication: keep it on a private network.
    write : bool
        Whether to take events; one process at a time may.
    run : path-like, optional
        Output folder of a run, whose ``model`` and ``arm`` score.
    settings : ServiceSettings, optional
        Limits and intervals.

    Raises
    ------
    SettingsError
        If the bank or the run cannot be opened, the address cannot be listened to, or the extra
        ``serve`` is not installed.
    """
    try:
        import uvicorn

        from recbole_uip.bank.service import BankService, create_app
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("recbole_uip"):
            raise
        raise SettingsError(
            f"serving needs {error.name}, of the extra serve: pip install '.[serve]'"
        ) from error
    from recbole_uip.bank.bank import FeatureBank

    _check_address(host, port)
    with FeatureBank.open(folder, write=write) as bank:
        scorer = None
        if run is not None:
            from recbole_uip.bridge.serving import Scorer

            scorer = Scorer.load(run, model, arm, bank=bank)
        app = create_app(lambda: BankService(bank, scorer, settings))
        uvicorn.run(
            app,
            host=host,
            port=port,
            access_log=False,
            limit_concurrency=MAX_REQUESTS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )


def _check_address(host: str, port: int) -> None:
    if not 0 <= port <= 65535:
        raise SettingsError(f"--port={port} must be from 0 to 65535")
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            trial.bind(address)
    except OSError as error:
        raise SettingsError(
            f"--host={host} --port={port} cannot be listened to ({error}): give others"
        ) from error


def add_serve(actions: _SubParsersAction) -> None:
    """Add ``serve`` to the actions of ``recbole-uip bank``."""
    parser = add_command(
        actions,
        "serve",
        help="look-ups, matches, events and scores over HTTP (without authentication)",
    )
    parser.add_argument("folder", type=Path, help="the bank")
    parser.add_argument("--host", default=HOST, help=f"default: {HOST}")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    parser.add_argument(
        "--write", action="store_true", help="take events; one process at a time may"
    )
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="output folder of a run, to score with its model"
    )
    parser.add_argument("--model", default="DeepFM", help="of that run (default: DeepFM)")
    parser.add_argument("--arm", default="uip", help="of that run (default: uip)")
    for each in dataclasses.fields(ServiceSettings):
        what, default = each.metadata["help"], each.default
        parser.add_argument(
            f"--{each.name}", type=type(default), default=default, metavar="N",
            help=f"{what} (default: {default})",
        )  # fmt: skip
    parser.set_defaults(function=_serve, parser=parser)


def _serve(namespace: Namespace, overrides: list[str], command: str) -> None:
    if overrides:
        raise SettingsError(f"argument {overrides[0]!r} is not understood: see bank serve --help")
    serve(
        namespace.folder,
        host=namespace.host,
        port=namespace.port,
        write=namespace.write,
        run=namespace.run,
        model=namespace.model,
        arm=namespace.arm,
        settings=ServiceSettings(
            **{
                each.name: getattr(namespace, each.name)
                for each in dataclasses.fields(ServiceSettings)
            }
        ),
    )
