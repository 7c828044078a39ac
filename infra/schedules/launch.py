#!/usr/bin/env python3
"""Run RayJobs one after another from their suspended templates, and exit with the code of the first that fails.

    launch.py --run nightly-29387417 night

Each step becomes a RayJob with a name made of the run, the template and the attempt. So whatever starts this program
again (a CronJob's next pod, a workflow's retry, a person) finds what is done, follows what is running, and creates
only what is missing. ${LATENTLOOM_RUN} in an entrypoint becomes the run's name.

Before a run begins, what its steps need is looked for: templates, service accounts, secrets, settings, the tracking
server. What is missing is said by name, and nothing is started.

The exit code is the job's own, so that a scheduler can tell what to do:
    0 done    75 stopped, run again    1 bug    2 configuration    3 input    4 conflict    5 rejects over budget
A cluster that was lost with its job (no exit code) counts as 75, one whose pods never came up, in all attempts, as 3.
Attempts after a 75, a cluster that did not come up, and a job that found no store as it started, are made here, up to
--attempts, with longer and longer pauses: an outage of an hour must not use them up.

Needs nothing but Python and, in a pod, a service account with the rights of infra/schedules/cronjob/access.yaml.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One night, in order: what a step reads, those before it make. `night` on the command line stands for all of it.
NIGHT = ("encode", "embed-text", "compact", "train", "sample", "evaluate", "promote", "verify")
AGAIN = 75
STOP = {1, 2, 3, 4, 5}
# A job that finds no store as it starts ends with 3, for its settings may be wrong. As likely the store is away: it
# gets the other attempts, too, and its own code when all have ended so.
AWAY = "StoreUnavailable:"
# The operator's reason for a cluster whose pods did not come up: no nodes, no image, a store that was away as its
# init containers began. Tried again, too; when it stays so, a person has to look.
LATE = "PreRunningDeadlineExceeded"
MAX_NAME = 47  # KubeRay appends to it, and Kubernetes allows 63
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_EXIT_CODE = re.compile(r"exit code:? (\d+)")
_PLACEHOLDER = "${LATENTLOOM_RUN}"
RUN, SCHEDULE = "latentloom/run", "latentloom/schedule"
# Enough to know that something is there; what a secret holds is no business of this program.
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Cluster:
    """The few calls of the Kubernetes API that this needs; transient failures are tried again."""

    def __init__(self, url: str, account: Path, namespace: str, patience_s: float) -> None:
        self._url, self._namespace = url.rstrip("/"), namespace
        self._jobs = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account, self._patience_s = account, patience_s
        authority = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(authority)) if authority.exists() else None

    def get(self, name: str) -> dict[str, Any] | None:
        """A RayJob, None when there is none."""
        status, answer = self._call("GET", f"{self._jobs}/{name}")
        return None if status == 404 else answer

    def create(self, job: dict[str, Any]) -> None:
        """Create a RayJob; that it exists already (the answer to an earlier try was lost) is fine."""
        self._call("POST", self._jobs, job)

    def of_schedule(self, schedule: str) -> list[dict[str, Any]]:
        """The RayJobs that earlier runs of a schedule left."""
        query = urllib.parse.urlencode({"labelSelector": f"{SCHEDULE}={schedule}"})
        items: list[dict[str, Any]] = self._call("GET", f"{self._jobs}?{query}")[1].get("items", [])
        return items

    def delete(self, name: str) -> None:
        """Delete a RayJob; one that is gone is fine."""
        self._call("DELETE", f"{self._jobs}/{name}")

    def has(self, kind: str, name: str) -> bool:
        """Whether the namespace has such a secret or service account."""
        return self._call("GET", f"/api/v1/namespaces/{self._namespace}/{kind}/{name}", accept=METADATA)[0] != 404

    def settings(self, name: str) -> dict[str, str] | None:
        """What a ConfigMap says, None when there is none."""
        status, answer = self._call("GET", f"/api/v1/namespaces/{self._namespace}/configmaps/{name}")
        return None if status == 404 else answer.get("data") or {}

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, accept: str = "application/json"
    ) -> tuple[int, dict[str, Any]]:
        give_up = time.monotonic() + self._patience_s
        pause_s = min(1.0, self._patience_s / 8)
        while True:
            try:
                request = self._request(method, path, body, accept)
                with urllib.request.urlopen(request, timeout=30, context=self._tls) as got:
                    return got.status, json.loads(got.read())
            except urllib.error.HTTPError as error:
                if error.code in (404, 409):
                    return error.code, {}
                problem = f"HTTP {error.code}: {error.read(2000).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:
                    hint = (
                        ""
                        if error.code not in (401, 403)
                        else ("\nthis pod's service account may not do that: see infra/schedules/cronjob/access.yaml")
                    )
                    raise SystemExit(fail(3, f"{method} {self._url}{path}: {problem}{hint}")) from None
            except OSError as error:
                problem = str(error)
            if time.monotonic() > give_up:
                # What runs goes on; the next start of this program follows it.
                raise SystemExit(fail(AGAIN, f"the Kubernetes API does not answer: {problem}"))
            time.sleep(pause_s)
            pause_s = min(30.0, 2 * pause_s, self._patience_s / 4)

    def _request(self, method: str, path: str, body: dict[str, Any] | None, accept: str) -> urllib.request.Request:
        headers = {"Accept": accept, "Content-Type": "application/json"}
        token = self._account / "token"
        if token.exists():  # read anew each time: it is rotated
            headers["Authorization"] = f"Bearer {token.read_text().strip()}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self._url + path, data=data, headers=headers, method=method)


# -- before a run begins ---------------------------------------------------------------------------------------


def missing(cluster: Cluster, templates: Iterable[str], patience_s: float) -> tuple[int, list[str]]:
    """(exit code, what a run of these templates needs and the cluster has not), by name."""
    problems, needs, maps = [], set(), set()
    for template in templates:
        job = cluster.get(template)
        if job is None:
            problems.append(f"there is no RayJob {template} to take as a template; apply infra/kuberay first")
            continue
        for pod in pods(job["spec"]):
            if "serviceAccountName" in pod:
                needs.add(("serviceaccounts", pod["serviceAccountName"]))
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                for source in container.get("envFrom", []):
                    if "secretRef" in source:
                        needs.add(("secrets", source["secretRef"]["name"]))
                    if "configMapRef" in source:
                        maps.add(source["configMapRef"]["name"])
    problems += [f"there is no {kind[:-1]} {name}" for kind, name in sorted(needs) if not cluster.has(kind, name)]
    tracking = ""
    for name in sorted(maps):
        settings = cluster.settings(name)
        if settings is None:
            problems.append(f"there is no configmap {name}")
        tracking = (settings or {}).get("LATENTLOOM_TRACKING", tracking)
    if problems:
        return 2, problems
    problem = unreachable(tracking, patience_s) if tracking.startswith("http") else ""
    return (3, [f"the tracking server {tracking} does not answer: {problem}"]) if problem else (0, [])


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification inside a RayJob's."""
    if isinstance(node, dict) and "containers" in node:
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from pods(value)


