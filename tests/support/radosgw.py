"""A real S3 server on loopback: Ceph's monitor, one in-memory object store daemon, and its S3 gateway.

It checks signatures and permissions and has atomic conditional writes, which the emulations have not. Debian:
`apt-get install --no-install-recommends radosgw ceph-mon ceph-osd`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import Daemon, free_port

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool")
START_TIMEOUT_S = 180.0
REGION = "us-east-1"

CONF = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{mon2}/0,v1:127.0.0.1:{mon1}/0]
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
mon allow pool size one = true
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
osd crush update on start = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms mon client mode = crc
mon data avail crit = 1
mon max pg per osd = 1000
osd objectstore = memstore
memstore device bytes = 4294967296
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
crash dir = {folder}/crash
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
ms mon client mode = crc
"""


@dataclass(frozen=True)
class Keys:
    """The credentials of one user of the store."""

    access: str
    secret: str


def missing_programs() -> list[str]:
    """Which of the needed programs are not installed; empty when the server can run."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Radosgw:
    """One gateway with its back end; buckets vanish with it."""

    def __init__(self) -> None:
        # Not below pytest's folder: the daemons put sockets here, whose paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="llrgw-"))
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._conf = self.folder / "ceph.conf"
        self._daemons: list[Daemon] = []
        self._gateway = self._daemon("radosgw", "-n", "client.rgw")
        self.keys = Keys("", "")

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and make the first user; RuntimeError with the logs when it does not come up."""
        try:
            self._start_back_end()
            self.start_gateway()
            self.keys = self.add_user("tester")
        except BaseException:
            said = "\n".join(f"== {d.command[0]}\n{d.tail()}" for d in [*self._daemons, self._gateway])
            self.stop()
            print(said)
            raise

    def stop(self) -> None:
        """End gateway, object store and monitor, in this order, and remove their files."""
        self._gateway.stop(signal.SIGKILL)
        while self._daemons:
            self._daemons.pop().stop(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_gateway(self) -> None:
        """Start the gateway alone: objects are in the daemon behind it and survive its death."""
        self._gateway.start()
        self._until("the gateway answers", self._answers)

    def kill_gateway(self) -> None:
        """SIGKILL: connections break, new ones are refused."""
        self._gateway.stop(signal.SIGKILL)

    def freeze_gateway(self) -> None:
        """SIGSTOP: connections are accepted by the kernel and never answered."""
        self._gateway.send(signal.SIGSTOP)

    def thaw_gateway(self) -> None:
        """SIGCONT."""
        self._gateway.send(signal.SIGCONT)

    def _start_back_end(self) -> None:
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        ports = {"mon2": free_port(), "mon1": free_port(), "port": self.port}
        self._conf.write_text(CONF.format(fsid=fsid, folder=self.folder, **ports))
        for name in ("mon", "osd", "rgw", "crash"):
            (self.folder / name).mkdir()
        monmap = self.folder / "monmap"
        address = f"[v2:127.0.0.1:{ports['mon2']},v1:127.0.0.1:{ports['mon1']}]"
        _call(["monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", fsid, str(monmap)])
        self._call("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(monmap))
        self._begin("ceph-mon", "-i", "a")
        self._until("the monitor answers", lambda: self._ceph("osd", "new", osd) is not None)
        self._ceph("osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost", check=True)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._begin("ceph-osd", "-i", "0")
        self._until(
            "the object store is up", lambda: '"num_up_osds":1' in (self._ceph("osd", "stat", "-f", "json") or "")
        )

    def _begin(self, *command: str) -> None:
        daemon = self._daemon(*command)
        self._daemons.append(daemon)
        daemon.start()

    def _daemon(self, program: str, *arguments: str) -> Daemon:
        command = [program, "-c", str(self._conf), *arguments, "-f"]
        return Daemon(command, self.folder / f"{program}.out")

    def _until(self, what: str, done: Any) -> None:
        give_up = time.monotonic() + START_TIMEOUT_S
        while not done():
            dead = [d.command[0] for d in self._daemons if not d.alive]
            if dead or time.monotonic() > give_up:
                raise RuntimeError(f"waited in vain until {what}; not running: {dead}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        import urllib.error
        import urllib.request

        if not self._gateway.alive:
            raise RuntimeError("the gateway has ended")
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _call(self, program: str, *arguments: str) -> str:
        return _call([program, "-c", str(self._conf), *arguments])

    def _ceph(self, *arguments: str, check: bool = False) -> str | None:
        """What the administration command said; None when it failed and that may pass."""
        try:
            return self._call("ceph", "--connect-timeout", "20", *arguments)
        except subprocess.CalledProcessError:
            if check:
                raise
            return None

    # -- users and buckets ---------------------------------------------------------------------------------

    def add_user(self, name: str) -> Keys:
        """A user with random keys, who owns nothing yet."""
        keys = Keys(f"AK{secrets.token_hex(8).upper()}", secrets.token_hex(20))
        self._call(
            *("radosgw-admin", "user", "create", "--uid", name, "--display-name", name),
            *("--access-key", keys.access, "--secret-key", keys.secret),
        )
        return keys

    def make_bucket(self, name: str | None = None) -> str:
        """A new bucket of the first user."""
        bucket = name or f"b{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=bucket)
        return bucket

    def forbid_writes(self, bucket: str, user: str) -> None:
        """Let another user read a bucket of the first user, and not write to it."""
        statement = {
            "Effect": "Allow",
            "Principal": {"AWS": [f"arn:aws:iam:::user/{user}"]},
            "Action": ["s3:GetObject", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self.client().put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))

    def client(self, endpoint: str | None = None) -> Any:
        """A plain S3 client of the first user, to look at the store from outside of what is tested."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=self.keys.access,
            aws_secret_access_key=self.keys.secret,
            region_name=REGION,
            config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
        )

    def environment(self, *, keys: Keys | None = None, endpoint: str | None = None) -> dict[str, str]:
        """What a process needs to use this store, as any S3 tool reads it."""
        keys = keys or self.keys
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": keys.access,
            "AWS_SECRET_ACCESS_KEY": keys.secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def _call(command: list[str], env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout
