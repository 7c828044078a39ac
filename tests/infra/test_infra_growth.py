"""A cluster that grows on demand: what is asked of an autoscaler, and what happens when it does not come."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.cluster import await_resources
from pipeline.errors import StoppedError
from tests.infra.infra_files import REPOSITORY
from tests.infra.infra_ray_cluster import RayCluster

LISTS = (
    "cluster_synced_files",
    "head_setup_commands",
    "head_start_ray_commands",
    "initialization_commands",
    "rsync_exclude",
    "rsync_filter",
    "setup_commands",
    "worker_setup_commands",
    "worker_start_ray_commands",
)


def test_waits_until_everything_is_there() -> None:
    steps = iter([{}, {"CPU": 2.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}])
    await_resources({"CPU": 8, "GPU": 2}, lambda: next(steps), timeout_s=10.0)
    assert next(steps, None) is None


def test_goes_on_with_a_part(caplog: pytest.LogCaptureFixture) -> None:
    await_resources({"CPU": 8, "GPU": 4}, lambda: {"CPU": 8.0, "GPU": 3.0}, timeout_s=0.01)
    assert "3 of 4 GPUs" in caplog.text


def test_stops_resumably_when_nothing_came() -> None:
    with pytest.raises(StoppedError, match="0 of 4 GPUs") as caught:
        await_resources({"CPU": 8, "GPU": 4}, lambda: {"CPU": 8.0}, timeout_s=0.01)
    assert caught.value.exit_code == 75
    assert caught.value.key == "cluster.request_timeout_s"


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_autoscaler_grows_from_zero_and_shrinks_again(tmp_path: Path) -> None:
    """Ray's autoscaler, with processes for nodes: none at first, two when asked for, none once let go."""
    config = {
        "cluster_name": "growth",
        "max_workers": 3,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,  # the nodes share one address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "decode": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3},
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": "head",
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in LISTS},
    }
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(config))
    script = textwrap.dedent(
        """
        import time
        from pipeline.cluster import ClusterConfig, ensure_ray, shutdown_ray

        ray = ensure_ray(ClusterConfig())
        print("before", ray.cluster_resources().get("CPU", 0.0))
        shutdown_ray()
        ray = ensure_ray(ClusterConfig(request_cpus=4, request_timeout_s=240.0))
        print("grown to", ray.cluster_resources().get("CPU", 0.0))
        shutdown_ray()
        ray = ensure_ray(ClusterConfig())
        give_up = time.monotonic() + 240
        while ray.cluster_resources().get("CPU", 0.0) and time.monotonic() < give_up:
            time.sleep(1)
        print("shrunk to", ray.cluster_resources().get("CPU", 0.0))
        """
    )
    cluster = RayCluster(
        {"PYTHONPATH": str(REPOSITORY), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    )
    try:
        cluster.start_head(f"--autoscaling-config={file}")
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**cluster.environment, "RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        cluster.stop()
    said = done.stdout + done.stderr[-4000:]
    assert "before 0.0" in done.stdout, said
    assert "grown to 4.0" in done.stdout, said
    assert "shrunk to 0.0" in done.stdout, said
