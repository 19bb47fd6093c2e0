#!/usr/bin/env bash
# Runs the tests that need no engine and are not marked `slow` on every Python this project supports that is
# installed here, side by side.
# usage: test_pythons.sh VENV [PYTEST_ARGUMENT…]      (`make test`; VENV is the one that is set up already)
set -euo pipefail
cd "$(dirname "$0")/.."
own=$1
shift
own_version=$("$own/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
declare -A running=()
for version in 3.11 3.12 3.13; do
  venv=".venv-$version"
  if [ "$version" = "$own_version" ]; then
    venv=$own
  elif ! python3 -m scripts.setup --python "$version" --venv "$venv" --engine none --dev; then
    echo "test: Python $version is not here, its tests are left out" >&2
    continue
  fi
  running[$version]=$venv
done
for version in "${!running[@]}"; do
  "${running[$version]}/bin/python" -m pytest -m "not engine and not slow" -q "$@" |& sed -u "s/^/$version | /" &
  running[$version]=$!
done
failed=()
for version in "${!running[@]}"; do
  code=0
  wait "${running[$version]}" || code=$?
  # 5: the caller's own arguments choose none of these tests.
  [ "$code" = 0 ] || [ "$code" = 5 -a $# -gt 0 ] || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "test: failed on Python ${failed[*]}" >&2
  exit 1
fi
