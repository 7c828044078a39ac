"""Connecting to Ray: the cluster named by RAY_ADDRESS, or one started on this machine for this job."""

from __future__ import annotations

import atexit
import contextlib
import glob
import logging
import os
import secrets
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline.config import StrictModel
from pipeline.errors import InputError, StoppedError
from pipeline.storage.stores import process_settings

_log = logging.getLogger(__name__)
# Whether this process has a request with an autoscaler, which outlives processes.
_asked = False

# Several processes share the cores: OpenMP threads that spin while they wait steal them from each other.
_WORKER = "LATENTLOOM_WORKER"
WORKER_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false", _WORKER: "1"}
# Of processes whose network is on the CPU, for VAEs above all. By default glibc maps a block above 32 MiB anew and
# gives it back when freed, so that the kernel clears an activation's pages again and again, a tenth of a VAE's
# time; so told, it keeps what is freed for the next batch. Set before the process starts: a thread that has
# allocated has its arena already, and only the first arena holds large blocks. Training and fitting gain
# nothing: their blocks are smaller.
CPU_WORKER_ENV = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}
_TOKEN_PLACES = "in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
_ANSWER_S = 10.0  # for which a named cluster is waited for
_dashboard: str | None = None
_given: dict[str, str] = {}  # the variables of all workers of the Ray that this process started


def _part_or_whole(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"a process reserves a part of one GPU, at most 1, or whole ones; {value:g} is neither")
    return value


GpuShare = Annotated[float, Field(ge=0), AfterValidator(_part_or_whole)]  # GPUs that one process reserves


class ClusterConfig(StrictModel):
    """Where Ray tasks run."""

    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto",
        description="What a process that reserves a GPU computes on. auto: on it. cuda: the same, and a cluster "
        "without GPUs is refused. cpu: a rehearsal, for clusters that only declare GPUs: all is placed and shared as "
        "on GPUs, and computed on CPUs.",
    )
    num_cpus: int | None = Field(
        default=None, ge=1, description="CPUs offered by a locally started Ray; null: all of this machine's."
    )
    object_store_bytes: int | None = Field(
        default=None, ge=80 << 20, description="Object store of a locally started Ray, bytes; null: Ray's default."
    )
    dashboard: bool = Field(
        default=True, description="Serve the dashboard of a locally started Ray, on loopback only."
    )
    request_cpus: int | None = Field(
        default=None, ge=1, description="CPUs to ask an autoscaling cluster for, and to wait for, before work is cut."
    )
    request_gpus: int | None = Field(
        default=None, ge=1, description="The same for GPUs; the request holds until the job ends."
    )
    request_timeout_s: float = Field(
        default=900.0, gt=0, description="Longest such wait; the job then starts with the part that has come."
    )


def device_of(cluster: ClusterConfig, num_gpus: float) -> Literal["cuda", "cpu"]:
    """What a process computes on that reserves so many GPUs."""
    return "cuda" if num_gpus and cluster.device != "cpu" else "cpu"


def is_worker() -> bool:
    """Whether Ray started this process for a job of this project: what runs in it ends with it."""
    return _WORKER in os.environ


def ensure_ray(cluster: ClusterConfig, *, networks: bool = False) -> Any:
    """Connect to RAY_ADDRESS when it is set, else start Ray here; returns the `ray` module.

    Already connected: nothing happens. networks: the job's actors compute networks, so that a Ray that starts here,
    on a machine without GPUs, gives its workers CPU_WORKER_ENV. Raises InputError when the named cluster cannot be
    reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    import ray

    if ray.is_initialized():
        return ray
    store = process_settings()
    os.environ.update(store)
    job_config = ray.job_config.JobConfig()
    job_config._py_driver_sys_path = DriversPath()
    variables = {**WORKER_ENV, **store}
    common: dict[str, Any] = {"job_config": job_config, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    # What Ray Data says of small data is true of small data.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data\.")
    if address:
        check_address()
        try:
            _tell_dashboard(ray.init(address=address, runtime_env={"env_vars": variables}, **common), lasts=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            what = f"The Ray cluster cannot be reached: {' '.join(str(error).split())[:300]}"
            raise _no_cluster(what, address) from None
        _grow(ray, cluster)
        return ray
    private_token()
    if networks and not glob.glob("/dev/nvidia[0-9]*"):
        variables |= CPU_WORKER_ENV
    try:
        # What Ray's processes start with, workers have: asked for as a runtime environment, they would be started
        # anew, and those that Ray holds ready be for nobody.
        with _on_loopback(), _environment(variables):
            started = ray.init(
                address="local",
                num_cpus=cluster.num_cpus,
                object_store_memory=cluster.object_store_bytes,
                include_dashboard=cluster.dashboard,
                dashboard_host="127.0.0.1",
                _temp_dir=None
                if os.environ.get("RAY_TMPDIR")
                else f"{private_folder()}/ray",  # which Ray opens to all
                **common,
            )
    except Exception as error:  # noqa: BLE001 - Ray raises bare Exception when a process of its own does not come up
        raise StoppedError(
            f"Ray did not start on this machine: {' '.join(str(error).split())[:300]}",
            rule="starting Ray takes some free memory, disk space under /tmp and CPU time",
            next_step="see that the machine has room, then run the same command again",
        ) from None
    _given.update(variables)
    _end_autoscaler()
    _tell_dashboard(started, lasts=False)
    return ray


def dashboard() -> str | None:
    """Where the cluster shows itself that this process worked on; None for a local Ray, which is gone by now."""
    return _dashboard


def _tell_dashboard(connected: Any, *, lasts: bool) -> None:
    global _dashboard
    if connected.dashboard_url:
        url = f"http://{connected.dashboard_url}"
        _log.info("Ray's dashboard: %s%s", url, "" if lasts else ", until this job ends")
        _dashboard = url if lasts else None


def lacking(variables: Mapping[str, str]) -> dict[str, str]:
    """Of these variables those that Ray's workers do not have anyhow; asked for, they take a worker of their own."""
    return {name: value for name, value in variables.items() if _given.get(name) != value}


