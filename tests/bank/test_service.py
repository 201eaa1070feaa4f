"""The bank over HTTP: a real server, real clients, and what they are told when they err."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import uvicorn

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.limits import ServiceSettings
from recbole_uip.bank.service import BankService, create_app
from recbole_uip.bank.users import user_table
from recbole_uip.cli.bank_serve import add_serve
from recbole_uip.settings import SettingsError


class FakeScorer:
    """Scores by the length of the item's token; the bank's code of the user comes on top."""

    name = "Fake-uip"

    def __init__(self, bank):
        self.bank = bank

    def interaction(self, users, items, time, context):
        if context:
            raise SettingsError(f"context[{next(iter(context))!r}] is no context field")
        return self.bank.look_up_many(users)[:, 0] + np.array([len(item) for item in items])

    def predict(self, interaction):
        assert threading.current_thread().name.startswith("bank-scores")
        return interaction / 100


@contextlib.contextmanager
def serving(bank, scorer=None, **settings):
    """A client of a server in another thread; the bank is the server's until it ends."""
    services = []

    def make():
        services.append(BankService(bank, scorer, ServiceSettings(**settings)))
        return services[0]

    server = uvicorn.Server(uvicorn.Config(create_app(make), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            client.service = services[0]
            yield client
    finally:
        server.should_exit = True
        thread.join()


def post(client, path, content):
    answer = client.post(path, json=content)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def writer(empty_bank):
    with serving(empty_bank, FakeScorer(empty_bank), commit_seconds=1000) as client:
        yield client


def event(user, item, liked, when):
    return {"user": user, "item": item, "liked": liked, "time": when}


def test_every_endpoint(writer, model, tmp_path, users):
    none, states = np.zeros(0, np.int64), np.zeros((0, len(model.kernels.initial)), np.float32)
    nobody = user_table(model, [], none, none, np.zeros(0), states)
    with FeatureBank.create(tmp_path / "direct", model, nobody) as direct:
        health = writer.get("/health").json()
        assert health["status"] == "ok" and health["generation"] == 1 and health["writable"]
        assert health["users"] == len(users) and health["model"] == "Fake-uip"
        assert health["fields"] == list(direct.fields)
        assert health["match_fields"] == list(direct.match_fields)
        events = [event("new", f"i{n}", n % 2, float(n)) for n in range(1, 9)]
        assert post(writer, "/update", {"events": events[:5]}) == {"entered": 5}
        for each in events[5:]:
            assert post(writer, "/update", {"events": [each]}) == {"entered": 1}
        assert post(writer, "/update", {"events": []}) == {"entered": 0}
        for each in events:
            direct.update(*each.values())
        found = post(writer, "/look_up", {"users": ["new", "nobody"]})
        assert found["codes"] == direct.look_up_many(["new", "nobody"]).tolist()
        assert found["known"] == [True, False] and found["fields"] == health["fields"]
        items = ["i1", "i70", "no such item"]
        found = post(writer, "/match", {"user": "new", "items": items})
        assert found["tokens"] == direct.match("new", items).tolist()
        found = post(writer, "/score", {"user": "new", "items": items})
        code = int(direct.look_up("new")[0])
        assert found["scores"] == pytest.approx([(code + len(item)) / 100 for item in items])
    assert writer.get("/health").json()["uncommitted_events"] == 8
    assert post(writer, "/commit", None) == {"generation": 2}
    assert writer.get("/health").json()["uncommitted_events"] == 0
    with FeatureBank.open(writer.service.bank.folder) as reader:
        assert reader.state_of("new")[1] == 8


LATE = {"events": [event("u", "i1", 1, 5.0), event("u", "i2", 1, 4.0)]}


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        ("/look_up", {"usrs": ["a"]}, 422, "usrs is not known"),
        ("/look_up", {}, 422, "users is missing"),
        ("/look_up", {"users": ["a", 3]}, 422, "users.1=3 cannot be used: .*valid string"),
        ("/look_up", {"users": ["a", ""]}, 422, "users.1='' .*at least 1 character"),
        ("/look_up", {"users": ["a" * 300]}, 422, "users.0='aaa.*at most 256 characters"),
        ("/look_up", {"users": ["a"] * 21}, 413, "users has 21 entries.*most 20.*--max_users"),
        ("/look_up", ["a"], 422, r"the body=\['a'\] cannot be used"),
        ("/match", {"user": "a", "items": ["i"] * 21}, 413, "items has 21.*--max_items"),
        ("/score", {"user": "a", "items": ["i"] * 21}, 413, "items has 21.*--max_items"),
        ("/score", {"user": "a", "items": ["i"], "context": {"mood": 1}}, 422, "'mood'"),
        ("/update", {"events": [event("a", "b", 1, 1)] * 21}, 413, "events has 21"),
        ("/update", {"events": [event("a", "b", 0.5, 1)]}, 422, "liked=0.5 of user 'a'"),
        ("/update", {"events": [event("a", "b", 2, 1)] * 2}, 422, "liked is 2.0 in row 0"),
        ("/update", {"events": [{"item": "b"}]}, 422, "events.0.user is missing"),
        ("/update", {"events": [event("a", "b", 1, "now")]}, 422, "events.0.time='now'"),
        ("/update", {"events": [event("a", "b", 1, 1), {"user": "a", "item": "b"}]}, 422,
         "events.1.time is missing"),
        ("/update", {"events": [event("u000", "i1", 1, -1.0)]}, 422, "earlier than the user's"),
        ("/update", {**LATE, "late": "maybe"}, 422, "late='maybe' cannot be used"),
        ("/update", {"events": [], "pad": "x" * 20_000}, 413, "more than 16384 bytes"),
        ("/nowhere", {}, 404, "POST /nowhere: Not Found"),
        ("/health", {}, 405, "POST /health: Method Not Allowed"),
    ],
)  # fmt: skip
def test_errors_name_field_value_and_way_out(empty_bank, path, content, status, message):
    empty_bank.update("u000", "i1", 1, 0.0)
    limits = {"max_users": 20, "max_items": 20, "max_events": 20, "max_bytes": 1 << 14}
    with serving(empty_bank, FakeScorer(empty_bank), **limits) as client:
        answer = client.post(path, json=content)
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
        assert "\n" not in answer.json()["error"]
        assert re.search(message, answer.json()["error"]), answer.text
        assert post(client, "/look_up", {"users": ["a", "u"]})["known"] == [False, False]


