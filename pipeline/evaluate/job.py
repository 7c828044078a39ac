"""The evaluate job, and the promote job that follows from what it found.

evaluate:  samples and codec against real images --> evaluation.json, report.html, figures
promote:   evaluation.json --run--> sample run --parent--> training run --version of--> registered model --> alias
"""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import need_package
from pipeline.dataflow.workers import open_workers
from pipeline.errors import ConflictError, InputError
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.figures import Record, contract_of, figures_of, missed_thresholds, read_record
from pipeline.evaluate.inputs import Inputs, inspect
from pipeline.result import JobResult
from pipeline.runs import RUN_ID_WAIT_S, Run, open_run
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.store.ledger.layout import IDENTITY
from pipeline.tracking.config import PromoteJobConfig, resolve_paths
from pipeline.tracking.queries import LineageStep, ModelVersion, Registry, opened, walk
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.evaluate.passes import Measured

RECORD = "evaluation.json"
REPORT = "report.html"
EVALUATION_TAG = "latentloom.evaluation"
_log = logging.getLogger(__name__)


def run(config: EvaluateJobConfig) -> JobResult:
    """Evaluate; "unchanged" when the same inputs were evaluated into this output with the same settings.

    InputError (exit code 3), with everything written and logged, when a threshold is missed.
    """
    output = Root(config.output.uri)
    check_output(output)
    inputs = inspect(config)
    record = _recorded(output, inputs.key)
    if record is not None:
        return accepted(config, record, _result(config, record, "unchanged"))
    with open_run(config, "evaluate", output) as run:
        record = _evaluate(config, inputs, output, run)
        result = run.done(_result(config, record, "done"))
    return accepted(config, record, result)


def dry_run(config: EvaluateJobConfig) -> JobResult:
    """What would be read and whether there is anything to do; writes nothing."""
    output = Root(config.output.uri)
    check_output(output)
    inputs = inspect(config)
    record = _recorded(output, inputs.key)
    counts = {
        "samples": inputs.samples.num_rows if inputs.samples else 0,
        "reference": inputs.reference.rows or 0,
        "to_evaluate": 0 if record else 1,
    }
    return JobResult("dry-run", counts, _outputs(config))


def _evaluate(config: EvaluateJobConfig, inputs: Inputs, output: Root, run: Run) -> Record:
    """Measure, name the figures, write: the classifier, the report, and last the record that refers to them."""
    need_package("matplotlib", "report")
    if config.clip is not None:
        need_package("transformers", "text")
    # Only here: a run that finds its inputs evaluated loads neither torch nor anything that draws.
    from pipeline.evaluate.passes import Evaluation
    from pipeline.evaluate.report import GONE_NOTE, render_report, report_content

    tracker = _track(config, inputs, run)
    doing = "a process that judges images"
    with open_workers(doing, config.cluster, config.workers, device=config.device) as workers:
        measured = Evaluation(config, inputs, output, workers).measure()
    if measured.gone:
        _log.warning(GONE_NOTE.format(measured.gone))
    figures, absent = figures_of(measured, config.quality.neighbours)
    run_id = tracker.wait_run_id(RUN_ID_WAIT_S)
    origins = inputs.origins(config)
    provenance = origins | {"this evaluation": {"key": inputs.key, "run_id": run_id}}
    content = replace(report_content(config, inputs, measured, figures, absent), provenance=provenance)
    page = render_report(content, config.output.max_bytes).encode()
    record = Record(
        key=inputs.key,
        figures=figures,
        contract=contract_of(config, inputs, measured),
        inputs=origins,
        absent=absent,
        missed=missed_thresholds(figures, config.thresholds),
        counts=_counts(inputs, measured),
        run_id=run_id,
        files={REPORT: hashlib.sha256(page).hexdigest()},
    )
    # The record comes last and names the report's hash: a run that died in between has not evaluated anything.
    output.put(REPORT, page)
    output.put_if_absent(f"evaluations/{record.key}.json", record.to_bytes())
    output.put(RECORD, record.to_bytes())
    tracker.set_tags({"latentloom.passed": "no" if record.missed else "yes"})
    tracker.log_text(record.to_bytes().decode(), RECORD)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, REPORT)
        local.write_bytes(page)
        tracker.log_file(local, REPORT)
    return record


def _counts(inputs: Inputs, measured: Measured) -> dict[str, int]:
    """How many images the figures are of."""
    counts = {"reference": measured.real.n if measured.real else 0}
    if measured.trip is not None:
        counts["round_trips"] = measured.trip.sums.n
    if measured.samples is not None and inputs.samples is not None:
        counts |= {"samples": inputs.samples.num_rows, "unjudged": measured.samples.unjudged}
    if inputs.images.plan is not None:
        counts["source_changed"] = measured.gone
    return counts


