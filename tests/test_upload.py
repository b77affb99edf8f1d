"""push() against a stand-in for the Hub on the loopback: what arrives, what a rerun sends again, what errors say.

The stand-in speaks the LFS protocol. hf_xet, which huggingface_hub prefers and whose protocol is its own, is switched
off in all tests but the one of its errors. push() runs in a process of its own: huggingface_hub reads its endpoint and
its switches when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPO = "somebody/my-griffin"
TOKEN = "hf_stand_in"
PUSH = """
import sys
from pathlib import Path
from recurrent_gemma_hf.conversion.upload import push
try:
    print(push(Path(sys.argv[1]), sys.argv[2], private=True))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class StandIn(ThreadingHTTPServer):
    """What the Hub knows: repositories, blobs by SHA-256, the files of the last commit; and what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.requests: list[str] = []
        self.failures: dict[str, list[int]] = {}  # statuses to answer with, by the start of "METHOD path", in order

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent_blobs(self) -> list[str]:
        return [line.removeprefix("PUT /blobs/") for line in self.requests if line.startswith("PUT /blobs/")]


class Handler(BaseHTTPRequestHandler):
    """The calls of huggingface_hub 1 and 2 for create_repo and upload_folder, as the Hub answers them."""

    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        """Nothing on stderr: the tests read the log in `requests`."""

    def answer(self, status: int, content: dict):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_call(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call = f"{self.command} {self.path}"
        self.server.requests.append(call)
        for start, statuses in self.server.failures.items():
            if call.startswith(start) and statuses:
                return self.answer(statuses.pop(0), {"error": "the stand-in was told to fail"})
        if not self.path.startswith("/blobs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, action in ROUTES.items():
            if found := re.fullmatch(pattern, call):
                return self.answer(*action(self.server, body, *found.groups()))
        return self.answer(404, {"error": f"the stand-in knows no {call}"})

    do_GET = do_POST = do_PUT = handle_call


def create_repo(hub: StandIn, body: bytes):
    wanted = json.loads(body)
    name = f"{wanted['organization']}/{wanted['name']}"
    if name in hub.repos:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
    private = wanted.get("private") or wanted.get("visibility") == "private"
    hub.repos[name] = "private" if private else "public"
    return 200, {"url": f"{hub.url}/{name}"}


def preupload(hub: StandIn, body: bytes):
    def describe(path: str) -> dict:
        content = hub.files.get(path)
        if content is None:
            oid = None
        elif path.endswith(".safetensors"):
            oid = hashlib.sha256(content).hexdigest()
        else:  # what git calls the blob
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    return 200, {"files": [describe(file["path"]) for file in json.loads(body)["files"]]}


def lfs_batch(hub: StandIn, body: bytes):
    def describe(blob: dict) -> dict:
        if blob["oid"] in hub.blobs:
            return blob
        return {**blob, "actions": {"upload": {"href": f"{hub.url}/blobs/{blob['oid']}"}}}

    return 200, {"transfer": "basic", "objects": [describe(blob) for blob in json.loads(body)["objects"]]}


def put_blob(hub: StandIn, body: bytes, oid: str):
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "the content is not what its name says"}
    hub.blobs[oid] = body
    return 200, {}


def commit(hub: StandIn, body: bytes):
    lines = [json.loads(line) for line in body.splitlines()]
    for line in lines:
        value = line["value"]
        if line["key"] == "lfsFile":
            hub.files[value["path"]] = hub.blobs[value["oid"]]
        elif line["key"] == "file":
            hub.files[value["path"]] = base64.b64decode(value["content"])
    hub.commits += 1
    return 200, {"commitUrl": f"{hub.url}/{REPO}/commit/{hub.commits}", "commitOid": str(hub.commits)}


ROUTES = {
    "POST /api/repos/create": create_repo,
    "POST /api/validate-yaml": lambda _hub, _body: (200, {"errors": [], "warnings": []}),
    f"POST /api/models/{REPO}/preupload/main": preupload,
    f"POST /{REPO}.git/info/lfs/objects/batch": lfs_batch,
    "PUT /blobs/([0-9a-f]{64})": put_blob,
    f"POST /api/models/{REPO}/commit/main": commit,
    f"GET /api/models/{REPO}(?:/revision/main)?": lambda hub, _body: (200, {"id": REPO, "sha": str(hub.commits)}),
}


@contextmanager
def running_hub() -> Iterator[StandIn]:
    with StandIn() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@pytest.fixture
def hub() -> Iterator[StandIn]:
    with running_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and the small files. Real weights are larger, the protocol is the same."""
    output = tmp_path / "my-griffin"
    output.mkdir()
    for name, content in {"config.json": b"{}", "README.md": b"---\nlicense: gemma\n---\n# A card\n"}.items():
        (output / name).write_bytes(content)
    for shard in (1, 2):
        (output / f"model-0000{shard}-of-00002.safetensors").write_bytes(bytes([shard]) * 300_000)
    return output