def test_errors_of_the_body(writer):
    headers = {"content-type": "application/json"}
    for body in (b"{users", b"", b'{"users": ["\\ud800"]}', b"\xff\xfe"):
        answer = writer.post("/look_up", content=body, headers=headers)
        assert answer.status_code == 400 and "is not JSON" in answer.json()["error"]
    answer = writer.post(
        "/update", content=b'{"events": []}', headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]
    answer = writer.post(
        "/update",
        content=b'{"events": [{"user": "a", "item": "b", "time": NaN}]}',
        headers=headers,
    )
    assert answer.status_code == 422 and "events.0.time=nan" in answer.json()["error"]

    def endless():
        for _ in range(10_000):
            yield b"x" * 1024

    # Without a length that tells: cut off once it is too long.
    answer = writer.post("/look_up", content=endless(), headers=headers)
    assert answer.status_code == 413 and "4194304 bytes" in answer.json()["error"]


def test_late_events_may_be_dropped_or_applied(writer):
    post(writer, "/update", {"events": [event("u000", "i1", 1, 5.0)]})
    late = {"events": [event("u000", "i2", 1, 4.0), event("u001", "i2", 1, 4.0)]}
    assert writer.post("/update", json=late).status_code == 422
    assert post(writer, "/update", {**late, "late": "drop"}) == {"entered": 1}
    assert post(writer, "/update", {**late, "late": "apply"}) == {"entered": 2}


