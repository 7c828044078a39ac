"""The entrypoints of a set of manifests as configurations, and whether those of a night fit each other."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from string import Template
from typing import Any

from pipeline.config import load_config
from tests.infra.infra_files import INFRA, REPOSITORY, Manifest, named, ray_job_specs

# RayJobs that run a job of another name.
JOB_OF = {"backfill": "encode", "embed-text": "embed_text", "gc": "verify"}


def launcher() -> Any:
    """infra/schedules/launch.py as a module."""
    spec = importlib.util.spec_from_file_location("launch", INFRA / "schedules" / "launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["launch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(manifests: list[Manifest]) -> dict[str, str]:
    """The ConfigMap that entrypoints are expanded with."""
    values: dict[str, str] = named(manifests, "ConfigMap", "latentloom")["data"]
    return values


def words_of(entrypoint: str, values: dict[str, str]) -> list[str]:
    """An entrypoint as its shell hands it on, files of the image taken from here."""
    words = shlex.split(Template(entrypoint).substitute(values))
    assert words[:2] == ["python", "-m"], entrypoint
    return [w.replace("/opt/latentloom/", f"{REPOSITORY}/") for w in words]


def parsed(entrypoint: str, values: dict[str, str]) -> tuple[str, Any]:
    """(job, configuration) of an entrypoint, by the project's own loader."""
    words = words_of(entrypoint, values)
    job = importlib.import_module(words[2]).JOB
    module, _, name = job.config.partition(":")
    model = getattr(importlib.import_module(module), name)
    return job.name, load_config(model, [a for a in words[3:] if "=" not in a], [a for a in words[3:] if "=" in a])


def configurations(manifests: list[Manifest]) -> dict[str, Any]:
    """The configuration of every RayJob, by its name."""
    return {n: parsed(s["entrypoint"], settings(manifests))[1] for n, s in ray_job_specs(manifests).items()}


def misfits(of: dict[str, Any]) -> list[str]:
    """What a step of the night asks for and no step before it makes."""
    encode, embed, train, sample, evaluate = (of[n] for n in ("encode", "embed-text", "train", "sample", "evaluate"))
    latents = encode.output.uri
    texts = [embed.uri_of(encoder) for encoder in embed.encoders]
    judged = {"frechet", "kid", "precision", "recall"} if judges(evaluate) else set()
    judged |= {"clip_score"} if evaluate.clip and train.data.text else set()
    judged |= {"accuracy"} if evaluate.classifier.enabled and labelled(sample, encode) else set()
    asked = {*of["promote"].at_least, *of["promote"].at_most}
    rules = {
        "backfill makes another dataset than encode": identity(of["backfill"]) == identity(encode),
        "embed-text reads other latents": embed.data.uri == latents,
        "embed-text wants captions that encode does not keep": encode.source.caption is not None,
        "compact rewrites other latents": of["compact"].data.uri == latents,
        "train reads other latents": train.data.uri == latents,
        "train reads texts that embed-text does not make": list(train.data.text) == texts,
        "train reads captions that embed-text does not embed": set(train.data.captions) <= set(embed.captions),
        "train goes on from another model than the one it registers": train.model.init is not None
        and train.model.init.uri == f"models:/{train.registry.name}@latest"
        and train.model.init.absent == "random",
        "sample draws from another model": sample.model.uri == train.output.uri + "/model",
        "sample has another codec": sample.model.codec in (None, encode.codec.path),
        "sample asks for classes that encode does not keep": encode.source.label is not None or not by_class(sample),
        "sample asks for prompts that train does not learn": bool(train.data.text) or by_class(sample),
        "evaluate reads other samples": evaluate.samples.uri == sample.output.uri,
        "evaluate reads other images": evaluate.reference.uri == encode.source.uri
        and evaluate.reference.kind == encode.source.kind,
        "evaluate compares at another size": side(sample) in (None, evaluate.image.resolutions[0]),
        "evaluate fits a classifier to labels that there are not": not evaluate.classifier.enabled
        or encode.source.label is not None,
        "evaluate measures another codec": evaluate.codec.path == encode.codec.path,
        f"promote asks for figures that evaluate does not give: {sorted(asked - judged)}": asked <= judged,
        "promote judges another report": of["promote"].evaluation.uri == evaluate.output.uri,
        "promote moves an alias of another model": of["promote"].model.name == train.registry.name,
        "verify reads other latents": of["verify"].data.uri == latents,
        "gc cleans another dataset": of["gc"].data.uri == latents and of["gc"].gc,
        "verify and gc write one report": of["gc"].report != of["verify"].report,
    }
    return [problem for problem, good in rules.items() if not good]


def judges(evaluate: Any) -> bool:
    """Whether there is a feature space."""
    return evaluate.classifier.enabled or evaluate.extractor.kind != "classifier"


def by_class(sample: Any) -> bool:
    """Whether the requests name classes."""
    return sample.requests.kind == "grid" and sample.requests.classes is not None


def labelled(sample: Any, encode: Any) -> bool:
    """Whether samples have labels that real images have, too."""
    return by_class(sample) and encode.source.label is not None


def side(sample: Any) -> int | None:
    """The side of the square that requests ask for; None for the one size the model was trained on."""
    assert sample.requests.height == sample.requests.width
    asked: int | None = sample.requests.height
    return asked


def identity(encode: Any) -> dict[str, Any]:
    """All that makes a dataset what it is: everything but how the work is spread."""
    plan = encode.model_dump(mode="json")
    plan.pop("cluster")
    return plan
