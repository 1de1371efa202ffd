"""Uploading, to a server started here that speaks as much of the hub's protocol as it needs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from tiny_models import build, logits

import mpop
from mpop.checkpoints import folder


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed, by path."""

    files: dict[str, bytes]
    made: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/user/name"
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer({"url": address})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            # Every file is small enough to be part of the commit itself.
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **how} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            self.answer({"commitUrl": f"{address}/commit/1", "commitOid": "1"})
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        name = self.path.rpartition("/")[2]
        found = name in self.files
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", "1")
            self.send_header("X-Repo-Commit", "1")
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.files[name])) if found else "0")
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(self.files[name])

    do_GET = do_HEAD

    def answer(self, found: dict[str, Any]) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(folder, "HfApi", partial(HfApi, endpoint=endpoint))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


def test_what_is_pushed_is_what_is_saved(hub: type[Hub], tmp_path: Path) -> None:
    model = build("bert")
    mpop.compress(model, mpop.CompressionConfig(compression=0.5))
    about = {"base_model": "some/bert", "license": "mit"}
    address = mpop.push_to_hub(model, "user/name", **about, private=True, token="hf_x")
    assert address.endswith("/user/name/commit/1")
    assert hub.made[0]["name"] == "name" and hub.made[0]["visibility"] == "private"
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    again = mpop.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("some/bert", "mit")
    # A card that somebody has written there stays, and the weights are those of the second push.
    hub.files.clear()
    hub.files["README.md"] = b"mine"
    mpop.push_to_hub(model, "user/name", token="hf_x")
    assert hub.files["README.md"] == b"mine" and "model.safetensors" in hub.files
    # One of this package is brought up to date.
    hub.files["README.md"] = (tmp_path / "README.md").read_bytes() + b"mine"
    model.get_submodule("bert.encoder.layer.0.attention.self.query").round(max_rank=2)
    mpop.push_to_hub(model, "user/name", token="hf_x")
    text = hub.files["README.md"].decode()
    assert "| 2 2 2 2 |" in text and text.endswith("mine") and "base_model: some/bert" in text


def test_a_dense_model_is_not_pushed(hub: type[Hub]) -> None:
    with pytest.raises(ValueError, match="expected a compressed model, got a dense Bert"):
        mpop.push_to_hub(build("bert"), "user/name", token="hf_x")
    assert hub.made == []