def unreachable(url: str, patience_s: float) -> str:
    """Why a server gives no answer, asked for that long; empty when it gives one, be it that it knows nobody."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=10):
                return ""
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return ""
            problem = f"HTTP {error.code}"
        except OSError as error:
            problem = str(error)
        if time.monotonic() > give_up:
            return problem
        time.sleep(min(10.0, patience_s / 4))


# -- what a run makes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The name under which a run is found again, the schedule it is one of, and who owns what it makes."""

    name: str
    schedule: str
    owner: dict[str, str] | None = None


def from_template(template: dict[str, Any], name: str, run: Run) -> dict[str, Any]:
    """A RayJob that starts at once, with a template's specification."""
    spec = json.loads(json.dumps(template["spec"]))
    spec["suspend"] = False
    # Which code deserves another attempt is decided here; the operator would repeat a typo, too.
    spec["backoffLimit"] = 0
    spec["entrypoint"] = spec["entrypoint"].replace(_PLACEHOLDER, run.name)
    labels = {**template["metadata"].get("labels", {}), RUN: run.name, SCHEDULE: run.schedule}
    metadata: dict[str, Any] = {"name": name, "labels": labels}
    if run.owner is not None:  # what is started goes with who started it
        metadata["ownerReferences"] = [run.owner]
    return {"apiVersion": template["apiVersion"], "kind": "RayJob", "metadata": metadata, "spec": spec}


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


@dataclass(frozen=True)
class Pace:
    """How many attempts a step has, and the seconds between two looks and between two attempts."""

    attempts: int
    period_s: float
    pause_s: float
    longest_pause_s: float

    def pause(self, attempt: int) -> float:
        """Between the end of this attempt and the next one."""
        return min(self.longest_pause_s, self.pause_s * 2.0 ** (attempt - 1))


def run_step(cluster: Cluster, template: str, run: Run, pace: Pace, sleep: Callable[[float], None]) -> int:
    """Bring one step to its end: adopt, create, follow, repeat; its exit code."""
    code, late = AGAIN, False
    for attempt in range(1, pace.attempts + 1):
        name = f"{run.name}-{template}-{attempt}"
        job = cluster.get(name)
        if job is None:
            source = cluster.get(template)
            if source is None:
                return fail(2, f"there is no RayJob {template} to take as a template; apply infra/kuberay first")
            cluster.create(from_template(source, name, run))
            say(f"{name}: created")
        code = follow(cluster, name, pace.period_s, sleep)
        job = cluster.get(name) or {}
        late = job.get("status", {}).get("reason") == LATE
        if code != AGAIN and not (code == 3 and AWAY in job.get("status", {}).get("message", "")):
            return code
        if attempt < pace.attempts and cluster.get(f"{run.name}-{template}-{attempt + 1}") is None:
            # Counted from the attempt's end, by the clock: another start of this program waits only for the rest.
            rest = pace.pause(attempt) - seconds_since_end(job, time.time())
            if rest > 0:
                say(f"{name}: the next attempt begins in {rest:.0f} s")
                sleep(rest)
    return fail(3, f"{template}: its pods never came up, in {pace.attempts} attempts") if late else code


