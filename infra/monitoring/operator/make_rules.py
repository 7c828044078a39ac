#!/usr/bin/env python3
"""Write rules.yaml: the rules of ../alerts.yaml as the Prometheus operator takes them. Run it when those change."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
HEAD = """\
# Made of alerts.yaml by make_rules.py: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: latentloom
  labels:
    app.kubernetes.io/part-of: latentloom
spec:
"""


def rules() -> str:
    """The object as text: the file is its spec, as it stands."""
    lines = (HERE.parent / "alerts.yaml").read_text().splitlines()
    body = lines[next(i for i, line in enumerate(lines) if line == "groups:") :]
    return HEAD + "".join(f"  {line}\n" if line else "\n" for line in body)


if __name__ == "__main__":
    (HERE / "rules.yaml").write_text(rules())
