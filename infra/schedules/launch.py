#!/usr/bin/env python3
"""Run RayJobs one after another from their suspended templates, and exit with the code of the first that fails.

    launch.py --run nightly-29387417 encode train sample evaluate promote

Each step becomes a RayJob with a name made of the run, the template and the attempt. So whatever starts this program
again (a CronJob's next pod, a workflow's retry, a person) finds what is done, follows what is running, and creates
only what is missing. ${LATENTLOOM_RUN} in an entrypoint becomes the run's name.

The exit code is the job's own, so that a scheduler can tell what to do:
    0 done    75 stopped, run again    1 bug    2 configuration    3 input    4 conflict    5 rejects over budget
A cluster that was lost with its job (no exit code) counts as 75. Attempts after a 75 are made here, up to --attempts.

Needs nothing but Python and, in a pod, a service account that may get and create rayjobs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One night, in order: what a step reads, those before it make.
NIGHT = ("encode", "embed-text", "compact", "train", "sample", "evaluate", "promote", "verify")
AGAIN = 75
STOP = {1, 2, 3, 4, 5}
MAX_NAME = 47  # KubeRay appends to it, and Kubernetes allows 63
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_EXIT_CODE = re.compile(r"exit code:? (\d+)")
_PLACEHOLDER = "${LATENTLOOM_RUN}"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Cluster:
    """The few calls of the Kubernetes API that this needs; transient failures are tried again."""

    def __init__(self, url: str, account: Path, namespace: str, patience_s: float) -> None:
        self._base = f"{url.rstrip('/')}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account, self._patience_s = account, patience_s
        authority = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(authority)) if authority.exists() else None

    def get(self, name: str) -> dict[str, Any] | None:
        """A RayJob, None when there is none."""
        status, answer = self._call("GET", f"/{name}")
        return None if status == 404 else answer

    def create(self, job: dict[str, Any]) -> None:
        """Create a RayJob; that it exists already (the answer to an earlier try was lost) is fine."""
        self._call("POST", "", job)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                with urllib.request.urlopen(self._request(method, path, body), timeout=30, context=self._tls) as got:
                    return got.status, json.loads(got.read())
            except urllib.error.HTTPError as error:
                if error.code in (404, 409):
                    return error.code, {}
                problem = f"HTTP {error.code}: {error.read(2000).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:
                    raise SystemExit(fail(3, f"{method} {self._base}{path}: {problem}")) from None
            except OSError as error:
                problem = str(error)
            if time.monotonic() > give_up:
                # What runs goes on; the next start of this program follows it.
                raise SystemExit(fail(AGAIN, f"the Kubernetes API does not answer: {problem}"))
            time.sleep(min(5.0, self._patience_s / 4))

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> urllib.request.Request:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        token = self._account / "token"
        if token.exists():  # read anew each time: it is rotated
            headers["Authorization"] = f"Bearer {token.read_text().strip()}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self._base + path, data=data, headers=headers, method=method)


def from_template(template: dict[str, Any], name: str, run: str) -> dict[str, Any]:
    """A RayJob that starts at once, with a template's specification."""
    spec = json.loads(json.dumps(template["spec"]))
    spec["suspend"] = False
    # Which code deserves another attempt is decided here; the operator would repeat a typo, too.
    spec["backoffLimit"] = 0
    spec["entrypoint"] = spec["entrypoint"].replace(_PLACEHOLDER, run)
    labels = {**template["metadata"].get("labels", {}), "latentloom/run": run}
    return {
        "apiVersion": template["apiVersion"],
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def exit_code(job: dict[str, Any]) -> int | None:
    """How a RayJob ended; None while it has not."""
    status = job.get("status", {})
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    if status.get("jobDeploymentStatus") not in ("Failed", "Complete"):
        return None
    found = _EXIT_CODE.search(status.get("message", ""))
    code = int(found.group(1)) if found else AGAIN
    return code if code in STOP else AGAIN


def run_step(
    cluster: Cluster, template: str, run: str, attempts: int, period_s: float, sleep: Callable[[float], None]
) -> int:
    """Bring one step to its end: adopt, create, follow, repeat; its exit code."""
    for attempt in range(1, attempts + 1):
        name = f"{run}-{template}-{attempt}"
        job = cluster.get(name)
        if job is None:
            source = cluster.get(template)
            if source is None:
                return fail(2, f"there is no RayJob {template} to take as a template; apply infra/kuberay first")
            cluster.create(from_template(source, name, run))
            say(f"{name}: created")
        code = follow(cluster, name, period_s, sleep)
        if code != AGAIN:
            return code
    return AGAIN


def follow(cluster: Cluster, name: str, period_s: float, sleep: Callable[[float], None]) -> int:
    """Wait until a RayJob has ended; its exit code. One that somebody deletes counts as stopped."""
    shown = ""
    while True:
        job = cluster.get(name)
        if job is None:
            return fail(AGAIN, f"{name}: it was deleted")
        status = job.get("status", {})
        now = f"{status.get('jobDeploymentStatus', 'New')} {status.get('jobStatus', '')}".strip()
        if now != shown:
            say(f"{name}: {now}")
            shown = now
        code = exit_code(job)
        if code == 0:
            return 0
        if code is not None:
            return fail(code, f"{name}: {status.get('reason', '')} {status.get('message', '')[:2000]}".strip())
        sleep(period_s)


def say(text: str) -> None:
    """One line for whoever reads the pod's log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fail(code: int, text: str) -> int:
    """Say why, and hand the code on."""
    sys.stderr.write(f"{text}\nexit code {code}\n")
    return code


def main() -> int:
    """Parse the command line and run the steps in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="+", help="RayJobs to copy, in this order")
    parser.add_argument("--run", required=True, help="name of the run: the same name continues it")
    parser.add_argument("--attempts", type=int, default=5, help="RayJobs for one step, at most")
    parser.add_argument("--namespace", help="default: the pod's own")
    parser.add_argument("--api", help="URL of the Kubernetes API; default: the pod's own cluster")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder with token and ca.crt")
    parser.add_argument("--period", type=float, default=15.0, help="seconds between two looks")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for an API that is away")
    options = parser.parse_args()
    for template in options.templates:
        name = f"{options.run}-{template}-{options.attempts}"
        if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
            return fail(2, f"{name!r} cannot name a RayJob: small letters, digits and -, at most {MAX_NAME} of them")
    namespace = options.namespace or (options.account / "namespace").read_text().strip()
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    url = options.api or f"https://{f'[{host}]' if ':' in host else host}:{port}"
    cluster = Cluster(url, options.account, namespace, options.patience)
    for template in options.templates:
        code = run_step(cluster, template, options.run, options.attempts, options.period, time.sleep)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