def test_a_reader_follows_the_writer_and_takes_no_events(empty_bank):
    with (
        FeatureBank.open(empty_bank.folder) as bank,
        serving(bank, FakeScorer(bank), refresh_seconds=0.05) as reader,
    ):
        for path, content in (("/update", {"events": [event("a", "b", 1, 1)]}), ("/commit", None)):
            answer = reader.post(path, json=content)
            assert answer.status_code == 403
            assert "served for reading: start its service with --write" in answer.json()["error"]
        items = [f"i{n}" for n in range(1, 9)]
        for when, item in enumerate(items):
            empty_bank.update("new", item, 1, float(when))
        assert not post(reader, "/look_up", {"users": ["new"]})["known"][0]
        empty_bank.commit()
        deadline = time.time() + 10
        while reader.get("/health").json()["generation"] != 2 and time.time() < deadline:
            time.sleep(0.02)
        found = post(reader, "/look_up", {"users": ["new"]})
        assert found["known"] == [True]
        assert found["codes"][0] == empty_bank.look_up("new").tolist()
        # The scorer reads the new state too.
        score = post(reader, "/score", {"user": "new", "items": ["i1"]})["scores"][0]
        assert score == pytest.approx((found["codes"][0][0] + 2) / 100)


def test_without_a_model_there_are_no_scores(empty_bank):
    with serving(empty_bank) as client:
        answer = client.post("/score", json={"user": "a", "items": ["b"]})
        assert answer.status_code == 404
        assert "--run" in answer.json()["error"]
        assert client.get("/health").json()["model"] is None


def test_commits_come_on_a_timer_and_at_the_end(empty_bank):
    folder = empty_bank.folder
    with serving(empty_bank, commit_seconds=0.1) as client:
        post(client, "/update", {"events": [event("a", "i1", 1, 1.0)]})
        deadline = time.time() + 10
        while client.get("/health").json()["uncommitted_events"] and time.time() < deadline:
            time.sleep(0.02)
        with FeatureBank.open(folder) as reader:
            assert "a" in reader
        generation = client.get("/health").json()["generation"]
        time.sleep(0.3)
        assert client.get("/health").json()["generation"] == generation  # nothing new
    with serving(empty_bank, commit_seconds=1000) as client:
        post(client, "/update", {"events": [event("b", "i1", 1, 1.0)]})
    with FeatureBank.open(folder) as reader:
        assert "b" in reader


def test_a_position_is_committed_with_its_events(empty_bank):
    folder = empty_bank.folder
    late = {"events": [event("a", "i1", 1, 0.0)], "late": "drop", "position": "offset 9"}
    with serving(empty_bank, commit_seconds=1000) as client:
        post(client, "/update", {"events": [event("a", "i1", 1, 1.0)], "position": "offset 7"})
        assert client.get("/health").json()["position"] is None
        post(client, "/commit", None)
        post(client, "/update", {"events": [event("b", "i1", 1, 1.0)]})
        post(client, "/commit", None)
        assert client.get("/health").json()["position"] == "offset 7"
        assert post(client, "/update", late) == {"entered": 0}
    with FeatureBank.open(folder) as reader:  # at the end, though no event has entered
        assert reader.position == "offset 9"


def test_a_commit_that_fails_is_told_and_tried_again(empty_bank, monkeypatch):
    broken = threading.Event()
    broken.set()
    commit = FeatureBank.commit

    def maybe(self, position=None):
        if broken.is_set():
            raise OSError("no space left")
        return commit(self, position)

    monkeypatch.setattr(FeatureBank, "commit", maybe)
    with serving(empty_bank, commit_seconds=0.05) as client:
        post(client, "/update", {"events": [event("a", "i1", 1, 1.0)]})
        deadline = time.time() + 10
        while client.get("/health").json()["status"] == "ok" and time.time() < deadline:
            time.sleep(0.02)
        health = client.get("/health").json()
        assert health["status"] == "degraded" and "no space left" in health["problem"]
        answer = client.post("/commit")
        assert answer.status_code == 500 and "events are kept" in answer.json()["error"]
        assert post(client, "/look_up", {"users": ["a"]})["known"] == [True]
        broken.clear()
        while client.get("/health").json()["status"] != "ok" and time.time() < deadline:
            time.sleep(0.02)
        assert client.get("/health").json()["uncommitted_events"] == 0