def check_address() -> None:
    """InputError when RAY_ADDRESS names a place where no such server as Ray's answers, or one that refuses us.

    Ray itself would ask for minutes, in silence; and a dry run says what the run would meet.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    place = address.removeprefix("ray://")
    if address == "local" or place.startswith(("http://", "https://")):  # its own Ray, open to all; a dashboard
        raise _no_cluster(f"{address} is no address of a Ray cluster", address)
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit() or os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # a word of Ray's such as auto, or a channel that only Ray can open
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_S)
        except grpc.FutureTimeoutError:
            what = f"No Ray cluster answers at {place} within {_ANSWER_S:g} seconds"
            raise _no_cluster(what, address) from None
        # A server of Ray's clients has none of the head's services, and Kubernetes gives out tokens of its own.
        if place == address and not os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH"):
            _check_token(channel, place)


def _no_cluster(what: str, address: str) -> InputError:
    return InputError(
        what,
        key="RAY_ADDRESS",
        value=address,
        rule="RAY_ADDRESS names a running cluster of the same Ray version: HOST:PORT of its head, or ray://HOST:PORT "
        "of its clients",
        next_step="start the cluster, correct the address, set RAY_AUTH_MODE=token where it asks for a token, or "
        "unset RAY_ADDRESS to run on this machine",
    )


def _check_token(channel: Any, place: str) -> None:
    """InputError when the cluster asks for a token and would not get the right one: Ray tries that for long, loudly.

    Ray sends its token to an address that is given only if RAY_AUTH_MODE says so, for the address may be a
    stranger's. One where a process of this user listens is not, and `ray start` asks for a token wherever Ray has
    made one before.
    """
    import grpc

    def is_refused(token: str | None) -> bool:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=_ANSWER_S, metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
        return False

    token = _token()
    if os.environ.get("RAY_AUTH_MODE") != "token":
        if not is_refused(None):
            return
        if "RAY_AUTH_MODE" not in os.environ and token and _is_own(place):
            os.environ["RAY_AUTH_MODE"] = "token"
            if "ray" in sys.modules:  # which has read it at its import
                from ray._raylet import Config  # type: ignore[attr-defined]

                Config.initialize("")
        else:
            raise InputError(
                f"The Ray cluster at {place} asks for a token, and this process sends none",
                key="RAY_AUTH_MODE",
                value=os.environ.get("RAY_AUTH_MODE", ""),
                rule="Ray sends its token to a cluster where RAY_AUTH_MODE=token",
                next_step=f"set RAY_AUTH_MODE=token, and have the cluster's token {_TOKEN_PLACES}",
            )
    if is_refused(token):
        raise InputError(
            f"The Ray cluster at {place} does not take this process's token",
            key="RAY_AUTH_TOKEN",
            value="***" if token else "",
            rule="the token is the cluster's, which `ray get-auth-token` prints on its head",
            next_step=f"have it {_TOKEN_PLACES}",
        )


def _is_own(place: str) -> bool:
    """Whether a process of this user listens there: at an address of this machine, too, it may be somebody else's."""
    import psutil

    host, _, port = place.rpartition(":")
    if host != "localhost" and all(host.strip("[]") != a.address for c in psutil.net_if_addrs().values() for a in c):
        return False
    with contextlib.suppress(psutil.Error):  # it ends while it is looked at, or this system shows no such thing
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        processes = [c.pid for c in listening if c.laddr.port == int(port)]  # None: another user's
        return bool(processes) and all(p and psutil.Process(p).uids().real == os.getuid() for p in processes)
    return False


