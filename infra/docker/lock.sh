#!/usr/bin/env bash
# Writes requirements-{gpu,cpu,mlflow}.lock: what pyproject.toml (for MLflow: mlflow.in) and constraints.txt resolve to
# on 64-bit Linux, with hashes.
# Needs uv. TORCH_CPU: the folder or page that lists the CPU build of torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=3.11
platform=x86_64-manylinux_2_28
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)

compile() {
  local kind=$1 source=$2
  shift 2
  {
    echo "# Every package of the $kind image, pinned with hashes; made by infra/docker/lock.sh."
    uv pip compile "$source" --quiet --generate-hashes --no-header --no-annotate \
      --python-version "$python" --python-platform "$platform" "$@"
  } > "infra/docker/requirements-$kind.lock.new"
  mv "infra/docker/requirements-$kind.lock.new" "infra/docker/requirements-$kind.lock"
}

# What the images hold besides the dependencies; the other stores' clients are for those who build their own.
extras=(--extra report --extra s3 --extra text)
compile gpu pyproject.toml "${extras[@]}" --constraints constraints.txt
compile cpu pyproject.toml "${extras[@]}" --find-links "${TORCH_CPU:?}" --constraints <(grep -v '^torch==' constraints.txt) --override <(echo "torch==$torch+cpu")
compile mlflow infra/docker/mlflow.in --constraints constraints.txt