def check_output(output: Root) -> None:
    """ConflictError or InputError when the output cannot be ours."""
    try:
        kind = output.kind()
        holds_dataset = kind == "directory" and output.exists(IDENTITY)
    except storage_errors() as error:
        raise InputError(
            f"The output {output.uri} cannot be looked at: {describe(error)}",
            key="output.uri",
            value=output.uri,
        ) from None
    if kind == "file":
        raise InputError(
            f"The output {output.uri} is a file",
            key="output.uri",
            value=output.uri,
            rule="output.uri is a directory, which need not exist",
            next_step="choose another output.uri",
        )
    if holds_dataset:
        raise ConflictError(
            f"{output.uri} holds a dataset, and this job writes a report",
            key="output.uri",
            value=output.uri,
            next_step="choose another output.uri",
        )


def _recorded(output: Root, key: str) -> Record | None:
    """The record of an evaluation with this key whose report is still there, byte for byte."""
    with suppress(FileNotFoundError, NotADirectoryError):
        record = Record.from_bytes(output.read_bytes(RECORD))
        if record is not None and record.key == key:
            digests = {name: hashlib.sha256(output.read_bytes(name)).hexdigest() for name in record.files}
            return record if digests == record.files else None
    return None


def _result(config: EvaluateJobConfig, record: Record, status: str) -> JobResult:
    return JobResult(status, record.counts, _outputs(config), record.run_id, figures=record.flat())


def _outputs(config: EvaluateJobConfig) -> dict[str, str]:
    root = Root(config.output.uri)
    return {"report": root.uri_of(REPORT), "evaluation": root.uri_of(RECORD)}


def accepted(config: EvaluateJobConfig, record: Record, result: JobResult) -> JobResult:
    """The result, when the figures reach what was asked; else InputError that carries it."""
    if not record.missed:
        return result
    names = [line.partition(" ")[0] for line in record.missed]
    raise InputError(
        "The figures do not reach what was asked:\n" + "\n".join(f"  - {line}" for line in record.missed),
        key=", ".join(f"thresholds.{name}" for name in names),
        value=", ".join(f"{getattr(config.thresholds, name):g}" for name in names),
        rule="every threshold is reached; an absent figure reaches none",
        next_step=f"the whole evaluation is in {Root(config.output.uri).uri_of(REPORT)}: train longer or better, or "
        "ask for less",
    ).with_result(result)


def _track(config: EvaluateJobConfig, inputs: Inputs, run: Run) -> Tracker:
    tracker = run.track(
        f"evaluate-{inputs.key[:8]}",
        parents=inputs.parents,
        params={
            "samples.uri": config.samples.uri if config.samples else "none",
            "reference.uri": config.reference.uri,
            "codec.path": config.codec.path if config.codec else "none",
            "image.resolution": config.image.resolution,
            "classifier.seed": config.classifier.seed,
            "evaluation.key": inputs.key,
        },
        about=inputs.key,
    )
    tracker.log_input("reference", inputs.reference.digest, config.reference.uri, "input")
    if inputs.samples is not None:
        tracker.log_input("samples", inputs.samples.digest, inputs.samples.uri, "input")
    if inputs.latents is not None:
        tracker.log_input("latents", inputs.latents.digest, inputs.latents.uri, "input")
    return tracker


# -- Promote: nothing moves unless the evaluation is about a version of the named model; twice changes nothing -----


def run_promote(config: PromoteJobConfig) -> JobResult:
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


def plan_promote(config: PromoteJobConfig) -> JobResult:
    """Which thresholds would be missed, by the evaluation alone."""
    record = read_evaluation(config.evaluation.uri)
    missed = missed_figures(record, config)
    counts = {"thresholds": len(config.at_least) + len(config.at_most), "missed": len(missed)}
    return JobResult("dry-run", counts, figures=record.flat(), details={"missed": missed})


def read_evaluation(uri: str) -> Record:
    """The newest evaluation in an output of the evaluate job; InputError when there is none."""
    root = Root(uri)
    try:
        data = root.read_bytes(RECORD)
    except storage_errors() as error:
        raise InputError(
            f"There is no readable evaluation at {root.uri}: {describe(error)}",
            key="evaluation.uri",
            value=uri,
            rule=f"the output of the evaluate job, which holds {RECORD}",
            next_step="run the evaluate job, or name its output.uri",
        ) from None
    return read_record(data, root.uri_of(RECORD), "evaluation.uri")


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
