"""Real services for tests, on loopback and in folders of their own: Prefect, SeaweedFS, a Ray head; and an endpoint for
judges that says what a test wants.

Each is a context manager that picks free ports, waits until the service answers, shows the tail of its log when it does
not, and ends only the processes that it started. Environments are explicit: a service never sees the credentials or the
servers of the person who runs the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
READY = 120.0  # seconds; a cold start takes 5-25 s, a busy machine several times that

_FOREIGN = ("PREFECT_", "RAY_", "AWS_", "PREFSIEVE_", "HF_")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without anybody's services and credentials, and offline; then `extra`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    kept["PATH"] = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"  # a job's `python` is the one that runs the tests
    private = {"DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    return {**kept, **private, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", **extra}


def prefsieve(
    *arguments: str | Path, env: dict[str, str], cwd: Path = ROOT, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; standard output and error are kept apart."""
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False)


def free_ports(count: int, twin: int = 0) -> list[int]:
    """Ports that nobody listens on; with `twin`, port + twin is free too."""
    found: list[int] = []
    while len(found) < count:
        # Below the ephemeral range: nobody's outgoing connection takes it. Not by the seed that trainings set.
        port = random.SystemRandom().randrange(20_000, 32_000)
        if port not in found and _is_free(port) and (not twin or _is_free(port + twin)):
            found.append(port)
    return found


# --- Prefect


@contextlib.contextmanager
def prefect_server(folder: Path, database: str = "") -> Iterator[str]:
    """A Prefect server; yields its API's URL. database: its URL, empty for SQLite."""
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    env = environment(PREFECT_HOME=str(folder), PREFECT_API_URL=url, PREFECT_SERVER_LOGGING_LEVEL="WARNING")
    if database:
        env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with _running("prefect server", command, env, folder) as check:
        _wait("prefect server", lambda: _answers(f"{url}/health"), check)
        yield url


def postgresql_programs() -> Path | None:
    """Where Debian's package has put the newest one's."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL server; yields the URL of a database, as Prefect takes it."""
    programs, [port] = postgresql_programs(), free_ports(1)
    assert programs
    with tempfile.TemporaryDirectory(prefix="postgresql-") as place:
        folder, word = Path(place), Path(place, "password")
        word.write_text(secrets.token_hex(16))
        user: list[str | Path] = []
        if os.geteuid() == 0:  # which it refuses to run as
            user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(folder, "postgres")
            shutil.chown(word, "postgres")
        data = ["-D", folder / "data"]
        make = [programs / "initdb", *data, "--username=prefect", f"--pwfile={word}", "--auth=scram-sha-256"]
        subprocess.run([*user, *make], check=True, capture_output=True, cwd=folder)
        serve = [*user, programs / "postgres", *data, "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        command, env = [str(part) for part in serve], {"PATH": os.environ["PATH"]}
        with _running("postgresql", command, env, folder, folder, signal.SIGINT) as check:
            _wait("postgresql", lambda: _listens(port), check)
            yield f"postgresql+asyncpg://prefect:{word.read_text()}@127.0.0.1:{port}/postgres"


def _listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def prefect_worker(api_url: str, pool: str, folder: Path, cwd: Path = ROOT, **extra: str) -> Iterator[None]:
    """A process worker of the pool, started in `cwd`; goes on once the server lists it."""
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(PREFECT_HOME=str(folder), PREFECT_API_URL=api_url, PREFECT_WORKER_QUERY_SECONDS="1", **extra)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]

    def online() -> bool:
        workers = json.loads(_fetch(f"{api_url}/work_pools/{pool}/workers/filter", data=b"{}"))
        return any(worker["status"] == "ONLINE" for worker in workers)

    with _running("prefect worker", command, env, folder, cwd) as check:
        _wait("prefect worker", online, check)
        yield


# For processes that join the Ray of this one: on loopback, which they would make this machine's other address.
JOINING = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

PATIENCE = 150.0  # seconds; Prefect's server may wait for a lock of SQLite for 60, more than once