def seconds_since_end(job: dict[str, Any], now: float) -> float:
    """0 where nobody knows when it ended."""
    ended: str | None = job.get("status", {}).get("endTime")
    return now - datetime.datetime.fromisoformat(ended).timestamp() if ended else 0.0


def clean_up(cluster: Cluster, run: Run, keep: int) -> None:
    """Delete the RayJobs of a schedule's runs that are over, but for the newest ones and this one."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for job in cluster.of_schedule(run.schedule):
        runs.setdefault(job["metadata"]["labels"][RUN], []).append(job)
    runs.pop(run.name, None)
    over = {name: jobs for name, jobs in runs.items() if all(exit_code(job) is not None for job in jobs)}
    newest = sorted(over, key=lambda name: max(j["metadata"]["creationTimestamp"] for j in over[name]), reverse=True)
    for name in newest[keep:]:
        for job in over[name]:
            cluster.delete(job["metadata"]["name"])
        say(f"{name}: its {len(over[name])} RayJobs were removed")


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
            hint = f"\n{look_at(status)}" if status.get("reason") == LATE else ""
            return fail(code, f"{name}: {status.get('reason', '')} {status.get('message', '')[:2000]}".strip() + hint)
        sleep(period_s)


def look_at(status: dict[str, Any]) -> str:
    """Where the cause of a cluster that did not come up can be seen, while its pods are kept."""
    selector = f"--selector ray.io/cluster={status.get('rayClusterName', '')}"
    return f"what its pods wait for: kubectl describe pods {selector}"


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
    parser.add_argument("templates", nargs="+", help=f"RayJobs to copy, in this order; night: {' '.join(NIGHT)}")
    parser.add_argument("--run", required=True, help="name of the run: the same name continues it")
    parser.add_argument("--attempts", type=int, default=5, help="RayJobs for one step, at most")
    parser.add_argument(
        "--pause", type=float, default=300.0, help="seconds before a second attempt; doubles each time"
    )
    parser.add_argument("--longest-pause", type=float, default=1800.0, help="seconds between two attempts, at most")
    parser.add_argument("--keep", type=int, default=14, help="ended runs of this schedule whose RayJobs stay")
    parser.add_argument("--schedule", help="whose runs these are; default: the run's name up to its last -")
    parser.add_argument("--owner", help="apiVersion,kind,name,uid of what RayJobs are deleted with, such as a Job")
    parser.add_argument("--namespace", help="default: the pod's own")
    parser.add_argument("--api", help="URL of the Kubernetes API; default: the pod's own cluster")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder with token and ca.crt")
    parser.add_argument("--period", type=float, default=15.0, help="seconds between two looks")
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds to wait for an API that is away")
    parser.add_argument("--tracking-patience", type=float, default=600.0, help="the same for the tracking server")
    options = parser.parse_args()
    templates = [name for given in options.templates for name in (NIGHT if given == "night" else (given,))]
    for template in templates:
        name = f"{options.run}-{template}-{options.attempts}"
        if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
            return fail(2, f"{name!r} cannot name a RayJob: small letters, digits and -, at most {MAX_NAME} of them")
    namespace = options.namespace or (options.account / "namespace").read_text().strip()
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    url = options.api or f"https://{f'[{host}]' if ':' in host else host}:{port}"
    cluster = Cluster(url, options.account, namespace, options.patience)
    owner = owner_of(options.owner) if options.owner else None
    if options.owner and owner is None:
        return fail(2, f"--owner {options.owner!r}: give apiVersion,kind,name,uid")
    run = Run(options.run, options.schedule or options.run.rpartition("-")[0] or options.run, owner)
    # Once it runs, it is followed whatever else is missing.
    if cluster.get(f"{run.name}-{templates[0]}-1") is None:
        code, problems = missing(cluster, templates, options.tracking_patience)
        if problems:
            return fail(code, "\n".join(problems) + "\nnothing was started")
        clean_up(cluster, run, options.keep)
    pace = Pace(options.attempts, options.period, options.pause, options.longest_pause)
    for template in templates:
        code = run_step(cluster, template, run, pace, time.sleep)
        if code:
            return code
    return 0


def owner_of(text: str) -> dict[str, str] | None:
    """An owner reference out of its four parts, None when they are not four."""
    parts = text.split(",")
    return (
        dict(zip(("apiVersion", "kind", "name", "uid"), parts, strict=True))
        if len(parts) == 4 and all(parts)
        else None
    )


if __name__ == "__main__":
    sys.exit(main())
