"""A model and data hub on 127.0.0.1 for tests: what the clients ask the real one, answered from memory.

    repos = {"datasets/MMInstruction/M3IT": m3it_repo(), "models/openai-community/gpt2-xl": model_repo(folder)}
    with Hub(repos) as hub:
        subprocess.run([sys.executable, "download_data.py"], env=hub.env(tmp_path))

`hf_hub_download`, dataset streaming and the `from_pretrained` of transformers and diffusers run against it unmodified.
A repository is {revision: {path: bytes}}. Clients read HF_ENDPOINT when imported, so what is tested runs in a process
of its own with `hub.env(home)`. `hub.log` lists the requests; a fault in `hub.faults` may answer or delay one first.
"""

import base64
import functools
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 1024  # files from this size on are "large": named by their sha256 instead of git's sha1
Repo = dict[str, dict[str, bytes]]


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    status: int


class Hub:
    """Serves `repos`, {"models/owner/name" or "datasets/owner/name": Repo}, while its `with` block
    runs."""

    def __init__(self, repos: dict[str, Repo]):
        self.repos = repos
        self.log: list[Request] = []
        self.faults: list[
            Callable[[Handler], bool]
        ] = []  # called with each request; True: it has been answered

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a client of this hub whose cache is in `home`."""
        return client_env(self.url, home, **extra)

    def requests(self, part: str) -> list[Request]:
        return [request for request in self.log if part in request.path]


def client_env(endpoint: str, home: Path, **extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return (
        inherited
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        | extra
    )


# What the hub says of a repository's files


@functools.lru_cache(maxsize=1024)  # each request asks for them
def names_of(data: bytes) -> tuple[str, str]:
    """What git and what LFS call a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(
        data
    ).hexdigest()


def commit_of(revision: str, files: dict[str, bytes]) -> str:
    digest = hashlib.sha1(revision.encode())
    for path in sorted(files):
        digest.update(path.encode() + names_of(files[path])[0].encode())
    return digest.hexdigest()


def file_entry(path: str, data: bytes) -> dict:
    git_id, large = names_of(data)
    entry = {"type": "file", "path": path, "oid": git_id, "size": len(data)}
    if len(data) >= LFS_BYTES:
        entry["lfs"] = {"oid": large, "size": len(data), "pointerSize": 134}
    return entry


def folder_entry(path: str) -> dict:
    return {
        "type": "directory",
        "path": path,
        "oid": hashlib.sha1(path.encode()).hexdigest(),
        "size": 0,
    }


def tree_entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """The entries below `folder` ("" is the root): its own, or with `recursive` those of all its
    folders."""
    prefix = f"{folder}/" if folder else ""
    entries = {}
    for path in sorted(path for path in files if path.startswith(prefix)):
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            parent = prefix + "/".join(parts[:depth])
            entries[parent] = folder_entry(parent)
        if recursive or len(parts) == 1:
            entries[path] = file_entry(path, files[path])
    return list(entries.values())


