"""A real PostgreSQL on loopback, in a folder of its own. Debian: `apt-get install postgresql`."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.processes import Daemon, as_user, free_port

START_TIMEOUT_S = 60.0
_ADMIN = "latentloom"


def bin_dir() -> Path | None:
    """Where initdb and postgres lie; None when they are not installed. Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((p for p in places if (p / "initdb").exists() and (p / "postgres").exists()), None)


class Postgres:
    """One server with a random password; databases are made by `database`."""

    def __init__(self) -> None:
        programs = bin_dir()
        if programs is None:
            raise RuntimeError("PostgreSQL is not installed")
        self._bin = programs
        # It refuses to run as root, and must reach its folder as whoever it runs as.
        self._user = "postgres" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="llpg-"))
        self.port, self.password = free_port(), secrets.token_hex(12)
        self._server = Daemon(
            [
                *(str(programs / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)),
                *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"),
                *("-c", "fsync=off", "-c", "max_connections=200"),
            ],
            self.folder / "server.log",
            user=self._user,
        )

    def start(self) -> None:
        """Make the cluster at the first start, run it, and wait until it takes connections."""
        if not (self.folder / "data").exists():
            self._init()
        self._server.start(cwd=self.folder)
        give_up = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            if not self._server.alive or time.monotonic() > give_up:
                said = self._server.tail()
                self.stop()
                raise RuntimeError(f"PostgreSQL did not start:\n{said}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it and remove its files."""
        self._server.stop(signal.SIGINT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self, name: str, driver: str = "psycopg") -> str:
        """Make a database when it is not there; its URI for SQLAlchemy, with the password."""
        if self._sql(f"select 1 from pg_database where datname = '{name}'") != "1":
            self._sql(f'create database "{name}"')
        return f"postgresql+{driver}://{_ADMIN}:{self.password}@127.0.0.1:{self.port}/{name}"

    def dump(self, name: str) -> str:
        """A database as SQL text."""
        command = [str(self._bin / "pg_dump"), "-h", "127.0.0.1", "-p", str(self.port), "-U", _ADMIN, name]
        password = {**os.environ, "PGPASSWORD": self.password}
        return subprocess.run(command, env=password, capture_output=True, text=True, check=True).stdout

    def _init(self) -> None:
        words = self.folder / "password"
        words.write_text(self.password)
        if self._user:
            account = pwd.getpwnam(self._user)
            for path in (self.folder, words):
                os.chown(path, account.pw_uid, account.pw_gid)
        command = [str(self._bin / "initdb"), "-D", str(self.folder / "data"), "-U", _ADMIN, "--no-sync"]
        command += ["--auth=scram-sha-256", f"--pwfile={words}", "--encoding=UTF8", "--locale=C"]
        subprocess.run([*as_user(self._user), *command], check=True, capture_output=True, cwd=self.folder)

    def _ready(self) -> bool:
        try:
            return self._sql("select 1") == "1"
        except subprocess.CalledProcessError:
            return False

    def _sql(self, statement: str) -> str:
        command = [str(self._bin / "psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", _ADMIN, "-d", "postgres"]
        done = subprocess.run(
            [*command, "-XAtqc", statement],
            env={**os.environ, "PGPASSWORD": self.password},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()