def _token() -> str | None:
    """The token that Ray would send."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    place = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return Path(place).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


class DriversPath(list[str]):
    """Where Ray's workers look for modules first; of what it holds the last comes first.

    Ray adds the driver's folder and its script's, which then come before all that is installed: a file pipeline.py
    there would pass for this package. Workers get the driver's own order instead, with these two last.
    """

    def extend(self, added: Iterable[str]) -> None:
        """Take Ray's two places, and what must come before them."""
        last = list(added)
        home = str(Path(__file__).parents[2])
        super().extend(last)
        if os.getcwd() == os.path.realpath(home):
            return  # a checkout at work: here it is first, whatever is installed
        first = [place for place in sys.path if place and place not in last]
        super().extend(reversed(first if home in first else [*first, home]))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that start in the block have these variables; afterwards this one's environment is as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts in the block, and all its processes, listen on loopback alone.

    Whoever reaches its ports and has its token runs code. Ray takes this machine's address for its own, even where it
    is told another, but on systems where it keeps to itself: so it is told that this is one.
    """
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with _environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def private_folder(above: str = "/tmp") -> str:
    """Above the folder of a local Ray, with its sockets, logs and packages: nobody else may enter here.

    The name is short, for those of sockets are limited.
    """
    path = os.path.join(above, f"ray-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # somebody else was there first
        return tempfile.mkdtemp(prefix="ray-", dir=above)
    os.chmod(path, 0o700)
    return path


def private_token() -> None:
    """Ray's token file, made where there is none, is readable by this user alone: Ray makes it by the umask."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    # A home that cannot be written to is Ray's to complain about, which may need no token.
    with contextlib.suppress(PermissionError, NotADirectoryError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            fresh = path.with_name(f".auth_token-{os.getpid()}")
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)  # whole, or another process's
            fresh.unlink()
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)


def shutdown_ray() -> None:
    """Disconnect, and stop the Ray that `ensure_ray` started here; nothing happens when none is connected.

    What was asked of an autoscaler is withdrawn, so that its nodes may go.
    """
    import ray

    global _asked
    if ray.is_initialized():
        if _asked:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[])
            _asked = False
        ray.shutdown()
        _given.clear()


def _end_autoscaler() -> None:
    """End the process that would grow a local Ray: it has nothing to do here, and in the end Ray waits for it."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.endswith("autoscaler/_private/monitor.py") for part in child.cmdline()):
                child.kill()


def _grow(ray: Any, cluster: ClusterConfig) -> None:
    """Ask an autoscaler for what the configuration requests, and wait until it is there."""
    global _asked
    wanted = {"CPU": cluster.request_cpus or 0, "GPU": cluster.request_gpus or 0}
    if not any(wanted.values()):
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(num_cpus=wanted["CPU"] or None, bundles=[{"GPU": 1}] * wanted["GPU"])
    _asked = True
    atexit.register(shutdown_ray)
    await_resources(wanted, ray.cluster_resources, cluster.request_timeout_s)


def await_resources(wanted: dict[str, int], offered: Callable[[], dict[str, float]], timeout_s: float) -> None:
    """Return when `offered` reaches `wanted`, or with a warning after `timeout_s` when a part of each is there.

    Raises StoppedError when of some resource nothing came: a later start may find the cloud less busy.
    """
    give_up = time.monotonic() + timeout_s
    announced = False
    while True:
        have = offered()
        missing = {name: n for name, n in wanted.items() if have.get(name, 0.0) < n}
        if not missing:
            return
        shown = ", ".join(f"{have.get(name, 0.0):g} of {n} {name}s" for name, n in missing.items())
        if time.monotonic() >= give_up:
            break
        if not announced:
            _log.info("waiting for the cluster to grow: %s are there", shown)
            announced = True
        time.sleep(min(1.0, timeout_s))
    if any(have.get(name, 0.0) < 1 for name in missing):
        raise StoppedError(
            f"The cluster did not grow within {timeout_s:g} s: {shown} are there",
            key="cluster.request_timeout_s",
            value=timeout_s,
            rule="some of what cluster.request_cpus and cluster.request_gpus ask for must come",
            next_step="see whether the cloud has such nodes and your quota allows them, then run the command again",
        )
    _log.warning("the cluster did not grow to what was asked for, going on with %s", shown)


class Gauges:
    """Figures as Ray metrics, each with its newest value: `latentloom_<job>_<name>`; Prometheus sees ray_ before it.

    Names that are no identifiers (`val/loss`) are left to the tracker.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._gauges: dict[str, Any] = {}

    def __call__(self, figures: Mapping[str, float]) -> None:
        """Show these figures until others of the same names come, or this process ends."""
        from ray.util.metrics import Gauge

        for name, value in figures.items():
            if not name.isidentifier():
                continue
            if name not in self._gauges:
                self._gauges[name] = Gauge(
                    f"latentloom_{self._job}_{name}", description=f"{name} of a {self._job} job"
                )
            self._gauges[name].set(float(value))


class LocalRaylets:
    """The raylets this process has started; none on a cluster that others run."""

    def __init__(self) -> None:
        import psutil

        self._raylets = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end while it is looked at
                if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
                    self._raylets.append(child)

    def all_live(self) -> bool:
        """Whether none has ended since; cheap: nothing but these processes is looked at."""
        import psutil

        try:
            return all(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in self._raylets)
        except psutil.NoSuchProcess:
            return False