def test_look_ups_go_on_while_files_are_written_and_events_wait(empty_bank, monkeypatch):
    let_go = threading.Event()
    commit = FeatureBank.commit

    def slow(self, position=None):
        assert let_go.wait(10)
        return commit(self, position)

    monkeypatch.setattr(FeatureBank, "commit", slow)
    with serving(empty_bank, commit_seconds=1000) as client, ThreadPoolExecutor(3) as pool:
        post(client, "/update", {"events": [event("a", "i1", 1, 1.0)]})
        committing = pool.submit(post, client, "/commit", None)
        time.sleep(0.1)
        updates = [
            pool.submit(post, client, "/update", {"events": [event("a", "i2", 1, 2.0)]})
            for _ in range(2)
        ]
        time.sleep(0.1)
        assert post(client, "/look_up", {"users": ["a"]})["known"] == [True]
        assert not committing.done() and not any(update.done() for update in updates)
        let_go.set()
        assert committing.result() == {"generation": 2}
        assert [update.result() for update in updates] == [{"entered": 1}] * 2
        assert client.get("/health").json()["uncommitted_events"] == 2


def test_concurrent_events_and_look_ups(empty_bank, model, tmp_path, users):
    """Every look-up meets a state that one event has left, and the end is the single thread's."""
    rng = np.random.default_rng(8)
    people, threads = users[:24], 4
    events = {
        user: [
            event(user, f"i{rng.integers(1, 80)}", int(rng.integers(2)), float(when))
            for when in range(12)
        ]
        for user in people
    }
    folder, start = empty_bank.folder, {user: empty_bank.look_up(user).tolist() for user in people}
    allowed = {user: [codes] for user, codes in start.items()}
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("writer.lock"))
    with FeatureBank.open(tmp_path / "copy", write=True) as direct:
        for user in people:
            for each in events[user]:
                allowed[user].append(direct.update(*each.values()).tolist())
        done = threading.Event()

        def write(client, mine):
            for step in range(0, 12, 2):
                for user in mine:
                    # One by one, or in twos.
                    two = events[user][step : step + 2]
                    for part in [two] if step % 4 else [[each] for each in two]:
                        post(client, "/update", {"events": part})
                if step % 6 == 0:
                    post(client, "/commit", None)

        def read(client):
            met = 0
            while not done.is_set():
                found = post(client, "/look_up", {"users": people})["codes"]
                for user, codes in zip(people, found, strict=True):
                    assert codes in allowed[user]
                met += 1
            return met

        with (
            serving(empty_bank, commit_seconds=0.02) as client,
            ThreadPoolExecutor(threads + 2) as pool,
        ):
            reading = [pool.submit(read, client) for _ in range(2)]
            writing = [
                pool.submit(write, client, people[number::threads]) for number in range(threads)
            ]
            for each in writing:
                each.result()
            done.set()
            assert sum(each.result() for each in reading) > 4
        for bank in (empty_bank, FeatureBank.open(folder)):
            for user in people:
                for left, right in zip(bank.state_of(user), direct.state_of(user), strict=True):
                    np.testing.assert_array_equal(left, right)
                np.testing.assert_array_equal(bank.look_up(user), direct.look_up(user))


PROGRAM = """
import argparse
from recbole_uip.cli.bank_serve import add_serve
parser = argparse.ArgumentParser()
add_serve(parser.add_subparsers())
namespace = parser.parse_args()
namespace.function(namespace, [], "")
"""


