#!/usr/bin/env bash
# Runs the tests that need no engine and are not marked `slow` on every Python this project supports that is
# installed here, side by side; on one of them with the built wheel in place of the checkout.
# usage: test_pythons.sh VENV [PYTEST_ARGUMENT…]      (`make test`; VENV is the one that is set up already)
set -euo pipefail
cd "$(dirname "$0")/.."
own=$1
shift
own_version=$("$own/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
chosen=(-m "not engine and not slow" -q "$@")
declare -A venvs=() running=()
wheel_version=
for version in 3.11 3.12 3.13; do
  venv=.venv-$version
  if [ "$version" = "$own_version" ]; then
    venv=$own
  elif ! python3 -m scripts.setup --python "$version" --venv "$venv" --engine none --dev; then
    echo "test: Python $version is not here, its tests are left out" >&2
    continue
  fi
  venvs[$version]=$venv
  # Where there is one Python alone, it tests both.
  if [ "$version" != "$own_version" ]; then wheel_version=$version; fi
done
test_checkout() { "${venvs[$1]}/bin/python" -m pytest "${chosen[@]}" |& sed -u "s/^/$1 | /"; }
test_wheel() { scripts/test_wheel.sh "${venvs[$1]}" "${chosen[@]}" |& sed -u "s/^/$1, wheel | /"; }
for version in "${!venvs[@]}"; do
  [ "$version" != "$wheel_version" ] || continue
  test_checkout "$version" &
  running[$version]=$!
done
wheel_version=${wheel_version:-$own_version}
test_wheel "$wheel_version" &
running[$wheel_version, with the built wheel]=$!
failed=()
for name in "${!running[@]}"; do
  code=0
  wait "${running[$name]}" || code=$?
  # 5: the caller's own arguments choose none of these tests.
  [ "$code" = 0 ] || [ "$code" = 5 -a $# -gt 0 ] || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'test: failed on Python %s\n' "${failed[@]}" >&2
  exit 1
fi