class Missing(Exception):
    """Answered as 404 with this error code, which is what the clients go by."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    KIND, REPO, REVISION = r"(models|datasets|spaces)", r"([^/]+/[^/]+|[^/]+)", r"([^/]+)"
    ROUTES = (  # (pattern, name of the method that gets the pattern's groups)
        (re.compile(r"/api/repos/create"), "create_repo"),
        (re.compile(r"/api/validate-yaml"), "accept_card"),
        (re.compile(rf"/api/{KIND}/([^/]+/[^/]+)/preupload/{REVISION}"), "choose_upload"),
        (re.compile(rf"/api/{KIND}/([^/]+/[^/]+)/commit/{REVISION}"), "commit"),
        (re.compile(rf"/api/{KIND}/([^/]+/[^/]+)/tree/{REVISION}(?:/(.*))?"), "send_tree"),
        (re.compile(rf"/api/{KIND}/([^/]+/[^/]+)/paths-info/{REVISION}"), "send_paths_info"),
        (re.compile(rf"/api/{KIND}/{REPO}(?:/revision/{REVISION})?"), "send_info"),
        (
            re.compile(rf"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/{REVISION}/(.+)"),
            "send_file",
        ),
    )

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if any(fault(self) for fault in self.server.hub.faults):
            return
        path = urlsplit(self.path).path
        try:
            for pattern, method in self.ROUTES:
                if match := pattern.fullmatch(path):
                    return getattr(self, method)(
                        *(unquote(group) if group else None for group in match.groups())
                    )
            raise Missing("NotFound")
        except Missing as missing:
            self.send(404, b"{}", {"X-Error-Code": str(missing), "X-Error-Message": str(missing)})

    do_GET = do_HEAD = do_POST = handle_request

    def find(
        self, kind: str | None, repo: str, revision: str | None
    ) -> tuple[str, dict[str, bytes]]:
        """(commit, files) of a revision given by its name or its commit."""
        revisions = self.server.hub.repos.get(f"{kind or 'models'}/{repo}")
        if revisions is None:
            raise Missing("RepoNotFound")
        for name, files in revisions.items():
            commit = commit_of(name, files)
            if (revision or "main") in (name, commit):
                return commit, files
        raise Missing("RevisionNotFound")

    def send_info(self, kind: str, repo: str, revision: str | None):
        commit, files = self.find(kind, repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        fixed = {
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": re.findall("^- (.+)$", files.get("README.md", b"").decode(), re.MULTILINE),
        }
        self.send_json({"_id": "0" * 24, "id": repo, "sha": commit, "siblings": siblings, **fixed})

    def send_tree(self, kind: str, repo: str, revision: str, folder: str | None):
        _, files = self.find(kind, repo, revision)
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in (
            "true",
            "1",
        )
        entries = tree_entries(files, folder or "", recursive)
        if folder and not entries:
            raise Missing("EntryNotFound")
        self.send_json(entries)

    def send_paths_info(self, kind: str, repo: str, revision: str):
        _, files = self.find(kind, repo, revision)
        entries = {entry["path"]: entry for entry in tree_entries(files, "", recursive=True)}
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.send_json([entries[path] for path in paths if path in entries])

    def send_file(self, kind: str | None, repo: str, revision: str, path: str):
        commit, files = self.find(kind, repo, revision)
        if path not in files:
            raise Missing("EntryNotFound")
        data, entry = files[path], file_entry(path, files[path])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first > last:
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.send(
            206,
            data[first : last + 1],
            headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
        )

    def create_repo(self):
        asked = json.loads(self.body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        self.server.hub.repos.setdefault(f"models/{name}", {"main": {}})
        self.send_json({"url": f"{self.server.hub.url}/{name}", "name": name, "id": name})

    def accept_card(self):
        self.send_json({"errors": [], "warnings": []})

    def choose_upload(self, kind: str, repo: str, revision: str):
        """Every file may come inside the commit."""
        files = json.loads(self.body)["files"]
        self.send_json(
            {
                "files": [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in files
                ]
            }
        )

    def commit(self, kind: str, repo: str, revision: str):
        _, files = self.find(kind, repo, revision)
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = commit_of(revision, files)
        url = f"{self.server.hub.url}/{repo}/commit/{oid}"
        self.send_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]):
        self.server.hub.log.append(
            Request(self.command, unquote(self.path), self.headers.get("Range"), status)
        )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Requests are in `hub.log`, not on standard error."""


# Repositories


def model_repo(folder: Path) -> Repo:
    """The files of a folder that save_pretrained has filled, as revision main."""
    folder = Path(folder)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {"main": {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}}


M3IT_RAW = "data/captioning/image_paragraph_captioning/image_paragraph_captioning_{}.jsonl"


