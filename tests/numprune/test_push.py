"""`numprune push` against a local server that answers as the Hub's API does."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from numprune.card import write_card
from numprune.checkpoint import fingerprint, load_model
from numprune.errors import NumpruneError
from numprune.plan import GroupPlan, PruningPlan, Source
from numprune.push import push
from numprune.saving import save_pruned
from tests.numprune.test_stock import cut_uniformly

COMMIT = "1" * 40
TOKEN = "hf_" + "t0ken" * 6


@pytest.fixture
def folder(make_checkpoint, tmp_path):
    dense = make_checkpoint()
    model = cut_uniformly(load_model(dense, dtype=torch.float32), 3)
    source = Source("maker/model", "0123abc", fingerprint(dense), "none")
    groups = {"0.attention": GroupPlan(4, (1, 2, 3), 100, 0.1, 0.05)}
    recipe = {"selection": "obs", "allocation": "uniform", "recovery": "refit", "steps": 1}
    plan = PruningPlan(source, recipe, "0.25", 0.1, groups)
    form = save_pruned(model, dense, tmp_path / "pruned", plan, torch.zeros(1, 2, dtype=torch.long))
    write_card(tmp_path / "pruned", form)
    return tmp_path / "pruned"


@pytest.fixture
def hub():
    """Keeps what is uploaded; `repositories` says which of them are private."""
    kept = SimpleNamespace(repositories={}, files={}, tokens=set(), objects={})

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self):
            kept.tokens.add(self.headers.get("Authorization"))
            name = "/".join(self.path.removeprefix("/api/models/").split("?")[0].split("/")[:2])
            if name not in kept.repositories:
                self.answer({"error": "not found"}, 404)
            else:
                self.answer(
                    {"id": name, "modelId": name, "private": kept.repositories[name], "tags": [], "siblings": []}
                )

        def do_POST(self):
            kept.tokens.add(self.headers.get("Authorization"))
            text = self.body()
            if self.path == "/api/repos/create":
                asked = json.loads(text)
                name = f"{asked['organization']}/{asked['name']}"
                if name in kept.repositories:
                    self.answer({"error": "exists", "url": f"{address}/{name}"}, 409)
                    return
                kept.repositories[name] = asked.get("private", asked.get("visibility") == "private")
                self.answer({"url": f"{address}/{name}", "id": name})
            elif self.path == "/api/validate-yaml":  # Of the card.
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(text)["files"]
                ]
                self.answer({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                wanted = json.loads(text)["objects"]
                self.answer(
                    {
                        "transfer": "basic",
                        "objects": [
                            {**entry, "actions": {"upload": {"href": f"{address}/objects/{entry['oid']}"}}}
                            for entry in wanted
                        ],
                    }
                )
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                files = kept.files.setdefault(name, {})
                for line in text.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        files[value["path"]] = kept.objects[value["oid"]]
                self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{address}/{name}/commit/{COMMIT}"})
            else:
                self.answer({"error": self.path}, 404)

        def do_PUT(self):
            kept.objects[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = kept.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kept
    server.shutdown()
    server.server_close()


# Runs several commands in one process: Hugging Face's variables are read when it starts.
PROGRAM = """
import contextlib, io, json, sys
from numprune.cli import main
for arguments in json.load(sys.stdin):
    sys.argv = ["numprune", "push", *arguments]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, output.getvalue(), errors.getvalue()]))
"""


def run(hub, *commands):
    """Exit code, output and errors of each `numprune push`."""
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([[str(argument) for argument in arguments] for arguments in commands]),
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [
        SimpleNamespace(code=code, out=out, err=err) for code, out, err in map(json.loads, done.stdout.splitlines())
    ]


def test_a_folder_arrives_whole_and_private(hub, folder):
    hub.repositories["team/public"] = False
    done, refused, public = run(
        hub, [folder, "team/model"], [folder, "team/public"], [folder, "team/other", "--public"]
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"{hub.address}/team/model/commit/{COMMIT}"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files["team/model"] == files
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}  # The card is checked without.
    assert refused.code == 2
    assert "public already" in refused.err
    assert public.code == 0, public.err
    assert hub.repositories == {"team/model": True, "team/public": False, "team/other": False}
    assert hub.files.keys() == {"team/model", "team/other"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "pruning_plan.json").unlink(), "no pruned checkpoint"),
        (lambda folder: (folder / "README.md").unlink(), "no pruned checkpoint"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "calibration" / "optimizer.pt").touch(), "may hold a pickle"),
        (lambda folder: (folder / "passwords").symlink_to("/etc/passwd"), "is a link"),
    ],
)
def test_what_must_not_be_uploaded_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(NumpruneError, match=message):
        push(folder, "team/model")


@pytest.mark.parametrize("name", ["model", "team/model/more", "team/mo del"])
def test_names_that_are_none_are_refused(folder, name):
    with pytest.raises(NumpruneError, match=r"no repository|no owner"):
        push(folder, name)


def test_the_card_says_what_was_done_and_how_to_load(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("maker/model", "0123abc", "25.00%", "MistralForCausalLM", "refuses the head count", "vllm serve"):
        assert part in card
    assert "| 2 | 6 | 3 | 24 |" in card
    assert "trust_remote_code" not in card