def unlocked(ask: Callable[[], httpx.Response]) -> httpx.Response:
    """An answer of the server, whose SQLite a busy machine locks now and then; Prefect's client asks again, too."""
    deadline = time.monotonic() + 120
    while (answer := ask()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(1)
    return answer


# --- SeaweedFS


@dataclass
class SeaweedFS:
    """An S3 server that checks signatures, with one bucket. May be stopped and started again: its data stay."""

    folder: Path
    bucket: str = "prefsieve"
    access_key: str = "tester"
    secret_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    ports: list[int] = field(default_factory=lambda: free_ports(5, twin=10_000))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def environment(self) -> dict[str, str]:
        """What a client needs: the endpoint and the keys."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start, and wait until the S3 port answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = _start(self._command(), environment(GOMEMLIMIT="300MiB"), self.folder / "seaweedfs.log")
        check = _checker("seaweedfs", self.process, self.folder / "seaweedfs.log")
        _wait("seaweedfs", lambda: _answers(f"{self.endpoint}/healthz"), check)

    def stop(self, force: bool = False) -> None:
        """Stop; with `force`, as a crash would."""
        if self.process:
            _stop(self.process, signal.SIGKILL if force else signal.SIGTERM)

    def _command(self) -> list[str]:
        keys = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        identity = {"name": "tester", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        config = self.folder / "identities.json"
        config.write_text(json.dumps({"identities": [identity]}))
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        s3, master, volume, filer, admin = self.ports
        return [
            *(str(BIN / "weed"), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-s3.config={config}", f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}"),
            *(f"-filer.port={filer}", f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-s3.allowDeleteBucketNotEmpty=false", "-s3.autoCreateBucket=false"),
            *("-admin.ui=false", "-webdav=false", "-master.telemetry=false"),
        ]


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[SeaweedFS]:
    """A running S3 server with an empty bucket."""
    server = SeaweedFS(folder)
    try:
        server.start()
        _create_bucket(server)
        yield server
    finally:
        server.stop()


def _create_bucket(server: SeaweedFS) -> None:
    """The port answers a moment before the filer behind it does: try until the bucket is there."""
    import s3fs

    fs = s3fs.S3FileSystem(
        key=server.access_key,
        secret=server.secret_key,
        endpoint_url=server.endpoint,
        use_listings_cache=False,
        skip_instance_cache=True,
    )

    def created() -> bool:
        with contextlib.suppress(OSError):
            fs.mkdir(server.bucket)
            return True
        return bool(fs.exists(server.bucket))

    assert server.process
    _wait("seaweedfs bucket", created, _checker("seaweedfs", server.process, server.folder / "seaweedfs.log"))


# --- Ray


@dataclass(frozen=True)
class RayHead:
    """A Ray head node that asks for a token."""

    address: str  # of the dashboard and its jobs API
    token: str = field(repr=False)
    gcs: str  # HOST:PORT that nodes and drivers join
    metrics: str = ""  # for Prometheus

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def ray_head(folder: Path, cpus: int = 4, gpus: int = 0, **extra: str) -> Iterator[RayHead]:
    """`ray start --head` with token authentication, its own ports and its own session folder.

    gpus: what Ray is told; nobody looks for them before something runs on one.
    `extra` is the cluster's environment: its credentials and servers, which a job inherits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gcs, dashboard, agent, agent_grpc, client, metrics = free_ports(6)
    head = RayHead(
        f"http://127.0.0.1:{dashboard}",
        secrets.token_hex(32),
        f"127.0.0.1:{gcs}",
        f"http://127.0.0.1:{metrics}/metrics",
    )
    # Ray's socket paths must stay under 107 characters, which pytest's folders do not leave room for.
    session = Path(tempfile.mkdtemp(prefix="psray", dir="/tmp"))
    env = environment(PREFECT_HOME=str(folder / "prefect"), **head.environment, **extra)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={session}"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={100 * 2**20}"),
    ]
    headers = {"Authorization": f"Bearer {head.token}"}
    try:
        # Asked to end, `ray start --block` takes more than 15 s; nothing here is worth the wait.
        with _running("ray head", command, env, folder, folder, signal.SIGKILL) as check:
            _wait("ray head", lambda: _answers(f"{head.address}/api/jobs/", headers), check)
            yield head
    finally:
        shutil.rmtree(session, ignore_errors=True)


