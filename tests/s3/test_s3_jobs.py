"""The jobs on s3:// as their users run them: the whole chain, and every way in which a store can be unusable."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.storage.root import Root
from pipeline.store.maintain.verify import verify
from tests.s3.settings import encode_settings, sample_settings, succeed, tracked, train_settings, uploaded, words
from tests.support.images import make_codec, make_images
from tests.support.jobs import run
from tests.support.mlflow_server import MlflowServer
from tests.support.postgres import Postgres
from tests.support.processes import free_port
from tests.support.radosgw import Keys, Radosgw
from tests.support.servers import use_store

pytestmark = [pytest.mark.s3, pytest.mark.slow]

IMAGES = 12


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("s3-jobs")
    make_images(base / "images", IMAGES, broken=1)
    make_codec(base / "codec")
    return base


@pytest.mark.ray
def test_the_whole_chain_lies_in_the_store(
    s3_environment: Radosgw,
    mlflow_stack: MlflowServer,
    postgres: Postgres,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Source, codec, latents, checkpoints, model, samples, reports on s3://; runs on a server with passwords."""
    assert mlflow_stack.auth is not None
    for name, value in mlflow_stack.auth.environment().items():
        monkeypatch.setenv(name, value)
    bucket, tracking = uploaded(s3_environment, local), tracked(tmp_path, mlflow_stack.uri)
    encoded = succeed("encode", encode_settings(bucket) | tracking, tmp_path)
    assert (encoded["counts"]["latents"], encoded["counts"]["rejected"]) == (IMAGES, 1)
    assert verify(f"{bucket}/latents", "checksums").problems == []
    assert succeed("encode", encode_settings(bucket) | tracking, tmp_path)["status"] == "unchanged"

    train = train_settings(bucket, **{"registry.name": "on-s3"}) | tracking
    trained = succeed("train", train, tmp_path)
    assert list(Root(f"{bucket}/run").list("checkpoints"))
    assert succeed("train", train, tmp_path)["status"] == "unchanged"

    sampled = succeed("sample", sample_settings(bucket, "models:/on-s3@latest") | tracking, tmp_path)
    assert (sampled["counts"]["images"], sampled["counts"]["rejected"]) == (5, 0)
    assert Root(f"{bucket}/samples").exists("contact.png")

    judge = {
        "reference.kind": "folder",
        "reference.uri": f"{bucket}/images",
        "image.resolution": 32,
        "samples.uri": f"{bucket}/samples",
        "codec.path": f"{bucket}/codec",
        "train.uri": f"{bucket}/run",
        "data.uri": f"{bucket}/latents",
        "output.uri": f"{bucket}/report",
        "classifier.enabled": "false",
        "fidelity.images": 4,
    }
    evaluated = succeed("evaluate", judge | tracking, tmp_path)
    assert evaluated["figures"]["psnr_db"] > 0
    assert b"<html" in Root(f"{bucket}/report").read_bytes("report.html")

    # From the dataset of images back to the source and from the source's dataset forward, by the server alone.
    settings = {k: v for k, v in tracking.items() if k == "tracking.uri"}
    back = succeed("lineage", {"start": f"{bucket}/samples"} | settings, tmp_path)["details"]
    jobs = [step["job"] for step in back["back"]]
    assert jobs == ["sample", "train", "encode"]
    assert [s["run_id"] for s in back["back"]] == [a["mlflow_run_id"] for a in (sampled, trained, encoded)]
    assert f"{bucket}/images" in [source["uri"] for source in back["sources"]]
    forward = succeed("lineage", {"start": f"{bucket}/latents"} | settings, tmp_path)["details"]
    assert {"train", "sample", "evaluate"} <= {step["job"] for step in forward["forward"]}
    # Nothing of it lies on this machine, and no secret lies anywhere.
    assert [p.name for p in tmp_path.iterdir() if p.name != "journal"] == []
    secrets = (s3_environment.keys.secret, mlflow_stack.auth.password)
    for place in (bucket, mlflow_stack.artifacts_uri):
        for info in Root(place).list():
            data = Root(place).read_bytes(info.key)
            assert not [s for s in secrets if s.encode() in data], info.key
    database = postgres.dump("mlflow")
    assert trained["mlflow_run_id"] in database
    assert not [s for s in (*secrets, postgres.password) if s in database]


