"""The schedules: the launcher against a small Kubernetes API on loopback, and the objects that call it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline import errors
from pipeline.storage.errors import StoreUnavailable, job_error
from tests.infra.infra_files import BASE, INFRA, Manifest, named, of_kind, ray_job_specs, read, render
from tests.infra.infra_night import launcher

pytestmark = pytest.mark.integration

SCHEDULES = INFRA / "schedules"
LAUNCH = SCHEDULES / "launch.py"
STEPS = list(launcher().NIGHT)


POD = {
    "spec": {
        "serviceAccountName": "latentloom-head",
        "containers": [
            {"envFrom": [{"configMapRef": {"name": "latentloom"}}, {"secretRef": {"name": "mlflow-client"}}]}
        ],
    }
}


class Api:
    """Stores RayJobs, and lets each created one end as the test has ordered: {"encode": [75, 0]} by attempts."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {
            name: {
                "apiVersion": "ray.io/v1",
                "kind": "RayJob",
                "metadata": {"name": name, "labels": {"app.kubernetes.io/component": name}, "uid": "1"},
                "spec": {
                    "suspend": True,
                    "backoffLimit": 3,
                    "entrypoint": f"python -m jobs.{name} a=${{LATENTLOOM_RUN}}",
                    "submitterPodTemplate": POD,
                },
                "status": {"jobDeploymentStatus": "Suspended"},
            }
            for name in [*STEPS, "gc"]
        }
        # What is there besides; the tracking server is this one, at /health.
        self.others = {"serviceaccounts/latentloom-head", "secrets/mlflow-client", "configmaps/latentloom"}
        self.tracking, self.healthy, self.asked = "", 200, 0
        self.deleted: list[str] = []
        self.created: list[str] = []
        self.ends: dict[str, list[Any]] = {}
        self.failures: list[int] = []
        self.tokens: set[str] = set()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/health":
                    api.asked += 1
                    self.send_response(api.healthy)
                    self.end_headers()
                elif self.path.startswith("/api/v1/namespaces/latentloom/"):
                    self._answer(*api.other(*self.path.split("/")[-2:], self.headers["Accept"]))
                elif "?labelSelector=" in self.path:
                    self._answer(200, {"items": api.listed(unquote(self.path.partition("=")[2]))})
                else:
                    self._answer(*api.get(self.path.rpartition("/")[2]))

            def do_DELETE(self) -> None:
                api.deleted.append(self.path.rpartition("/")[2])
                del api.jobs[api.deleted[-1]]
                self._answer(200, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*api.post(body))

            def _answer(self, code: int, body: Any) -> None:
                api.tokens.add(self.headers.get("Authorization", ""))
                if api.failures:
                    code, body = api.failures.pop(0), {"message": "planted"}
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.tracking = self.url

    def other(self, kind: str, name: str, accept: str) -> tuple[int, Any]:
        if f"{kind}/{name}" not in self.others:
            return 404, {}
        if kind == "configmaps":
            return 200, {"data": {"LATENTLOOM_TRACKING": self.tracking}}
        assert "PartialObjectMetadata" in accept, "what a secret holds is not asked for"
        return 200, {"metadata": {"name": name}}

    def listed(self, selector: str) -> list[dict[str, Any]]:
        key, _, value = selector.partition("=")
        return [j for j in self.jobs.values() if j["metadata"].get("labels", {}).get(key) == value]

    def get(self, name: str) -> tuple[int, Any]:
        job = self.jobs.get(name)
        if job is None:
            return 404, {}
        answer = json.loads(json.dumps(job))
        # The next look sees the state after this one.
        if job["metadata"].get("next"):
            job["status"] = job["metadata"]["next"].pop(0)
        return 200, answer

    def post(self, job: dict[str, Any]) -> tuple[int, Any]:
        name = job["metadata"]["name"]
        if name in self.jobs:
            return 409, {}
        template = job["metadata"]["labels"]["app.kubernetes.io/component"]
        end = (self.ends.get(template) or [0]).pop(0)
        job["status"] = {"jobDeploymentStatus": "Initializing"}
        job["metadata"]["creationTimestamp"] = f"2026-01-01T00:{len(self.created):02d}:00Z"
        job["metadata"]["next"] = [{"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, ended(end)]
        self.jobs[name] = job
        self.created.append(name)
        return 201, job

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def ended(code: int | str) -> dict[str, str]:
    """The status KubeRay shows for a job that ended; the message is Ray's own."""
    if code == 0:
        return {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    if code == "stopped":
        return {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}
    if code == "away":
        error = job_error(StoreUnavailable(5, "the endpoint cannot be reached", "s3://elsewhere/latents"))
        assert error is not None
        return {**ended(error.exit_code), "message": ended(error.exit_code)["message"] + "\n" + error.what}
    if code == "late":
        late = {"reason": launcher().LATE, "rayClusterName": "embed-text-x7k2p"}
        return {"jobDeploymentStatus": "Failed", **late}
    if code == "lost":
        return {"jobDeploymentStatus": "Failed", "reason": "JobDeploymentStatusTransitionGracePeriodExceeded"}
    message = f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):"
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": message}


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.close()


QUICK = ["--period", "0.01", "--patience", "2", "--tracking-patience", "0.2", "--pause", "0.01"]


@pytest.fixture
def launch(api: Api, tmp_path: Path) -> Any:
    (tmp_path / "namespace").write_text("latentloom\n")
    (tmp_path / "token").write_text("sesame\n")

    def call(*arguments: str, run: str = "nightly-29387417") -> tuple[int, str]:
        command = [sys.executable, str(LAUNCH), "--run", run, "--api", api.url, "--account", str(tmp_path)]
        done = subprocess.run(
            [*command, *QUICK, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return call


def test_a_night_makes_one_rayjob_per_step_in_order(api: Api, launch: Any) -> None:
    assert launch("night")[0] == 0
    assert api.created == [f"nightly-29387417-{s}-1" for s in STEPS]
    spec = api.jobs["nightly-29387417-train-1"]["spec"]
    assert spec["entrypoint"] == "python -m jobs.train a=nightly-29387417"
    assert (spec["suspend"], spec["backoffLimit"]) == (False, 0)
    assert api.jobs["nightly-29387417-train-1"]["metadata"]["labels"]["latentloom/run"] == "nightly-29387417"
    assert api.tokens == {"Bearer sesame"}


def test_a_second_start_of_the_same_night_makes_nothing(api: Api, launch: Any) -> None:
    assert launch(*STEPS)[0] == 0
    before = list(api.created)
    assert launch(*STEPS)[0] == 0
    assert api.created == before


def test_stopped_and_lost_jobs_get_another_attempt(api: Api, launch: Any) -> None:
    api.ends = {"encode": [75, "lost", "stopped", 137, 0]}
    assert launch("encode", "train")[0] == 0
    assert api.created == [f"nightly-29387417-encode-{n}" for n in (1, 2, 3, 4, 5)] + ["nightly-29387417-train-1"]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_other_codes_end_the_chain_and_stay(api: Api, launch: Any, code: int) -> None:
    api.ends = {"train": [code]}
    first, said = launch(*STEPS)
    assert first == code
    assert f"exit code {code}" in said
    assert api.created[-1] == "nightly-29387417-train-1"
    made = list(api.created)
    assert launch(*STEPS)[0] == code, "the next pod must not repeat what cannot succeed"
    assert api.created == made


def test_a_store_that_never_answers_gets_all_attempts_and_its_own_code(api: Api, launch: Any) -> None:
    api.ends = {"encode": ["away", 0], "train": ["away"] * 9}
    code, said = launch("--attempts", "3", "encode", "train")
    assert code == 3
    assert f"{StoreUnavailable.__name__}:" == launcher().AWAY
    assert launcher().AWAY in said
    assert [name.partition("417-")[2] for name in api.created] == [
        *("encode-1", "encode-2"),
        *("train-1", "train-2", "train-3"),
    ]


def test_a_cluster_that_does_not_come_up_is_said_by_its_step_and_ends_the_night(api: Api, launch: Any) -> None:
    api.ends = {"encode": ["late", 0], "embed-text": ["late"] * 9}
    code, said = launch("--attempts", "2", *STEPS)
    assert code == 3, "a schedule must not begin its attempts anew"
    assert "embed-text: its pods never came up, in 2 attempts" in said
    assert "kubectl describe pods --selector ray.io/cluster=embed-text-x7k2p" in said
    assert [name.partition("417-")[2] for name in api.created] == [
        *("encode-1", "encode-2"),
        *("embed-text-1", "embed-text-2"),
    ]


def test_attempts_are_bounded(api: Api, launch: Any) -> None:
    api.ends = {"encode": [75] * 9}
    assert launch("--attempts", "2", "encode")[0] == 75
    assert len(api.created) == 2


def test_a_running_job_is_adopted(api: Api, launch: Any) -> None:
    running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    api.jobs["nightly-29387417-encode-1"] = {
        "metadata": {"name": "nightly-29387417-encode-1", "next": [running, ended(0)]},
        "status": running,
    }
    assert launch("encode")[0] == 0
    assert api.created == []


def test_an_api_that_stumbles_is_waited_for_and_one_that_refuses_is_not(api: Api, launch: Any) -> None:
    api.failures = [500, 503]
    assert launch("encode")[0] == 0
    api.failures = [403] * 5
    code, said = launch("train")
    assert code == 3
    assert "HTTP 403" in said


def test_an_api_that_stays_away_leaves_the_work_running(api: Api, launch: Any) -> None:
    api.failures = [500] * 1000
    assert launch("encode")[0] == 75


def test_an_hour_of_outage_does_not_use_up_the_attempts() -> None:
    launch = launcher()
    pace = launch.Pace(attempts=5, period_s=15.0, pause_s=300.0, longest_pause_s=1800.0)
    pauses = [pace.pause(attempt) for attempt in range(1, pace.attempts)]
    assert pauses == [300, 600, 1200, 1800]
    assert sum(pauses) > 3600


def test_a_night_during_which_the_store_is_away_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the test's own clock: the first attempt is stopped, those that begin meanwhile find no store."""
    launch = launcher()
    now, back = 1_800_000_000.0, 1_800_000_000.0 + 3600
    jobs: dict[str, dict[str, Any]] = {s: {"apiVersion": "ray.io/v1", "metadata": {}, "spec": {}} for s in STEPS}

    class Cluster:
        def get(self, name: str) -> dict[str, Any] | None:
            return jobs.get(name)

        def create(self, job: dict[str, Any]) -> None:
            end = datetime.fromtimestamp(now + 60, UTC).isoformat().replace("+00:00", "Z")
            first = job["metadata"]["name"].endswith("-1")
            how = ended((75 if first else "away") if now < back else 0)
            jobs[job["metadata"]["name"]] = {**job, "status": {**how, "endTime": end}}

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    for step in STEPS:
        jobs[step]["spec"] = {"entrypoint": ""}
    monkeypatch.setattr(launch.time, "time", lambda: now)
    pace = launch.Pace(attempts=5, period_s=15.0, pause_s=300.0, longest_pause_s=1800.0)
    run = launch.Run("nightly-1", "nightly")
    assert [launch.run_step(Cluster(), step, run, pace, sleep) for step in STEPS] == [0] * len(STEPS)
    assert sum("encode" in name for name in jobs) == 1 + 5, "the last attempt was the one"
    assert sum(name.startswith("nightly-1-") for name in jobs) == 5 + len(STEPS) - 1


def test_pauses_are_counted_from_an_attempts_end_by_the_clock(api: Api, launch: Any) -> None:
    """A launcher that is started anew waits for the rest of a pause, and not for all of it again."""
    api.ends = {"encode": [75, 0]}
    began = time.monotonic()
    code, said = launch("--pause", "1.5", "encode")
    assert code == 0
    assert time.monotonic() - began > 1.5
    assert "the next attempt begins in" in said
    stopped = {**ended(75), "endTime": "2026-01-01T00:00:00Z"}
    api.jobs["again-1-encode-1"] = {"metadata": {"name": "again-1-encode-1"}, "status": stopped}
    code, said = launch("--pause", "100000", "encode", run="again-1")
    assert code == 0, "that pause was over long ago"
    assert "next attempt" not in said


def test_what_is_missing_is_said_and_nothing_is_started(api: Api, launch: Any) -> None:
    api.others = {"configmaps/latentloom"}
    code, said = launch("night")
    assert code == 2
    assert "there is no serviceaccount latentloom-head" in said
    assert "there is no secret mlflow-client" in said
    api.others = {"serviceaccounts/latentloom-head", "secrets/mlflow-client"}
    code, said = launch("night")
    assert (code, "there is no configmap latentloom" in said) == (2, True)
    assert api.created == []


def test_a_tracking_server_that_does_not_answer_stops_a_night_before_it_begins(api: Api, launch: Any) -> None:
    for url, health in (("http://127.0.0.1:9", 200), (api.url, 503)):
        api.tracking, api.healthy = url, health
        code, said = launch("night")
        assert code == 3
        assert f"the tracking server {api.tracking} does not answer" in said
    assert api.created == []
    api.healthy = 401
    assert launch("encode")[0] == 0, "it is there, and knows nobody without a password"


def test_a_night_that_runs_is_followed_whatever_is_missing(api: Api, launch: Any) -> None:
    running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    api.jobs["nightly-29387417-encode-1"] = {
        "metadata": {"name": "nightly-29387417-encode-1", "next": [running, ended(0)]},
        "status": running,
    }
    api.others, api.healthy = set(), 503
    assert launch("encode")[0] == 0


def test_an_account_without_rights_is_told_which_file_gives_them(api: Api, launch: Any) -> None:
    api.failures = [403]
    code, said = launch("night")
    assert code == 3
    assert "access.yaml" in said
    assert api.created == []


def test_what_is_started_is_owned_by_who_started_it(api: Api, launch: Any) -> None:
    assert launch("--owner", "batch/v1,Job,nightly-29387417,abc", "encode")[0] == 0
    assert api.jobs["nightly-29387417-encode-1"]["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "nightly-29387417", "uid": "abc"}
    ]
    assert launch("--owner", "batch/v1,Job,nightly-29387417", "train")[0] == 2, "an owner without its uid"


def test_old_runs_are_removed_and_those_that_run_are_not(api: Api, launch: Any) -> None:
    for night in range(5):
        assert launch("encode", "train", run=f"nightly-{night}")[0] == 0
    assert launch("encode", run="weekly-1")[0] == 0
    api.jobs["nightly-0-train-1"]["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    assert launch("--keep", "2", "encode", run="nightly-5")[0] == 0
    assert api.deleted == [f"nightly-{night}-{step}-1" for night in (2, 1) for step in ("encode", "train")]


def test_bad_input(api: Api, launch: Any) -> None:
    assert launch("encode", run="Nightly_1")[0] == 2
    assert launch("encode", run="n" * 50)[0] == 2
    code, said = launch("enkode")
    assert code == 2
    assert "no RayJob enkode" in said
    assert api.created == []


# -- who calls it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cronjobs() -> list[Manifest]:
    return render(SCHEDULES / "cronjob")


def test_cron_objects_are_valid(cronjobs: list[Manifest]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in cronjobs:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    assert {m["metadata"]["name"] for m in of_kind(cronjobs, "CronJob")} == {"nightly", "weekly-gc"}


def test_exit_codes_are_mapped_to_retry_or_stop(cronjobs: list[Manifest]) -> None:
    """Every code a job can end with has its rule, and it is the one the README gives."""
    codes = {
        c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PipelineError)
    }
    for cron in of_kind(cronjobs, "CronJob"):
        assert cron["spec"]["concurrencyPolicy"] == "Forbid"
        job = cron["spec"]["jobTemplate"]["spec"]
        assert job["template"]["spec"]["restartPolicy"] == "Never", "a pod failure policy asks for it"
        rules = {
            r["action"]: set(r["onExitCodes"]["values"])
            for r in job["podFailurePolicy"]["rules"]
            if "onExitCodes" in r
        }
        assert rules["FailJob"] == codes - {errors.StoppedError.exit_code}
        assert errors.StoppedError.exit_code in rules["Count"]
        names = {c["name"] for c in job["template"]["spec"]["containers"]}
        assert {
            r["onExitCodes"]["containerName"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r
        } <= names


def test_templates_named_by_schedules_exist(cronjobs: list[Manifest]) -> None:
    templates = {m["metadata"]["name"] for m in of_kind(render(BASE), "RayJob")}
    for cron in of_kind(cronjobs, "CronJob"):
        (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        flag, run, flag_too, owner, step = container["args"]
        assert (flag, run, flag_too, owner) == ("--run", "$(RUN)", "--owner", "batch/v1,Job,$(RUN),$(JOB_UID)")
        labels = {e["name"]: e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}
        assert labels == {
            "RUN": "metadata.labels['batch.kubernetes.io/job-name']",
            "JOB_UID": "metadata.labels['batch.kubernetes.io/controller-uid']",
        }
        assert step == {"nightly": "night", "weekly-gc": "gc"}[cron["metadata"]["name"]]
        assert {*STEPS, "gc"} <= templates
        # nightly-29387417-embed-text-5: the longest name it can make.
        assert max(len(f"{cron['metadata']['name']}-29387417-{s}-5") for s in STEPS) <= 47


def test_the_launcher_may_do_what_it_does_and_no_more(cronjobs: list[Manifest]) -> None:
    role = named(cronjobs, "Role", "latentloom-schedule")
    rules = {r["resources"][0]: r for r in role["rules"]}
    assert set(rules) == {"rayjobs", "serviceaccounts", "secrets", "configmaps"}
    assert rules["rayjobs"]["verbs"] == ["get", "list", "create", "delete"]
    needed: dict[str, set[str]] = {"serviceaccounts": set(), "secrets": set(), "configmaps": set()}
    for spec in ray_job_specs(render(BASE)).values():
        for pod in launcher().pods(spec):
            needed["serviceaccounts"].add(pod["serviceAccountName"])
            for source in pod["containers"][0]["envFrom"]:
                ((kind, wanted),) = source.items()
                needed["secrets" if kind == "secretRef" else "configmaps"].add(wanted["name"])
    for kind, names in needed.items():
        assert rules[kind]["verbs"] == ["get"]
        assert set(rules[kind]["resourceNames"]) == names


def test_the_launcher_stops_on_the_same_codes() -> None:
    text = LAUNCH.read_text()
    codes = {int(c) for c in re.findall(r"\d+", re.search(r"^STOP = \{(.*)\}", text, re.MULTILINE)[1])}  # type: ignore[index]
    known = {
        c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PipelineError)
    }
    assert codes == known - {75}


def argo() -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in read(SCHEDULES / "argo" / "nightly.yaml")}


def test_argo_workflow_is_valid_by_its_models() -> None:
    models = pytest.importorskip("hera.workflows.models", reason="pip install hera")

    def unknown(given: Any, kept: Any, place: str) -> list[str]:
        """Fields of the file that the model did not keep."""
        if isinstance(given, dict) and isinstance(kept, dict):
            return [
                x
                for k, v in given.items()
                for x in (unknown(v, kept[k], f"{place}.{k}") if k in kept else [f"{place}.{k}"])
            ]
        if isinstance(given, list) and isinstance(kept, list):
            return [
                x for i, (a, b) in enumerate(zip(given, kept, strict=True)) for x in unknown(a, b, f"{place}.{i}")
            ]
        return []

    assert set(argo()) == {"nightly", "weekly-gc"}
    for workflow in argo().values():
        model = models.CronWorkflow.parse_obj(workflow)
        assert unknown(workflow, json.loads(model.json(by_alias=True, exclude_none=True)), "") == []


def test_argo_workflow_chains_the_steps_and_retries_what_can_succeed() -> None:
    spec = argo()["nightly"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    chain, step = spec["workflowSpec"]["templates"]
    weekly = argo()["weekly-gc"]["spec"]
    assert weekly["workflowSpec"]["templates"] == [step], "the same step"
    assert weekly["workflowSpec"]["arguments"] == {"parameters": [{"name": "job", "value": "gc"}]}
    assert {"schedules", "workflowSpec"} == {k for k in spec if spec[k] != weekly[k]}
    tasks = chain["dag"]["tasks"]
    assert [t["arguments"]["parameters"][0]["value"] for t in tasks] == STEPS
    assert [t.get("dependencies", []) for t in tasks] == [[], *[[s] for s in STEPS[:-1]]]
    expression = step["retryStrategy"]["expression"]

    def again(status: str, code: int) -> bool:
        # The expression language's operators are Python's under other names.
        text = (
            expression.replace("||", "or").replace("lastRetry.status", "status").replace("lastRetry.exitCode", "code")
        )
        return bool(eval(text, {"asInt": int, "status": status, "code": code, "__builtins__": {}}))  # noqa: S307

    assert again("Failed", 75)
    assert again("Failed", 137)
    assert again("Error", -1)
    assert not any(again("Failed", code) for code in (1, 2, 3, 4, 5))


def test_airflow_dag_by_importing_it_with_airflow(tmp_path: Path) -> None:
    """Airflow wants an environment of its own: LATENTLOOM_AIRFLOW_PYTHON names its Python."""
    python = os.environ.get("LATENTLOOM_AIRFLOW_PYTHON")
    if not python:
        pytest.skip("LATENTLOOM_AIRFLOW_PYTHON names no Python with Airflow and its Kubernetes provider")
    script = Path(__file__).with_name("infra_airflow_check.py")
    done = subprocess.run(
        [python, str(script), str(SCHEDULES / "airflow" / "latentloom_nightly.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["chain"] == STEPS
    assert answer["arguments"] == [["--run", "nightly-{{ ds_nodash }}", s] for s in STEPS]
    assert answer["weekly"] == [["--run", "weekly-{{ ds_nodash }}", "gc"]]
    assert answer["stop"] == {str(c): "AirflowFailException" for c in (1, 2, 3, 4, 5)}
    assert answer["deferrable"]
    assert answer["retries"] > 0
    assert answer["again"] == "AirflowException", "which Airflow retries"
