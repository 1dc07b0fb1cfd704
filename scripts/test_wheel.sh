#!/usr/bin/env bash
# Build sdist and wheel, install the wheel into empty environments and use it there:
#   scripts/test_wheel.sh                    the core without extras, then each extra on its own
#   scripts/test_wheel.sh core report        only these
#   scripts/test_wheel.sh build              build and check the metadata, install nothing
#   PYTHON=python3.13 scripts/test_wheel.sh  with another Python
# The wheel is built from the sdist, so a file that the sdist lacks fails here.
# Environments go to $WHEEL_DIR (default: zokernel-wheel in the temporary folder); what is built goes to dist/.
# Versions are those of constraints.txt.  For the CPU build of torch set
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
python="${PYTHON:-python3}"
folder="${WHEEL_DIR:-${TMPDIR:-/tmp}/zokernel-wheel}/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
if [ $# -eq 0 ]; then set -- core finetune report quantized trl reasoning onnx; fi
mkdir -p "$folder"

install() { # install ENVIRONMENT REQUIREMENT...
  local environment=$1
  shift
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$@"
}

"$python" -m venv --clear "$folder/build"
"$folder/build/bin/python" -m pip install --quiet --disable-pip-version-check "build>=1.2" "twine>=6.1"
rm -rf dist
"$folder/build/bin/python" -m build --outdir dist . > "$folder/build.log"
"$folder/build/bin/twine" check --strict dist/*  # the readme renders, and the metadata is complete
wheel=$(echo "$root"/dist/zokernel-*.whl)
if [ "$*" = build ]; then exit; fi

# torch takes minutes to install: the other environments begin as copies of this one.
rm -rf "$folder/core"
"$python" -m venv "$folder/core"
install "$folder/core" torch
install "$folder/core" "$wheel"
for extra in "$@"; do
  environment="$folder/$extra"
  if [ "$extra" != core ]; then
    "$python" -m venv --clear "$environment"
    rm -rf "$environment/lib"
    cp -al "$folder/core/lib" "$environment/lib"
    install "$environment" --force-reinstall --no-deps "$wheel"
    install "$environment" "$wheel[$extra]"
  fi
  "$environment/bin/python" -m pip check
  # From an empty folder, so that the checkout cannot be what is imported.
  mkdir -p "$environment/empty"
  (cd "$environment/empty" && "$environment/bin/python" -P "$root/scripts/check_install.py" "$extra")
done