@pytest.mark.ray
@pytest.mark.parametrize("form", ["parquet", "lance"])
def test_an_export_lies_in_the_store(form: str, s3_environment: Radosgw, local: Path, tmp_path: Path) -> None:
    if form == "lance":
        pytest.importorskip("lance")
    bucket, untracked = uploaded(s3_environment, local), {"tracking.enabled": "false"}
    succeed("encode", encode_settings(bucket) | untracked, tmp_path)
    wanted = {"data.uri": f"{bucket}/latents", "output.uri": f"{bucket}/export", "format": form, "shard_bytes": 4096}
    cluster = {"cluster.num_cpus": 2, "cluster.dashboard": "false"} | untracked
    done = succeed("export", wanted | cluster, tmp_path)
    assert (done["status"], done["counts"]["rows"]) == ("done", IMAGES)
    assert done["counts"]["shards"] > 1
    assert succeed("export", wanted | cluster, tmp_path)["status"] == "unchanged"
    Root(f"{bucket}/export").download_dir("", tmp_path / "here")
    if form == "lance":
        import lance

        assert lance.dataset(str(tmp_path / "here" / "data.lance")).count_rows() == IMAGES
    else:
        assert pq.read_table(tmp_path / "here" / "data").num_rows == IMAGES


@pytest.mark.parametrize(
    "case", ["unknown key", "wrong secret", "no bucket", "not allowed", "nobody there", "no keys"]
)
def test_a_store_that_cannot_be_used_ends_jobs_with_one_clear_message(
    s3_environment: Radosgw, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Exit code 3, no traceback, no secret, and nothing written; for what is read and for what is written."""
    store, secret = s3_environment, "planted-Secret-77"
    bucket, empty = uploaded(store, local), store.make_bucket()
    keys, endpoint, target = store.keys, store.endpoint, f"s3://{empty}"
    if case == "unknown key":
        keys, why = Keys("AKNOBODY", secret), "does not know this access key"
    elif case == "wrong secret":
        keys, why = Keys(keys.access, secret), "the secret key does not belong to the access key"
    elif case == "no bucket":
        target, why = "s3://no-such-bucket-here", "does not exist"
    elif case == "not allowed":
        user = f"reader-{empty}"
        keys, why = store.add_user(user), "does not let this access key do this"
        store.forbid_writes(bucket.removeprefix("s3://"), user)
    elif case == "nobody there":
        endpoint, why = f"http://127.0.0.1:{free_port()}", "the endpoint cannot be reached"
    else:
        why = "no credentials were found"
    use_store(monkeypatch, store.environment(keys=keys, endpoint=endpoint))
    if case == "no keys":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    off = {"tracking.enabled": "false"}
    writing = encode_settings(bucket, **{"output.uri": f"{target}/latents", **off})
    here = {"source.uri": local / "images", "codec.path": local / "codec"}
    questions = [("encode", writing | here), ("verify", {"data.uri": f"{target}/latents"})]
    if case == "no bucket":
        questions += [("encode", encode_settings(target, **off, **{"codec.path": local / "codec"}))]
    for job, settings in questions:
        code, answer, errors = run(job, *words(settings), cwd=tmp_path, timeout=300)
        assert code == 3, errors
        assert answer["exit_code"] == 3
        assert "Traceback" not in errors
        assert "next:" in errors
        said = (
            why
            if job == "encode" and "images" in str(settings["source.uri"]) and settings != questions[-1][1]
            else ""
        )
        assert said in errors, errors
        assert len(errors.splitlines()) <= 25, errors
        assert not [s for s in (secret, keys.secret, store.keys.secret) if s in errors + str(answer)]
    assert list(tmp_path.iterdir()) == []
