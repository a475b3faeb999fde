"""Real folders, a local server that answers as the Hub's API does, a local feed."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from safetensors.torch import save_file

from numprune.errors import NumpruneError
from tasks.download import folder_revision
from tasks.parameters import Download, FeedSource, FolderSource, HubSource, Watch
from tasks.releases.sources import FeedReleases, FolderReleases, HubReleases, Release, find_releases, safe_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = Callable[[BaseHTTPRequestHandler], None]


def save_model(folder: Path, weight: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    save_file({"weight": torch.full((2,), weight)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(request: BaseHTTPRequestHandler, content: bytes, status: int = 200) -> None:
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


def watched(path: Path, pattern: str = "*", settle_seconds: float = 0) -> list[Release]:
    return list(FolderReleases(FolderSource(kind="folder", path=str(path), pattern=pattern), settle_seconds).releases())


def test_every_complete_folder_that_matches_is_a_release(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save_model(tmp_path / "good-1.5")
    save_model(tmp_path / "other")
    truncated = save_model(tmp_path / "good-truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (tmp_path / "good-empty").mkdir()
    (tmp_path / "good-file").touch()
    assert watched(tmp_path, "good*") == [
        Release("good-1_5", Download(folder=str(good), revision=folder_revision(good)))
    ]
    left_out = [record.args[0].name for record in caplog.records if record.levelno == logging.WARNING]  # type: ignore[index, union-attr]
    assert left_out == ["good-empty", "good-truncated"]


def test_folder_that_is_still_written_waits(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    assert watched(tmp_path, settle_seconds=60) == []
    time.sleep(0.3)
    assert len(watched(tmp_path, settle_seconds=0.2)) == 1
    (tmp_path / "model/tokenizer.json").touch()
    assert watched(tmp_path, settle_seconds=0.2) == []


def test_new_content_is_a_new_release(tmp_path: Path) -> None:
    (first,) = watched(save_model(tmp_path / "model").parent)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model/model.safetensors")
    (second,) = watched(tmp_path)
    assert first.name == second.name
    assert first.revision != second.revision


def test_hub_lists_the_commit_of_every_model_of_an_owner(
    serve: Callable[[Answer], str], caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[dict[str, list[str]]] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        address = urlsplit(request.path)
        assert address.path == "/api/models"
        asked.append(parse_qs(address.query))
        if "cursor" in asked[-1]:
            content = [{"id": "maker/Model-2", "sha": "1" * 40}, {"id": "maker/Model-3", "sha": None}]
        else:
            content = [{"id": "maker/Model-1.5B", "sha": COMMIT}, {"id": "maker/dataset", "sha": COMMIT}]
            request.send_response(200)
            body = json.dumps(content).encode()
            request.send_header("Link", f'<http://{request.headers["Host"]}/api/models?cursor=2>; rel="next"')
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
            return
        send(request, json.dumps(content).encode())

    source = HubSource(kind="hub", owner="maker", pattern="Model-*")
    assert list(HubReleases(source, endpoint=serve(answer)).releases()) == [
        Release("maker--Model-1_5B", Download(repository="maker/Model-1.5B", revision=COMMIT)),
        Release("maker--Model-2", Download(repository="maker/Model-2", revision="1" * 40)),
    ]
    assert asked[0]["author"] == ["maker"]
    assert asked[0]["filter"] == ["safetensors"]
    assert "maker/Model-3 is left out" in caplog.text


def test_hub_that_fails_is_one_message(serve: Callable[[Answer], str]) -> None:
    source = HubSource(kind="hub", owner="maker")
    endpoint = serve(lambda request: send(request, b"{}", status=403))
    with pytest.raises(NumpruneError, match="cannot list the models of maker"):
        list(HubReleases(source, endpoint=endpoint).releases())


ENTRIES = [
    {"name": "ours", "repository": "maker/ours", "revision": COMMIT},
    {"name": "on disk", "folder": "/models/ours", "revision": "2" * 64},
    {"name": "no revision", "repository": "maker/ours"},
    {"name": "short", "repository": "maker/ours", "revision": "12"},
    "no entry",
]


def feed(url: str) -> FeedReleases:
    return FeedReleases(FeedSource(kind="feed", url=url), max_bytes=10_000, seconds=1.0)


def test_feed_over_http(serve: Callable[[Answer], str], caplog: pytest.LogCaptureFixture) -> None:
    url = serve(lambda request: send(request, json.dumps(ENTRIES).encode()))
    found = list(feed(url).releases())
    assert [release.download for release in found] == [
        Download(repository="maker/ours", revision=COMMIT),
        Download(folder="/models/ours", revision="2" * 64),
    ]
    assert found[0].name == "ours"
    assert found[1].name.startswith("on-disk-")
    assert len(caplog.records) == 3


def test_feed_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "feed.json"
    path.write_text(json.dumps(ENTRIES[:1]), encoding="utf-8")
    assert [release.name for release in feed(path.as_uri()).releases()] == ["ours"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"{}", "is no JSON list"), (b"<html>", "cannot read"), (b"[" + b" " * 20_000 + b"]", "larger than 10000 bytes")],
)
def test_feed_that_is_none(serve: Callable[[Answer], str], content: bytes, complaint: str) -> None:
    url = serve(lambda request: send(request, content))
    with pytest.raises(NumpruneError, match=complaint):
        list(feed(url).releases())


def test_feed_that_drips_is_given_up(serve: Callable[[Answer], str]) -> None:
    def drip(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        for _ in range(40):
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.1)

    start = time.monotonic()
    with pytest.raises(NumpruneError, match="takes longer than 1 s"):
        list(feed(serve(drip)).releases())
    assert time.monotonic() - start < 3


def test_feed_of_another_kind_of_address() -> None:
    with pytest.raises(NumpruneError, match="must begin with"):
        list(feed("ftp://example.invalid/feed").releases())


def test_source_that_fails_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path / "models/model")
    sources = [
        FolderSource(kind="folder", path=str(tmp_path / "absent")),
        FeedSource(kind="feed", url=(tmp_path / "absent.json").as_uri()),
        FolderSource(kind="folder", path=str(tmp_path / "models")),
    ]
    found = list(find_releases(Watch(sources=sources, settle_seconds=0)))
    assert [release.name for release in found] == ["model"]
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2


@pytest.mark.parametrize(
    ("name", "safe"), [("llama-3.1-8b", "llama-3_1-8b"), ("meta-llama--Llama-3.1-8B", "meta-llama--Llama-3_1-8B")]
)
def test_safe_names(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_names_that_differ_stay_different() -> None:
    names = ["a b", "a-b", "a/b", "a\nb", "-a-b", "a@{b", "a..b"]
    assert len({safe_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["", "...", "../..", "reference-llama", "-"])
def test_names_that_cannot_be_used(name: str) -> None:
    with pytest.raises(NumpruneError, match="cannot be the name of a release"):
        safe_name(name)
