import io
import urllib.error
import urllib.request
import zipfile

import pytest

from recbole_uip.bridge import create_dataset
from recbole_uip.bridge.config import UIPConfig
from recbole_uip.settings import SettingsError


def ml_1m(tmp_path):
    return UIPConfig("FM", "ml-1m", config_dict={"data_path": str(tmp_path), "gpu_id": ""})


def test_missing_ml_1m_says_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(*args, timeout, **kwargs):
        assert timeout <= 15
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(SettingsError) as error:
        create_dataset(ml_1m(tmp_path))
    for words in ("ml-1m.inter", str(tmp_path / "ml-1m"), "no route to host", "data_path"):
        assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_is_no_archive_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Answer(b"<html>"))
    with pytest.raises(SettingsError, match="not a zip"):
        create_dataset(ml_1m(tmp_path))
    assert list(tmp_path.iterdir()) == []


class Answer(io.BytesIO):
    def __init__(self, data):
        super().__init__(data)
        self.headers = {"Content-Length": str(len(data))}


def test_download(tmp_path, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        rows = "".join(f"{n % 5}\t{n % 7}\t{n % 5 + 1}\t{n}\n" for n in range(70))
        header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        file.writestr("ml-1m.inter", header + rows)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Answer(archive.getvalue()))
    assert len(create_dataset(ml_1m(tmp_path))) == 70


def test_unknown_dataset_and_missing_inter_file(tmp_path):
    settings = {"data_path": str(tmp_path), "gpu_id": "", "uip_facets": {}}
    config = UIPConfig("FM", "my-data", config_dict=settings)
    with pytest.raises(SettingsError, match="my-data.inter"):
        create_dataset(config)
    (tmp_path / "my-data").mkdir()
    with pytest.raises(SettingsError, match="my-data.inter"):
        create_dataset(config)
