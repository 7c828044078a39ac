"""The arithmetic of a dataset's codec: settled once, before the first row, whatever devices come later."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.codec.codec import CodecInfo
from pipeline.config import load_config
from pipeline.encode import job
from pipeline.encode.config import EncodeJobConfig
from pipeline.errors import ConflictError
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import fingerprint_digest, read_identity
from tests.support.encode_here import encode_here
from tests.support.images import make_codec, make_images


def resolved(root: Path, *overrides: str, **codec: Any) -> str:
    fixed = ["source.kind=folder", "source.uri=x", "codec.path=x", f"output.uri={root}"]
    config = load_config(EncodeJobConfig, [], [*fixed, *overrides])
    info = CodecInfo("AutoencoderKL", codec, "0", 4, 8)
    return job._with_known_dtype(config, Root(str(root)), info).codec.dtype


@pytest.mark.parametrize(
    ("overrides", "gpus", "dtype"),
    [
        (["encode.num_gpus=0"], {"GPU": 8.0}, "float32"),
        (["encode.num_gpus=0.5"], {}, "bfloat16"),
        ([], {"GPU": 8.0}, "bfloat16"),
        ([], {"GPU": 8.0, "accelerator_type:A100": 1.0}, "bfloat16"),
        ([], {"GPU": 8.0, "accelerator_type:T4": 1.0}, "float16"),
        (
            ["encode.num_gpus=1"],
            {"GPU": 8.0, "accelerator_type:A100": 1.0, "accelerator_type:V100": 1.0},
            "float16",
        ),
        (["encode.num_gpus=0"], {"GPU": 8.0, "accelerator_type:T4": 1.0}, "float32"),
        ([], {}, "float32"),
        (["codec.dtype=float16"], {"GPU": 8.0}, "float16"),
    ],
)
def test_auto_is_settled_by_what_encoders_of_a_new_dataset_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], gpus: dict[str, float], dtype: str
) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, **gpus})
    monkeypatch.setattr(job, "ensure_ray", lambda cluster, networks: ray)
    assert resolved(tmp_path / "latents", *overrides) == dtype


def test_a_codec_that_overflows_in_float16_is_float32_on_old_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"GPU": 8.0, "accelerator_type:T4": 1.0})
    monkeypatch.setattr(job, "ensure_ray", lambda cluster, networks: ray)
    assert resolved(tmp_path / "latents", force_upcast=True) == "float32"


def test_a_dataset_keeps_the_arithmetic_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "source__kind": "folder",
        "source__uri": make_images(tmp_path / "images", 3),
        "image__resolution": 32,
        "image__multiple_of": 4,
        "codec__path": make_codec(tmp_path / "codec"),
        "output__uri": tmp_path / "latents",
    }
    assert encode_here(monkeypatch, **settings).status == "done"
    root = Root(str(tmp_path / "latents"))
    assert read_identity(root).fingerprint["codec_dtype"] == "float32"

    def no_ray(cluster: Any, *, networks: bool) -> Any:
        raise AssertionError("nothing has to be asked of a cluster")

    monkeypatch.setattr(job, "ensure_ray", no_ray)
    # The same command where there are GPUs.
    assert encode_here(monkeypatch, **settings, encode__num_gpus=1).status == "unchanged"
    assert resolved(tmp_path / "latents", "encode.num_gpus=1") == "float32"
    with pytest.raises(ConflictError, match="codec_dtype: float32 there, bfloat16 here"):
        encode_here(monkeypatch, **settings, codec__dtype="bfloat16")

    # Earlier versions wrote the word itself: such datasets can still be continued, as what they are.
    path = tmp_path / "latents" / "dataset.json"
    body = json.loads(path.read_bytes())
    body["fingerprint"]["codec_dtype"] = "auto"
    path.write_text(json.dumps({**body, "fingerprint_digest": fingerprint_digest(body["fingerprint"])}))
    assert encode_here(monkeypatch, **settings).status == "unchanged"
    assert resolved(tmp_path / "latents", "encode.num_gpus=1") == "auto"
    with pytest.raises(ConflictError, match="codec_dtype: auto there, float32 here"):
        encode_here(monkeypatch, **settings, codec__dtype="float32")
