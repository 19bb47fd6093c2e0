#!/usr/bin/env bash
# Runs pytest on the built wheel instead of the checkout: in a copy of the repository without the packages' folders,
# with an environment that has the wheel, and from VENV everything that the wheel needs.
# usage: test_wheel.sh VENV [PYTEST_ARGUMENT…]      (VENV: an environment with the test tools)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "$1")
shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$venv/bin/python" -m hatchling build --target wheel --directory "$scratch" >/dev/null
"$venv/bin/python" -m venv --without-pip "$scratch/venv"
python=$scratch/venv/bin/python
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site "$venv/bin/python" >"$(site "$python")/dependencies.pth"
"$venv/bin/python" -m pip --python "$python" --disable-pip-version-check install --quiet --no-index --no-deps \
  --ignore-installed "$scratch"/*.whl
# Tools that tests call lie beside Python.
for tool in "$venv"/bin/*; do
  [ -e "$scratch/venv/bin/${tool##*/}" ] || ln -s "$tool" "$scratch/venv/bin/"
done
mkdir "$scratch/checkout"
git ls-files --cached --others --exclude-standard -- ':!common' ':!gateway' ':!lab' ':!launcher' |
  tar -cf - --files-from=- | tar -xf - -C "$scratch/checkout"
cd "$scratch/checkout"
git init --quiet && git add --all # some tests ask what belongs to the repository
# What is about the repository itself is not about the wheel.
"$python" -m pytest --ignore-glob="tests/test_*.py" --ignore=tests/stack --ignore=tests/page --ignore=tests/e2e \
  --ignore=tests/lab/records/test_results_page.py --ignore=tests/lab/faults "$@"
