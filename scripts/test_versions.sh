#!/usr/bin/env bash
# Run the core of the suite with other versions than those of constraints.txt:
#   scripts/test_versions.sh oldest       the lowest versions that pyproject.toml allows
#   scripts/test_versions.sh newest       the highest ones
#   scripts/test_versions.sh python3.12   constraints.txt on another Python
# Each environment is made once, in a folder under $VERSIONS_DIR (default: zokernel-versions in the temporary folder).
# pip takes torch from its index: the default one offers CUDA builds for Linux, several gigabytes; for the CPU build set
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."

which="${1:?say what to test: oldest, newest or a Python such as python3.12}"
[ $# -gt 0 ] && shift
folder="${VERSIONS_DIR:-${TMPDIR:-/tmp}/zokernel-versions}/$which"
python=python3.11
constraints="$folder/constraints.txt"
mkdir -p "$folder"

case "$which" in
  oldest) # every lower bound of what a user installs, as an exact version
    "$python" - > "$constraints" <<'PYTHON'
import re
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for item in sorted({*project["dependencies"], *extras["finetune"], *extras["report"]}):
    print(re.sub(r"^([\w-]+)>=([\d.]+).*", r"\1==\2", item))
PYTHON
    ;;
  newest) : > "$constraints" ;;
  python*) python="$which" && cp constraints.txt "$constraints" ;;
  *) echo "There is no set of versions '$which': choose oldest, newest or a Python such as python3.12." >&2 && exit 2 ;;
esac

if ! cmp -s "$constraints" "$folder/installed.txt"; then
  "$python" -m venv --clear "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check -c "$constraints" \
    -e ".[finetune,report]" pytest pytest-timeout hypothesis scipy
  cp "$constraints" "$folder/installed.txt"
fi
"$folder/venv/bin/python" -c '
import importlib.metadata as m, platform
names = ("torch", "numpy", "numba", "transformers", "accelerate", "peft", "datasets")
print("Python", platform.python_version(), *(f"{name} {m.version(name)}" for name in names), sep=", ")'
core=(tests/directions tests/optim tests/perturb tests/journal tests/kernels tests/finetune/test_trainer.py tests/package/test_private_*.py)
exec "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider "${@:-${core[@]}}"
