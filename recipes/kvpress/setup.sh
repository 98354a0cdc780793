#!/usr/bin/env bash
# Build .venv-kvpress at the repository root: kvpress 0.5.5 cannot share longfit's environment,
# because it needs transformers < 5.3 and longfit runs on newer ones.
#
#   bash recipes/kvpress/setup.sh            # uses python3.11, or $PYTHON
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
env_dir="${KVPRESS_ENV:-$root/.venv-kvpress}"
python="${PYTHON:-python3}"

"$python" -m venv "$env_dir"
pip=("$env_dir/bin/python" -m pip install --quiet --disable-pip-version-check)
# torch first and alone: the same version as longfit's, so that timings compare methods, not builds.
"${pip[@]}" "torch==2.13.0" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
"${pip[@]}" "transformers>=5.2,<5.3" "kvpress==0.5.5" "safetensors" "gguf"
"$env_dir/bin/python" - <<'PY'
import kvpress, torch, transformers
print("torch", torch.__version__, "transformers", transformers.__version__, "kvpress ok")
PY