def push(folder: Path, hub_url: str, home: Path, repo: str = REPO, **environment: str) -> subprocess.CompletedProcess:
    """Without a home, so that no token of the person who runs the tests is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    kept |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    kept |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    command = [sys.executable, "-c", PUSH, str(folder), repo]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=100)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_arrives_whole_and_a_second_push_sends_nothing(hub: StandIn, folder: Path, tmp_path: Path):
    done = push(folder, hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/{REPO}/commit/1"
    assert hub.files == contents(folder)
    assert hub.repos == {REPO: "private"}
    assert len(hub.sent_blobs()) == 2

    hub.requests.clear()
    again = push(folder, hub.url, tmp_path)
    assert again.returncode == 0, again.stderr
    assert hub.commits == 1, "no empty commit"
    assert hub.sent_blobs() == []


def test_a_push_that_broke_off_is_resumed_by_the_next(hub: StandIn, folder: Path, tmp_path: Path):
    first, second = (sha256(folder / f"model-0000{shard}-of-00002.safetensors") for shard in (1, 2))
    hub.failures[f"PUT /blobs/{second}"] = [507]
    broken = push(folder, hub.url, tmp_path)
    assert broken.returncode == 1
    assert "ConnectionError: the upload to somebody/my-griffin broke off" in broken.stderr
    assert "model-00002-of-00002.safetensors" in broken.stderr, "the file is named"
    assert "run the same command again" in broken.stderr
    assert (hub.commits, hub.files) == (0, {}), "no commit points to weights that are not there"
    assert list(hub.blobs) == [first], "what arrived stays"

    hub.requests.clear()
    resumed = push(folder, hub.url, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert hub.sent_blobs() == [second], "only what is missing is sent"
    assert (hub.commits, hub.files) == (1, contents(folder))


def test_a_hiccup_of_the_server_is_retried_at_once(hub: StandIn, folder: Path, tmp_path: Path):
    hub.failures["PUT /blobs/"] = [503]
    done = push(folder, hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(hub.sent_blobs()) == 3
    assert hub.files == contents(folder)


def test_a_failed_commit_is_resumed_without_sending_a_blob(hub: StandIn, folder: Path, tmp_path: Path):
    hub.failures[f"POST /api/models/{REPO}/commit"] = [507]
    assert push(folder, hub.url, tmp_path).returncode == 1
    hub.requests.clear()
    assert push(folder, hub.url, tmp_path).returncode == 0
    assert (hub.sent_blobs(), hub.files) == ([], contents(folder))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_TOKEN": ""}, "PermissionError: no token to push to somebody/my-griffin with: run `hf auth login`"),
        ({"HF_TOKEN": "hf_of_another"}, "PermissionError: the token may not write to somebody/my-griffin"),
        ({"HF_HUB_OFFLINE": "1"}, "OfflineModeIsEnabled: .*HF_HUB_OFFLINE"),
        ({"HF_HUB_DISABLE_XET": "0"}, "ConnectionError: the upload to .* broke off.*run the same command again"),
    ],
    ids=str,
)
def test_what_keeps_a_push_from_the_hub_is_said(hub: StandIn, folder: Path, tmp_path: Path, environment, message):
    hub.failures[f"GET /api/models/{REPO}/xet-write-token"] = [403]
    done = push(folder, hub.url, tmp_path, **environment)
    assert done.returncode == 1
    assert re.search(message, done.stderr, re.DOTALL), done.stderr
    assert (hub.commits, hub.files) == (0, {})
    if environment.keys() & {"HF_HUB_OFFLINE"} or not environment.get("HF_TOKEN", TOKEN):
        assert hub.requests == [], "nothing is asked"


def test_nobody_answers(folder: Path, tmp_path: Path):
    with running_hub() as gone:
        url = gone.url
    done = push(folder, url, tmp_path)
    assert done.returncode == 1
    assert "ConnectionError: the upload to somebody/my-griffin broke off" in done.stderr


def test_bad_arguments_are_named_before_anything_is_sent(hub: StandIn, folder: Path, tmp_path: Path):
    done = push(folder, hub.url, tmp_path, repo="not/a/name")
    assert "ValueError: 'not/a/name' is no name of a repository" in done.stderr
    (folder / "config.json").unlink()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    done = push(folder, hub.url, tmp_path)
    assert re.search(
        r"ValueError: .*my-griffin holds no checkpoint: config.json and \*.safetensors missing", done.stderr
    )
    assert hub.requests == []
