"""The nightly chain for Airflow: each step is a pod that launches one RayJob and ends with the job's exit code.

On top of an overlay of infra/kuberay and of infra/schedules/cronjob/access.yaml. Put this file into the DAGs folder;
it needs the provider for Kubernetes and nothing of latentloom.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG, chain
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import models as k8s

# The launcher's own list, for this file goes where the launcher is not; a test holds them equal.
STEPS = ("encode", "embed-text", "compact", "train", "sample", "evaluate", "promote", "verify")
# Bug, configuration, input, conflict, rejects over budget: running again cannot help, a person has to look.
STOP = frozenset({1, 2, 3, 4, 5})


class LaunchRayJob(KubernetesPodOperator):
    """A pod operator that gives up at once on the exit codes that another try would only repeat."""

    def cleanup(self, pod: Any, remote_pod: Any, *args: Any, **kwargs: Any) -> None:
        """As inherited, which raises when the pod failed; then how it ended decides whether Airflow may retry."""
        try:
            super().cleanup(pod, remote_pod, *args, **kwargs)
        except AirflowException as error:
            code = exit_code(remote_pod, self.base_container_name)
            if code in STOP:
                raise AirflowFailException(f"{self.task_id} ended with exit code {code}: {error}") from error
            raise


def exit_code(pod: Any, container: str) -> int | None:
    """The exit code of a pod's container, None when it has not ended or nothing is known."""
    statuses = getattr(getattr(pod, "status", None), "container_statuses", None) or []
    ended = [s.state.terminated for s in statuses if s.name == container and s.state and s.state.terminated]
    return ended[0].exit_code if ended else None


def launch(job: str, run: str) -> LaunchRayJob:
    """A task that runs one RayJob to its end. The pod goes when it succeeded, so it owns nothing: RayJobs of old runs
    are removed by the launcher itself."""
    return LaunchRayJob(
        task_id=job,
        name=f"launch-{job}",
        namespace="latentloom",
        # Of your registry, by its digest: in the environment of Airflow's parsers and workers.
        image=os.environ.get("LATENTLOOM_IMAGE", "latentloom-cpu:0.1.0"),
        cmds=["python", "/opt/latentloom/launch.py"],
        # The day the run is for: a retry and a cleared task find the RayJobs of that night.
        arguments=["--run", run, job],
        service_account_name="latentloom-schedule",
        labels={"app.kubernetes.io/part-of": "latentloom", "app.kubernetes.io/component": "schedule"},
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=1000,
            run_as_group=100,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        container_security_context=k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        container_resources=k8s.V1ResourceRequirements(
            requests={"cpu": "50m", "memory": "64Mi"}, limits={"memory": "256Mi"}
        ),
        on_finish_action="delete_succeeded_pod",
        # Steps take hours: meanwhile a triggerer watches the pod, and no worker's slot is held.
        deferrable=True,
        poll_interval=60,
        execution_timeout=timedelta(days=3),
    )


DEFAULTS = {"retries": 6, "retry_delay": timedelta(minutes=5), "retry_exponential_backoff": True}

with DAG(
    dag_id="latentloom_nightly",
    description="New images to latents, a model, samples of it, and how good they are",
    schedule="17 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS,
    tags=["latentloom"],
) as dag:
    chain(*(launch(step, "nightly-{{ ds_nodash }}") for step in STEPS))

with DAG(
    dag_id="latentloom_weekly_gc",
    description="Files that compaction and forgetting have superseded go",
    schedule="17 13 * * 0",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS,
    tags=["latentloom"],
) as weekly_gc:
    launch("gc", "weekly-{{ ds_nodash }}")
