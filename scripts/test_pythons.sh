#!/usr/bin/env bash
# Every test, in two lanes side by side, each as much as about one core can do. The first has the Python that is set up
# already: the tests with the real engine and those marked `slow`, then the others. The second has those others on
# every other Python that this project supports and that is installed here, one after the other: on those between the
# first and the last without the ones marked `programs`, on the last with the built wheel in place of the checkout.
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

# LABEL MARKED COMMAND…: its lines say where they come from; what fails is noted, by name, and the lane goes on.
run() {
  local label=$1 marked=$2 code=0
  shift 2
  "$@" -q -m "$marked" "${arguments[@]}" |& sed -u "s/^/$label | /" | tee "$work/$label" || code=$?
  # 5: the caller's own arguments choose none of these tests.
  if [ "$code" != 0 ] && ! [ "$code" = 5 -a ${#arguments[@]} -gt 0 ]; then
    { echo "failed on Python $label"; grep -E '\| (FAILED|ERROR) ' "$work/$label"; } >>"$failures" || true
  fi
}
run_rest() { run "$1" "not engine and not slow" "${@:2}"; }
run_between() { run "$1" "not engine and not slow and not programs" "${@:2}"; }

others=()
for version in 3.11 3.12 3.13; do
  [ "$version" = "$own_version" ] || others+=("$version")
done
test_others() {
  local version last ready=()
  for version in "${others[@]}"; do
    if python3 -m scripts.setup --python "$version" --venv ".venv-$version" --engine none --dev; then
      ready+=("$version")
    else
      echo "test: Python $version is not here, its tests are left out" >&2
    fi
  done
  if [ ${#ready[@]} = 0 ]; then # the one Python alone tests both
    run_rest "$own_version, wheel" scripts/test_wheel.sh "$own"
    return
  fi
  last=${ready[-1]}
  unset 'ready[-1]'
  for version in "${ready[@]}"; do run_between "$version" ".venv-$version/bin/python" -m pytest; done
  run_rest "$last, wheel" scripts/test_wheel.sh ".venv-$last"
}

test_others &
second_lane=$!
run "$own_version, engine" "engine or slow" "$own/bin/python" -m pytest
run_rest "$own_version" "$own/bin/python" -m pytest
wait "$second_lane" || echo "failed on Python ${others[*]}" >>"$failures"
# Once more at the end, where they are looked for.
if [ -s "$failures" ]; then
  sed 's/^/test: /' "$failures" >&2
  exit 1
fi
