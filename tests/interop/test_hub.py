"""A folder is uploaded with the client of the Hub to a local server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from jepa_audio.errors import UserError
from jepa_audio.interop.hub import push_folder
from jepa_audio.interop.hugging_face import export_hugging_face
from tests.interop.small_encoders import small_encoder


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that an upload needs."""

    files: ClassVar[set[str]] = set()
    calls: ClassVar[list[str]] = []
    refused: ClassVar[bool] = False

    def do_GET(self) -> None:
        self.answer({"id": "user/name", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.calls.append(self.path)
        here = f"http://{self.headers['Host']}"
        if self.refused:
            self.answer({"error": "you have no right to write"}, 403)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": f"{here}/user/name", "id": "user/name", "name": "user/name"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            chosen = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **chosen} for name in names]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            self.files.update(line["value"]["path"] for line in lines if line["key"] == "file")
            address = f"{here}/user/name/commit/{'1' * 40}"
            self.answer({"commitUrl": address, "commitOid": "1" * 40, "success": True})
        else:
            self.answer({})

    def answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files.clear()
    Hub.calls.clear()
    Hub.refused = False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def push(hub: str, folder: Path, cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jepa_audio", "export", "push", str(folder), "user/name"]
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_x", "HF_HOME": str(cache)}
    # No proxy for the local server.
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )


def test_all_files_of_a_folder_are_uploaded(hub: str, tmp_path: Path):
    folder = export_hugging_face(small_encoder("waveform"), tmp_path / "out")
    process = push(hub, folder, tmp_path)
    assert process.returncode == 0, process.stderr
    assert "user/name" in process.stdout
    assert "no licence is stated" in process.stderr + process.stdout
    assert Hub.files == {path.name for path in folder.iterdir()}
    assert len(Hub.files) == 5


def test_a_refusal_of_the_hub_is_one_sentence(hub: str, tmp_path: Path):
    folder = export_hugging_face(small_encoder("waveform"), tmp_path / "out", licence="mit")
    Hub.refused = True
    process = push(hub, folder, tmp_path)
    assert process.returncode == 1
    assert "user/name was not uploaded" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path):
    folder = export_hugging_face(small_encoder("waveform"), tmp_path / "out", licence="mit")
    process = push("http://127.0.0.1:9", folder, tmp_path)
    assert process.returncode == 1
    assert "the Hub could not be reached: " in process.stderr
    assert "check the network, or `HF_ENDPOINT`" in process.stderr
    assert "Traceback" not in process.stderr


def test_other_folders_and_names_are_refused_before_anything_is_sent(tmp_path: Path):
    with pytest.raises(UserError, match="is not a folder of `jepa-audio export hf`"):
        push_folder(tmp_path, "user/name")
    folder = export_hugging_face(small_encoder("waveform"), tmp_path / "out")
    for name in ("name", "a/b/c", "/name", "a b/c"):
        with pytest.raises(UserError, match=r"must be USER/NAME|cannot have this name"):
            push_folder(folder, name)
