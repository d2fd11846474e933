#!/usr/bin/env bash
# Builds the virtual environment that every other make target uses.
#   tools/make_env.sh VENV
# Without a GPU it installs a CPU build of torch and fails if a CUDA package came in all the same.
set -euo pipefail

venv=$1
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

"$python" - <<'PY' || exit 3
import sys
if sys.version_info < (3, 11):
    sys.exit(f"kvtune needs Python 3.11 or newer, found {sys.version.split()[0]}: set PYTHON=/path/to/python3.11")
PY

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
  echo "kvtune: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 3; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --upgrade 'pip>=25.1'

constraints=$venv/constraints.txt
cp "$root/requirements/constraints.txt" "$constraints"
if ! has_gpu && [ "$(uname -s)" = Linux ]; then
  # The +cpu build exists beside the CUDA one under the same version; naming it leaves pip no choice.
  sed -i 's/^\(torch==[0-9.]*\)$/\1+cpu/' "$constraints"
  torch=$(grep '^torch==' "$constraints")
  if ! pip download -q --no-deps --dest "$venv/wheels" "$torch" >/dev/null 2>&1; then
    echo "kvtune: no GPU here and pip finds no CPU build ($torch)." >&2
    echo "kvtune: point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel index (see pytorch.org, 'Start Locally') and run again." >&2
    exit 3
  fi
  pip install -q "$venv"/wheels/torch-*.whl -c "$constraints"
  rm -rf "$venv/wheels"
fi

pip install -q -c "$constraints" --group "$root/pyproject.toml:dev" -e "$root[all]"

if ! has_gpu && pip list --format=freeze | grep -i '^nvidia-'; then
  echo "kvtune: CUDA packages (above) came in on a machine without a GPU; see requirements/constraints.txt" >&2
  exit 3
fi
"$venv/bin/python" -m kvtune --version >/dev/null
