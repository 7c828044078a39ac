"""The promote job: moves an alias of a registered model when an evaluation of that very model reaches what is asked.

    evaluation.json --run--> sample run --parent--> training run --version of--> registered model --> alias

Nothing moves unless the evaluation is about a version of the named model; asking twice changes nothing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from pipeline.errors import InputError
from pipeline.evaluate.figures import Record, read_record
from pipeline.result import JobResult
from pipeline.runs import open_run
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.tracking.config import PromoteJobConfig, resolve_paths
from pipeline.tracking.queries import LineageStep, ModelVersion, Registry, opened, walk

EVALUATION = "evaluation.json"
EVALUATION_TAG = "latentloom.evaluation"
_log = logging.getLogger(__name__)


def run(config: PromoteJobConfig) -> JobResult:
    """Move the alias; InputError (exit code 3), with nothing moved, naming each threshold that is missed."""
    config = config.model_copy(update={"tracking": resolve_paths(config.tracking)})
    record = read_evaluation(config.evaluation.uri)
    alias = config.model.alias
    with opened(config.tracking.uri) as registry:
        version = _evaluated_version(config, record, registry)
        missed = missed_figures(record, config)
        holders = [v for v in registry.versions(version.name) if alias in v.aliases]
        result = JobResult(
            "done",
            {"version": version.version, "thresholds": len(config.at_least) + len(config.at_most)},
            {"model": f"models:/{version.name}@{alias}", "export": version.uri},
            figures=record.flat(),
            details={
                "previous_version": holders[0].version if holders else None,
                "training_run": version.run_id,
            },
        )
        if not missed and holders and holders[0].version == version.version:
            return replace(result, status="unchanged")
        with open_run(config, "promote") as run:
            tracker = run.track(
                f"promote {version.name}@{alias}",
                parents={"train": version.run_id, **({"evaluate": record.run_id} if record.run_id else {})},
                params={
                    "model": version.name,
                    "version": version.version,
                    "alias": alias,
                    "evaluation.uri": config.evaluation.uri,
                    **{f"at_least.{k}": v for k, v in config.at_least.items()},
                    **{f"at_most.{k}": v for k, v in config.at_most.items()},
                },
            )
            tracker.set_tags({"latentloom.promoted": "no" if missed else "yes"})
            if missed:
                lines = "\n".join(f"  - {line}" for line in missed)
                raise InputError(
                    f"Version {version.version} of {version.name} is not promoted to {alias}:\n{lines}",
                    key="at_least, at_most",
                    rule="every threshold is reached, judged by "
                    + ("the unfavourable end of its interval" if config.cautious else "the value itself"),
                    next_step="train longer or better, or ask for less; the alias stays where it was",
                ).with_result(replace(result, status="not reached"))
            registry.point(version, alias, {EVALUATION_TAG: record.key})
            _log.info("%s@%s is version %d now", version.name, alias, version.version)
            return run.done(result)


def plan(config: PromoteJobConfig) -> JobResult:
    """Which thresholds would be missed, by the evaluation alone."""
    record = read_evaluation(config.evaluation.uri)
    missed = missed_figures(record, config)
    counts = {"thresholds": len(config.at_least) + len(config.at_most), "missed": len(missed)}
    return JobResult("dry-run", counts, figures=record.flat(), details={"missed": missed})


def read_evaluation(uri: str) -> Record:
    """The newest evaluation in an output of the evaluate job; InputError when there is none."""
    root = Root(uri)
    try:
        data = root.read_bytes(EVALUATION)
    except storage_errors() as error:
        raise InputError(
            f"There is no readable evaluation at {root.uri}: {describe(error)}",
            key="evaluation.uri",
            value=uri,
            rule=f"the output of the evaluate job, which holds {EVALUATION}",
            next_step="run the evaluate job, or name its output.uri",
        ) from None
    return read_record(data, root.uri_of(EVALUATION), "evaluation.uri")


def missed_figures(record: Record, config: PromoteJobConfig) -> list[str]:
    """One sentence per threshold that is not reached; a figure that was not taken reaches none."""
    figures = {figure.name: figure for figure in record.figures}
    missed = []
    for sign, asked in (("at least", config.at_least), ("at most", config.at_most)):
        for name, wanted in asked.items():
            figure = figures.get(name)
            if figure is None:
                known = record.absent.get(name) or f"known are {', '.join(sorted(figures)) or 'none'}"
                missed.append(f"{name} was not taken ({known}), asked is {sign} {wanted:g}")
                continue
            bound = figure.low if sign == "at least" else figure.high
            value = figure.value if bound is None or not config.cautious else bound
            reached = value >= wanted if sign == "at least" else value <= wanted
            if not reached or math.isnan(value):
                edge = f" (interval {figure.low:g} to {figure.high:g})" if bound is not None else ""
                missed.append(f"{name} is {figure.value:g}{edge}, asked is {sign} {wanted:g}")
    return missed


def _evaluated_version(config: PromoteJobConfig, record: Record, registry: Registry) -> ModelVersion:
    """The version whose training run the evaluated samples come from."""
    name, uri = config.model.name, config.tracking.uri
    sampled = (record.inputs.get("samples") or {}).get("run_id")
    if not sampled:
        raise InputError(
            "This evaluation does not say which model it judged",
            key="evaluation.uri",
            value=config.evaluation.uri,
            rule="it judged samples that were drawn with tracking.enabled",
            next_step="evaluate samples of the model, drawn by a tracked sample job",
        )
    behind: list[LineageStep] = walk(str(sampled), uri)
    trained = {step.run_id for step in behind if step.found and step.job == "train"}
    versions = registry.versions(name)
    candidates = [v for v in versions if v.run_id in trained and config.model.version in (None, v.version)]
    if not candidates:
        known = ", ".join(f"{v.version} (run {v.run_id})" for v in versions) or "none"
        raise InputError(
            f"The evaluation is about no such version of the registered model {name!r}",
            key="model.name",
            value=name,
            rule=f"the samples come from training run {', '.join(sorted(trained)) or 'none that is known'}; "
            f"registered versions: {known}",
            next_step="train with registry.name set, sample and evaluate that model, then promote it",
        )
    return candidates[-1]
