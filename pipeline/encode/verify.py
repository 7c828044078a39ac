"""The verify job with its deepest level: the store's proofs, then a sample of latents against their images."""

from __future__ import annotations

from pipeline.result import JobResult
from pipeline.store.maintain.config import VerifyJobConfig
from pipeline.store.maintain.job import run_verify
from pipeline.store.maintain.verify import VerifyReport


def run(config: VerifyJobConfig) -> JobResult:
    """Verify a dataset; InputError (exit code 3) sums up what is wrong. Only level=decode loads torch."""

    def decode(report: VerifyReport) -> dict[str, float]:
        from pipeline.encode.recheck import recheck

        found = recheck(config.data.uri, config.decode)
        counts = {
            "compared": found.compared,
            "identical": found.identical,
            "source_gone": found.source_gone,
            "source_changed": found.source_changed,
        }
        report.decode = {**counts, **found.figures()}
        report.problems += found.problems
        return {k: float(v) for k, v in report.decode.items()}

    return run_verify(config, decode)
