"""Run by a Python that has Airflow: imports the DAG file given as argument and prints what came of it, as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace
from typing import Any


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("latentloom_nightly", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The provider's own part would ask a cluster; of it, only that it raises for a failed pod matters here.
    module.KubernetesPodOperator.cleanup = failed
    dag = module.dag
    dag.check_cycle()
    chain = [t for t in dag.tasks if not t.upstream_task_ids]
    while chain[-1].downstream_list:
        chain += chain[-1].downstream_list
    answer = {
        "chain": [t.task_id for t in chain],
        "arguments": [list(t.arguments) for t in chain],
        "weekly": [list(t.arguments) for t in module.weekly_gc.tasks],
        "deferrable": all(t.deferrable for t in [*chain, *module.weekly_gc.tasks]),
        "retries": min(t.retries for t in chain),
        "stop": {str(code): outcome(chain[0], code) for code in sorted(module.STOP)},
        "again": outcome(chain[0], 75),
    }
    print(json.dumps(answer))


def failed(*_: Any, **__: Any) -> None:
    from airflow.sdk.exceptions import AirflowException

    raise AirflowException("pod failed")


def outcome(task: Any, code: int) -> str:
    """The exception with which a task ends whose container ended with `code`."""
    state = SimpleNamespace(terminated=SimpleNamespace(exit_code=code, message="", reason="Error"))
    status = SimpleNamespace(name=task.base_container_name, state=state)
    pod = SimpleNamespace(
        metadata=SimpleNamespace(name="p", namespace="n", labels={}),
        status=SimpleNamespace(phase="Failed", container_statuses=[status], reason=None, message=None),
        spec=SimpleNamespace(containers=[SimpleNamespace(name=task.base_container_name)]),
    )
    try:
        task.cleanup(pod, pod, context={})
    except Exception as error:
        return type(error).__name__
    return "none"


if __name__ == "__main__":
    main(sys.argv[1])
