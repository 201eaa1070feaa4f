import hashlib
import os
import stat
import subprocess
import sys

import pytest

from recbole_uip import files
from recbole_uip.files import LockedError, atomic_write, lock, remove_temporaries, sha256_of, unlock


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as file:
        file.write("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_mode_of_a_plain_one(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "new" / "file"
    plain.write_bytes(b"")
    with atomic_write(path) as file:
        file.write(b"content")
    assert path.stat().st_mode == plain.stat().st_mode
    assert path.read_bytes() == b"content"


def test_content_then_name_reach_the_disk(tmp_path, monkeypatch):
    path, steps = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("folder" if is_folder else f"{os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def replaced(source, target):
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with atomic_write(path, "w") as file:
        file.write("content")
    assert steps == ["7 bytes", "replace", "folder"]
    steps.clear()
    with atomic_write(tmp_path / "a" / "b" / "file", "w") as file:
        file.write("content")
    assert steps == ["7 bytes", "replace", *["folder"] * 3]  # b, and the names of b and a


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with atomic_write(tmp_path / "file", "w") as file:
        file.write("content")
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("size", [0, 1, 64, 65, 200])
def test_sha256_of_a_file_in_chunks(tmp_path, monkeypatch, rng, size):
    monkeypatch.setattr(files, "CHUNK", 64)
    path = tmp_path / "file"
    path.write_bytes(rng.bytes(size))
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_neither_recbole_nor_torch_is_imported():
    code = (
        "import sys, recbole_uip.files; "
        "sys.exit(any(name.split('.')[0] in ('recbole', 'torch') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_lock_is_of_one_process(tmp_path):
    path = tmp_path / "lock"
    file = lock(path)
    assert path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(LockedError, match=rf"this process \(pid {os.getpid()}\)"):
        lock(path)
    code = (
        "import sys; from recbole_uip.files import LockedError, lock\n"
        "try: lock(sys.argv[1])\nexcept LockedError as error: print(error)"
    )
    asked = [sys.executable, "-c", code, str(path)]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert said == f"another process (pid {os.getpid()})\n"
    unlock(file)
    assert path.read_text() == ""
    unlock(lock(path))


def test_temporary_files_of_killed_processes_go(tmp_path):
    with atomic_write(tmp_path / "kept"):
        names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 1
    for name in [*names, ".lock", "kept", ".kept.old"]:
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept.old", ".lock", "kept"]
    remove_temporaries(tmp_path / "none")