@contextlib.contextmanager
def ray_node(
    head: RayHead,
    folder: Path,
    address: str,
    cpus: int = 2,
    gpus: int = 0,
    resources: dict[str, float] | None = None,
    **extra: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """A further node, at an address of its own on loopback (127.0.0.2 ...); goes on once the cluster counts it.

    gpus: what Ray is told; nobody looks for them before something runs on one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    session = Path(tempfile.mkdtemp(prefix="psray", dir="/tmp"))
    ports = dict(
        zip(("node-manager", "object-manager", "dashboard-agent-grpc", "metrics-export"), free_ports(4), strict=True)
    )
    [listen] = free_ports(1)
    env = environment(**head.environment, **extra)
    command = [
        *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--address={head.gcs}"),
        f"--temp-dir={session}",
        *(f"--node-ip-address={address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"),
        f"--resources={json.dumps(resources or {})}",
        *(f"--{name}-port={port}" for name, port in ports.items()),
        *(f"--dashboard-agent-listen-port={listen}", f"--object-store-memory={100 * 2**20}"),
        *("--min-worker-port=0", "--max-worker-port=0"),
    ]
    headers = {"Authorization": f"Bearer {head.token}"}

    def joined() -> bool:
        nodes = json.loads(_fetch(f"{head.address}/nodes?view=summary", headers=headers))["data"]["summary"]
        # A node that has just come says little of itself.
        alive = [node for node in nodes if (node.get("raylet") or {}).get("state") == "ALIVE"]
        return any(node.get("ip") == address for node in alive)

    process = _start(command, env, folder / "ray-node.log", folder)
    try:
        _wait("ray node", joined, _checker("ray node", process, folder / "ray-node.log"))
        yield process
    finally:
        _stop(process, signal.SIGKILL)
        shutil.rmtree(session, ignore_errors=True)


# --- an OpenAI-compatible endpoint


@dataclass
class JudgeEndpoint:
    """Chat completions over HTTP, as `answer(data, before)` says: the data to judge, and how often it was asked before.

    A text is a reply, a dict a whole answer; an int the status of an error, with headers where it is a pair; None is
    silence.
    """

    answer: Callable[[dict[str, Any], int], Any]
    key: str = ""  # the one that is taken; empty takes any request
    models: list[str] | None = field(default_factory=lambda: ["judge-1"])  # None: it does not list them
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of the requests
    times: list[float] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # names in small letters
    url: str = ""

    def data(self) -> list[dict[str, Any]]:
        """What was to be judged, in the order of the requests."""
        return [json.loads(body["messages"][-1]["content"]) for body in self.asked]


@contextlib.contextmanager
def judge_endpoint(answer: Callable[[dict[str, Any], int], Any], **about: Any) -> Iterator[JudgeEndpoint]:
    endpoint = JudgeEndpoint(answer, **about)
    lock, over = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not self._allowed():
                self._say(401, {"error": {"message": f"wrong key {self.headers['Authorization']}"}})
            elif endpoint.models is None:
                self._say(404, {"error": {"message": "no such path"}})
            else:
                models = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in endpoint.models]
                self._say(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]
            with lock:
                before = sum(earlier["messages"][-1] == question for earlier in endpoint.asked)
                endpoint.asked.append(body)
                endpoint.times.append(time.monotonic())
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
            if not self._allowed():
                self._say(401, {"error": {"message": f"wrong key {self.headers['Authorization']}"}})
                return
            said = endpoint.answer(json.loads(question["content"]), before)
            if said is None:
                over.wait(60)
                self.close_connection = True
            elif isinstance(said, str):
                message = {"role": "assistant", "content": said}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                about = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
                self._say(200, {**about, "choices": [choice], "usage": usage})
            elif isinstance(said, dict):
                self._say(200, said)
            else:
                status, headers = said if isinstance(said, tuple) else (said, {})
                self._say(status, {"error": {"message": f"status {status}, key {endpoint.key}"}}, headers)

        def _allowed(self) -> bool:
            return not endpoint.key or self.headers["Authorization"] == f"Bearer {endpoint.key}"

        def _say(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that has hung up

    with Server(("127.0.0.1", 0), Handler) as server:
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            over.set()
            server.shutdown()


# --- processes


@contextlib.contextmanager
def _running(
    name: str,
    command: list[str],
    env: dict[str, str],
    folder: Path,
    cwd: Path = ROOT,
    end: signal.Signals = signal.SIGTERM,
) -> Iterator[Callable[..., None]]:
    """A process with its log in the folder; yields what raises when it has ended."""
    log = folder / f"{name.replace(' ', '-')}.log"
    process = _start(command, env, log, cwd)
    try:
        yield _checker(name, process, log)
    finally:
        _stop(process, end)


def _start(command: list[str], env: dict[str, str], log: Path, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes], first: signal.Signals = signal.SIGTERM) -> None:
    """Ask the process to end, then end what is left of its session, which nobody else shares."""
    if process.poll() is None:
        process.send_signal(first)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    for pid in _session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry.name)) == leader:
                    members.append(int(entry.name))
    return members


def _checker(name: str, process: subprocess.Popen[bytes], log: Path) -> Callable[..., None]:
    def check(late: bool = False) -> None:
        if late or process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            said = "is not ready in time" if late else f"ended with status {process.returncode}"
            raise RuntimeError(f"{name} {said}; the end of its log:\n{tail}")

    return check


def _wait(name: str, ready: Callable[[], bool], check: Callable[..., None]) -> None:
    deadline = time.monotonic() + READY
    while True:
        with contextlib.suppress(OSError, ValueError):
            if ready():
                return
        check(late=time.monotonic() > deadline)
        time.sleep(0.2)


def _answers(url: str, headers: dict[str, str] | None = None) -> bool:
    _fetch(url, headers=headers)
    return True


def _fetch(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    """GET, or POST of JSON; URLError (an OSError) unless the answer is a success."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return bytes(answer.read())


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
