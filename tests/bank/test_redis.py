"""The codes in a real Redis, beside the bank's own look-ups."""

import shutil
import subprocess
import threading
import time

import numpy as np
import pytest

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.export import RedisLookup, from_redis, to_redis
from recbole_uip.bank.store import BankError
from recbole_uip.settings import SettingsError

from .test_export import Run, command

redis = pytest.importorskip("redis", reason="the Redis client is not installed: pip install redis")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Redis of our own on a Unix socket, so that no port is taken and no data touched."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("no redis-server on this machine: apt-get install redis-server")
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "s"  # a socket's path may have no more than about 100 characters
    process = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(unix_socket_path=str(socket))
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    else:
        process.kill()
        pytest.skip(f"{program} does not start")
    yield socket
    process.terminate()
    process.wait()


@pytest.fixture
def client(server):
    client = redis.Redis(unix_socket_path=str(server))
    client.flushall()
    yield client
    client.close()


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def bank(main_job):
    return main_job.bank()


def keys(client, pattern="*"):
    return sorted(key.decode() for key in client.scan_iter(match=pattern))


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_look_ups_are_the_banks(bank, client, batch):
    client.set("other", "stays")
    assert to_redis(bank, client, batch=batch) == len(bank)
    lookup = RedisLookup(client)
    assert lookup.fields == bank.fields
    assert lookup.generation == bank.generation and len(lookup) == len(bank)
    users = [*bank.users(), "nobody", ""]
    for user in users:
        codes = lookup.look_up(user)
        np.testing.assert_array_equal(codes, bank.look_up(user))
        assert codes.dtype == np.int32
    np.testing.assert_array_equal(lookup.look_up_many(users), bank.look_up_many(users))
    assert lookup.look_up_many([]).shape == (0, len(bank.fields))
    assert keys(client) == sorted(
        [*(f"uip:1:{user}" for user in bank.users()), "uip:meta", "other"]
    )


def test_a_user_takes_one_byte_a_code(bank, client):
    to_redis(bank, client)
    key = f"uip:1:{bank.users()[0]}"
    assert client.strlen(key) == len(bank.fields)
    assert client.memory_usage(key) < 100


def test_codes_above_255_take_two_bytes(bank, client, monkeypatch):
    wide = bank.look_up_many(bank.users()) * 300
    infos = [info for info in bank.model.encoder.fields]
    object.__setattr__(infos[0], "size", 5000)
    try:
        monkeypatch.setattr(bank, "look_up_many", lambda users: wide[: len(users)])
        to_redis(bank, client)
        np.testing.assert_array_equal(RedisLookup(client).look_up_many(bank.users()), wide)
        assert client.strlen(f"uip:1:{bank.users()[0]}") == 2 * len(bank.fields)
    finally:
        object.__setattr__(infos[0], "size", 8)


def test_a_second_export_replaces_the_first(main_job, client):
    with FeatureBank.open(main_job.folder / "bank", write=True) as bank:
        to_redis(bank, client, "x[1]*:")
        lookup = from_redis(client, "x[1]*:")
        before = bank.look_up_many(bank.users())
        for user in bank.users()[:20]:
            for item in range(8):
                bank.update(user, f"i{item}", 1.0)
        bank.update("new", "i1", 1.0)
        assert (bank.look_up_many(bank.users()[:-1]) != before).any()
        client.set("x[1]*:2:left over", b"of an export that was killed")
        client.set("x[1]*:0:left over", b"of one that was killed while it deleted the one before")
        client.set("x1abc:1:u000", "not ours")
        to_redis(bank, client, "x[1]*:")
        # A reader that was open all along comes by the new codes too.
        users = bank.users()
        np.testing.assert_array_equal(lookup.look_up_many(users), bank.look_up_many(users))
        assert len(lookup) == len(before) + 1
    assert len(keys(client)) == len(users) + 2
    assert client.get("x1abc:1:u000") == b"not ours"


def test_readers_see_one_export_or_the_next(main_job, client, server):
    """While exports follow each other, all users of one look-up are of the same one."""
    with FeatureBank.open(main_job.folder / "bank", write=True) as bank:
        users, versions = bank.users(), []
        done, problems = threading.Event(), []
        to_redis(bank, client, batch=5)
        versions.append(bank.look_up_many(users))

        def read():
            own = redis.Redis(unix_socket_path=str(server))
            lookup = RedisLookup(own)
            while not done.is_set():
                codes = lookup.look_up_many(users)
                if not any(np.array_equal(codes, version) for version in list(versions)):
                    problems.append(codes)
            own.close()

        thread = threading.Thread(target=read)
        thread.start()
        for number in range(15):
            for user in users:
                bank.update(user, f"i{number}", float(number % 2))
            versions.append(bank.look_up_many(users))
            to_redis(bank, client, batch=5)
        done.set()
        thread.join()
    assert not problems


def test_errors_name_the_way_out(bank, client, server):
    with pytest.raises(BankError, match="no key 'uip:meta'"):
        RedisLookup(client)
    decoding = redis.Redis(unix_socket_path=str(server), decode_responses=True)
    with pytest.raises(BankError, match="decode_responses"):
        to_redis(bank, decoding)
    client.set("uip:meta", "something else")
    for act in (lambda: to_redis(bank, client), lambda: RedisLookup(client)):
        with pytest.raises(BankError, match="not of recbole-uip"):
            act()
    client.set("uip:meta", '{"format": 99}')
    with pytest.raises(BankError, match="format 99"):
        RedisLookup(client)
    with pytest.raises(BankError, match="batch=0"):
        to_redis(bank, client, "y:", batch=0)


def test_an_empty_prefix_deletes_nobodys_keys(bank, client):
    client.set("17:session", "another program's")
    with pytest.raises(BankError, match="prefix=''"):
        to_redis(bank, client, "")
    assert keys(client) == ["17:session"]


def test_users_are_given_as_strings(bank, client):
    to_redis(bank, client)
    lookup = RedisLookup(client)
    with pytest.raises(BankError, match="users='196' is a text: give a list of users"):
        lookup.look_up_many("196")
    for wrong in (196, ["196"], None):
        with pytest.raises(BankError, match="user"):
            lookup.look_up(wrong)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@127.0.0.1:1/0",
        "redis://me:hunter2@127.0.0.1:1/0",
        "redis://:hunter2#@127.0.0.1:1/0",
        "redis://:p@hunter2@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?db=0&password=hunter2",
        "rdis://:hunter2@127.0.0.1:1/0",
    ],
)
def test_passwords_are_not_shown(main_job, url, capsys):
    with pytest.raises(SettingsError, match="--url=.*127.0.0.1") as told:
        command("export", "redis", "--bank", main_job.folder / "bank", "--url", url)
    assert "hunter2" not in str(told.value) + "".join(capsys.readouterr())


def test_the_command(main_job, client, server, capsys, bank):
    place = ["--bank", main_job.folder / "bank", "--url"]
    command("export", "redis", *place, f"unix://{server}", "--prefix", "p:")
    np.testing.assert_array_equal(
        RedisLookup(client, "p:").look_up_many(bank.users()), bank.look_up_many(bank.users())
    )
    assert f"{len(bank)} users" in capsys.readouterr().out
    for url in ("redis://127.0.0.1:1/0", "nonsense"):
        with pytest.raises(SettingsError, match=f"--url={url}"):
            command("export", "redis", *place, url)
