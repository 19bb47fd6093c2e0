#!/usr/bin/env bash
# Every test, in parts of which two run side by side, each as much as about one core can do. On the Python that is set
# up already: those with the real engine, those marked `slow`, and all others but the ones marked `programs`, which are
# the same on every Python. On the last other Python that this project supports and that is installed here: all of those
# others, with the built wheel in place of the checkout. On the one between, where what fails there alone is rare: the
# gateway's.
# usage: test_pythons.sh VENV [PYTEST_ARGUMENT…]      (`make test`; VENV is the one that is set up already)
set -euo pipefail
cd "$(dirname "$0")/.."
own=$1
shift
arguments=("$@")
own_version=$("$own/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=$work/failures
rest="not engine and not slow"

# LABEL MARKED COMMAND…: its lines say where they come from; what fails is noted, by name, and the others go on.
run() {
  local label=$1 marked=$2 code=0
  shift 2
  "$@" -q -m "$marked" "${arguments[@]}" |& sed -u "s/^/$label | /" | tee "$work/$label" || code=$?
  # 5: the caller's own arguments choose none of these tests.
  if [ "$code" != 0 ] && ! [ "$code" = 5 -a ${#arguments[@]} -gt 0 ]; then
    echo "failed on Python $label" >>"$failures"
    sed -nE '/\| (FAILED|ERROR) /p' "$work/$label" >>"$failures"
  fi
}

# VERSION: its environment; false where that Python is not here.
set_up() {
  python3 -m scripts.setup --python "$1" --venv ".venv-$1" --engine none --dev && return
  echo "test: Python $1 is not here, its tests are left out" >&2
  false
}

test_engine() { run "$own_version, engine" engine "$own/bin/python" -m pytest; }
test_slow() { run "$own_version, slow" "slow and not engine" "$own/bin/python" -m pytest; }
test_rest() { run "$own_version" "$rest and not programs" "$own/bin/python" -m pytest; }
# What is about the repository is not about the wheel.
test_repository() {
  run "$own_version, repository" "programs and not engine and not slow" "$own/bin/python" -m pytest \
    --ignore=tests/gateway --ignore=tests/lab --ignore=tests/launcher
}
test_wheel() {
  local version
  for version in 3.13 3.12 3.11; do
    [ "$version" != "$own_version" ] || continue
    if set_up "$version"; then
      echo "$version" >"$work/last"
      run "$version, wheel" "$rest" scripts/test_wheel.sh ".venv-$version"
      return
    fi
  done
  run "$own_version, wheel" "$rest" scripts/test_wheel.sh "$own" # the one Python alone tests both
}
test_between() {
  local version=3.12
  [ "$version" != "$own_version" ] && [ "$version" != "$(cat "$work/last")" ] && set_up "$version" || return 0
  run "$version" "$rest and not programs" ".venv-$version/bin/python" -m pytest --ignore-glob='tests/[!g]*'
}

# The longest first; `between` knows by then what `wheel` has run on.
parts=(engine wheel rest slow between repository)
take_part() {
  local number
  exec {lock}>"$work/lock"
  flock "$lock" || return 1
  number=$(cat "$work/taken" 2>/dev/null || echo 0)
  echo $((number + 1)) >"$work/taken"
  exec {lock}>&-
  [ "$number" -lt ${#parts[@]} ] && echo "${parts[$number]}"
}
run_parts() {
  local part
  while part=$(take_part); do
    "test_$part"
    echo "$part" >>"$work/ended"
  done
}
touch "$work/last" "$work/ended"
run_parts &
second=$!
run_parts
wait "$second" || echo "failed: the second worker" >>"$failures"
# A part that nobody took, or that was broken off, has failed too.
for part in "${parts[@]}"; do
  grep -qx "$part" "$work/ended" || echo "not run to its end: $part" >>"$failures"
done
# Once more at the end, where they are looked for.
if [ -s "$failures" ]; then
  sed 's/^/test: /' "$failures" >&2
  exit 1
fi