@contextlib.contextmanager
def process(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, "serve", *map(str, arguments), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            deadline = time.time() + 60
            while time.time() < deadline and server.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    client.get("/health")
                    break
                time.sleep(0.05)
            yield server, client
    finally:
        server.kill()
        server.wait()


def test_a_killed_service_loses_what_was_not_committed_and_no_more(empty_bank, tmp_path, users):
    folder = empty_bank.folder
    empty_bank.close()
    shutil.copytree(folder, tmp_path / "copy")
    events = [event(users[n % 7], f"i{n % 79 + 1}", n % 2, float(n)) for n in range(100_000)]
    acknowledged, durable = 0, 0
    with process(folder, "--write", "--commit_seconds", 1000) as (server, client):
        killer = threading.Timer(1.0, os.kill, (server.pid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(httpx.TransportError):
            for each in events:
                post(client, "/update", {"events": [each]})
                acknowledged += 1
                if acknowledged % 20 == 0:
                    post(client, "/commit", None)
                    durable = acknowledged
        killer.join()
        assert server.wait() == -signal.SIGKILL
    assert 20 <= durable < len(events)
    with FeatureBank.open(folder, write=True) as bank:  # the lock died with the process
        survived = sum(bank.state_of(user)[1] for user in users)
        # A commit may have come to its end though its answer did not.
        assert durable <= survived <= acknowledged + 1
        states = {user: bank.state_of(user) for user in users[:7]}
    # What survived is the first events, and no other.
    with FeatureBank.open(tmp_path / "copy", write=True) as direct:
        for each in events[:survived]:
            direct.update(*each.values())
        for user, state in states.items():
            for left, right in zip(state, direct.state_of(user), strict=True):
                np.testing.assert_array_equal(left, right)


def test_a_stopped_service_commits(empty_bank):
    folder = empty_bank.folder
    empty_bank.close()
    with process(folder, "--write", "--commit_seconds", 1000, "--max_users", 2) as (server, client):
        post(client, "/update", {"events": [event("a", "i1", 1, 1.0)]})
        assert client.post("/look_up", json={"users": ["a"] * 3}).status_code == 413
        server.terminate()
        server.wait(30)
    with FeatureBank.open(folder) as bank:
        assert "a" in bank


def half_sent(client):
    """A connection that has sent less of a body than it has said."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)
    connection.sendall(
        b"POST /look_up HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
        b'content-length: 100\r\n\r\n{"users": ['
    )
    return connection


def test_half_a_body_is_not_waited_for(empty_bank):
    with serving(empty_bank, body_seconds=0.2) as client:
        with half_sent(client) as connection:
            answer = b""
            while part := connection.recv(1 << 16):  # until the server closes it
                answer += part
        assert answer.startswith(b"HTTP/1.1 408") and b"after 0.2 seconds: send it" in answer
        assert post(client, "/look_up", {"users": ["a"]})["known"] == [False]


def test_a_client_that_goes_away_leaves_no_traceback(empty_bank, capsys):
    with serving(empty_bank) as client:
        half_sent(client).close()
        for _ in range(20):
            post(client, "/look_up", {"users": ["a"]})
            time.sleep(0.01)
    assert "Traceback" not in capsys.readouterr().err


def test_a_service_that_is_told_to_stop_waits_for_no_half_body(empty_bank):
    folder = empty_bank.folder
    empty_bank.close()
    with process(folder, "--write", "--commit_seconds", 1000) as (server, client):
        post(client, "/update", {"events": [event("a", "i1", 1, 1.0)]})
        with half_sent(client):
            time.sleep(0.2)
            server.terminate()
            server.wait(20)
    with FeatureBank.open(folder) as bank:
        assert "a" in bank


def test_the_command_line(empty_bank):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_serve(parser.add_subparsers())
    namespace = parser.parse_args(["serve", "nowhere", "--port", "1"])
    with pytest.raises(SettingsError, match="there is no bank in nowhere"):
        namespace.function(namespace, [], "")
    with pytest.raises(SettingsError, match="'--uip_lm=x' is not understood"):
        namespace.function(namespace, ["--uip_lm=x"], "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port, why in (
            (taken.getsockname()[1], "cannot be listened to.*in use"),
            (99999, "must be from 0 to 65535"),
        ):
            namespace = parser.parse_args(["serve", str(empty_bank.folder), "--port", str(port)])
            with pytest.raises(SettingsError, match=f"--port={port} {why}"):
                namespace.function(namespace, [], "")
    namespace = parser.parse_args(["serve", "nowhere", "--max_users", "0"])
    with pytest.raises(SettingsError, match="max_users=0 must be a finite number above 0"):
        namespace.function(namespace, [], "")


def test_the_service_needs_neither_recbole_nor_torch():
    code = (
        "import sys, recbole_uip.bank.service, recbole_uip.cli.bank_serve; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'recbole', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_api_is_described(writer):
    paths = json.loads(writer.get("/openapi.json").text)["paths"]
    assert set(paths) == {"/health", "/look_up", "/match", "/update", "/score", "/commit"}
    schema = paths["/update"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]["events"]["items"]["properties"]) == {
        "user", "item", "liked", "time",
    }  # fmt: skip


def test_refresh_by_hand(empty_bank):
    async def follow():
        service = BankService(FeatureBank.open(empty_bank.folder))
        assert not await service.refresh()
        empty_bank.update("new", "i1", 1, 1.0)
        empty_bank.commit()
        assert await service.refresh() and "new" in service.bank

    asyncio.run(follow())