def m3it_pictures(count: int) -> list[bytes]:
    """Small JPEGs, each of another size and colour."""
    from PIL import Image

    pictures = []
    for i in range(count):
        out = io.BytesIO()
        Image.new("RGB", (8 + i % 50, 8 + i // 50), (i * 40 % 256, 80, 120)).save(out, "JPEG")
        pictures.append(out.getvalue())
    return pictures


def m3it_rows(count: int) -> list[tuple[str | None, str]]:
    """(picture in base64, paragraph) of `count` rows."""
    paragraph = "Picture {} shows a plain colour. It is very small.  Nothing else is in it."
    return [
        (base64.b64encode(picture).decode(), paragraph.format(i))
        for i, picture in enumerate(m3it_pictures(count))
    ]


def m3it_repo(
    train=None, val=None, shards: int = 1, parquet: bool = True, rows_per_group: int = 2
) -> Repo:
    """M3IT's shape: a loading script and raw JSONL files on main, and the branch with parquet files
    of all subsets.

    `train` and `val` are lists like m3it_rows(); a split's rows are dealt in order to `shards`
    parquet files.
    """
    splits = {
        "train": train or m3it_rows(6),
        "validation": val or m3it_rows(3),
        "test": m3it_rows(1),
    }
    main = {"M3IT.py": b"import datasets\n", "README.md": b"---\nlicense: other\n---\n# M3IT\n"}
    branch = {".gitattributes": b"*.parquet filter=lfs\n"}
    for split, rows in splits.items():
        main[M3IT_RAW.format(split.replace("validation", "val"))] = raw_file(rows)
        size = -(-len(rows) // shards)
        for shard in range(shards):
            data = parquet_file(rows[shard * size : (shard + 1) * size], rows_per_group)
            branch[f"image-paragraph-captioning/{split}/{shard:04d}.parquet"] = data
        branch[f"coco/{split}/0000.parquet"] = parquet_file(m3it_rows(2), 2)  # must not be mixed in
    return {"main": main} | ({"refs/convert/parquet": branch} if parquet else {})


def raw_file(rows) -> bytes:
    lines = [
        {"image_str": picture, "input": "", "output": text, "meta": {}} for picture, text in rows
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def parquet_file(rows, rows_per_group: int) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "instruction": ["Describe the picture."] * len(rows),
        "inputs": [""] * len(rows),
        "image_base64_str": pyarrow.array(
            [[picture] for picture, _ in rows], pyarrow.list_(pyarrow.string())
        ),
        "outputs": pyarrow.array([text for _, text in rows], pyarrow.string()),
    }
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=rows_per_group)
    return out.getvalue()


def data_repo(
    splits: dict[str, list[dict]],
    kind: str = "parquet",
    config: str = "data",
    shards: int = 1,
    rows_per_group: int = 2,
) -> Repo:
    """A data set as people upload one: {split: rows} in files config/split-00000-of-00001.parquet
    (or .jsonl), the pictures in parquet as the hub keeps them, {"bytes", "path"}, with the features
    in the file's metadata."""
    files = {"README.md": b"---\nlicense: mit\n---\n# Tales\n"}
    for split, rows in splits.items():
        size = -(-len(rows) // shards)
        for shard in range(shards):
            part = rows[shard * size : (shard + 1) * size]
            data = json_file(part) if kind == "jsonl" else features_file(part, rows_per_group)
            files[f"{config}/{split}-{shard:05d}-of-{shards:05d}.{kind}"] = data
    return {"main": files}


def json_file(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def features_file(rows: list[dict], rows_per_group: int) -> bytes:
    """Rows as `Dataset.to_parquet` writes them: bytes, or lists of bytes, are pictures."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Features, Image, List, Value

    def feature(value):
        if isinstance(value, list):
            return List(feature(value[0]))
        return (
            Value("int64")
            if isinstance(value, int)
            else Value("string")
            if isinstance(value, str)
            else Image()
        )

    def stored(value):
        if isinstance(value, list):
            return [stored(one) for one in value]
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    features = Features({name: feature(value) for name, value in rows[0].items()})
    columns = {name: [stored(row[name]) for row in rows] for name in rows[0]}
    table = pyarrow.table(columns, schema=features.arrow_schema)
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, row_group_size=rows_per_group)
    return out.getvalue()
