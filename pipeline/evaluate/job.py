"""The evaluate job: judge samples and codec against real images, write the report, record the figures."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.config import need_package
from pipeline.dataflow.cluster import own_device, reserved_gpu, run_reserved
from pipeline.errors import InputError
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.figures import Record, missed_thresholds
from pipeline.evaluate.inputs import Inputs, inspect
from pipeline.result import JobResult
from pipeline.runs import RUN_ID_WAIT_S, Run, open_run
from pipeline.storage.root import Root
from pipeline.tracking.tracker import Tracker

RECORD = "evaluation.json"
REPORT = "report.html"


def run(config: EvaluateJobConfig) -> JobResult:
    """Evaluate; "unchanged" when the same inputs were evaluated into this output with the same settings.

    InputError (exit code 3), with everything written and logged, when a threshold is missed.
    """
    output = Root(config.output.uri)
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
    inputs = inspect(config)
    record = _recorded(Root(config.output.uri), inputs.key)
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
    from pipeline.evaluate.passes import evaluate, evaluate_again_inspected
    from pipeline.evaluate.report import render_report

    tracker = _track(config, inputs, run)
    with reserved_gpu(config.device, config.cluster) as device:
        if device is None:
            findings = evaluate(config, inputs, output.uri, own_device(config.device, config.cluster))
        else:
            findings = run_reserved(evaluate_again_inspected, config, inputs.key, output.uri, device)
    run_id = tracker.wait_run_id(RUN_ID_WAIT_S)
    origins = inputs.origins(config)
    provenance = origins | {"this evaluation": {"key": inputs.key, "run_id": run_id}}
    page = render_report(replace(findings.content, provenance=provenance), config.output.max_bytes).encode()
    record = Record(
        key=inputs.key,
        figures=findings.figures,
        contract=findings.contract,
        inputs=origins,
        absent=findings.absent,
        missed=missed_thresholds(findings.figures, config.thresholds),
        counts=findings.counts,
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
