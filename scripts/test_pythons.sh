#!/usr/bin/env bash
# Every test, in parts; as many run side by side as there are cores, and one more, since a test waits as long as it computes.
# On the Python that is set up already: style and types, the tests with the real engine, those marked `slow`, and the plain
# ones, marked nothing. On the last other Python that this project supports and that is installed here, with the built wheel
# in place of the checkout: the plain ones again, since only they tell Pythons apart, and those marked `programs`. Which of
# the two a dear test is marked is a matter of the machine's time: each runs once. What is about the repository runs once too.
# usage: test_pythons.sh VENV [PYTEST_ARGUMENT…]      (`make test`; VENV is the one that is set up already)
# ALSO names targets of the Makefile that are parts as well (`make test ALSO=page-test`).
set -euo pipefail
cd "$(dirname "$0")/.."
own=$1
shift
arguments=("$@")
# Set, it has each of a thousand programs compile the checkout anew.
unset PYTHONDONTWRITEBYTECODE
own_version=$("$own/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=$work/failures
rest="not engine and not slow"

# LABEL MARKED COMMAND…: its lines say where they come from; what fails is noted, by name, and the others go on. MARKED
# are the tests of pytest's that run; empty: the command is another one.
run() {
  local label=$1 marked=$2 code=0
  shift 2
  local TIMEFORMAT="$label | took %0R s, and %0U s of a core"
  # A shell's background ignores Ctrl-C, and so would what tests start and interrupt.
  time env --default-signal=INT,QUIT "$@" ${marked:+-q -m "$marked" "${arguments[@]}"} |&
    sed -u "s/^/$label | /" | tee "$work/$label" || code=$?
  # 5: the caller's own arguments choose none of these tests.
  if [ "$code" != 0 ] && ! [ "$code" = 5 -a ${#arguments[@]} -gt 0 ]; then
    echo "failed: $label" >>"$failures"
    sed -nE '/\| (FAILED|ERROR) /p' "$work/$label" >>"$failures"
  fi
}

# VERSION: its environment; false where that Python is not here.
set_up() {
  local code=0
  python3 -m scripts.setup --python "$1" --venv ".venv-$1" --engine none --dev || code=$?
  case $code in
    0) return ;;
    77) echo "test: Python $1 is not here, its tests are left out" >&2 ;;
    *) echo "not set up: Python $1" >>"$failures" ;;
  esac
  false
}

own_pytest() { # LABEL MARKED ARGUMENT…
  run "$own_version$1" "$2" "$own/bin/python" -m pytest "${@:3}"
}
test_service() { own_pytest ", engine and gateway" engine --ignore-glob='tests/[!e]*'; }
test_engine() { own_pytest ", engine" engine --ignore=tests/e2e; }
test_slow() { own_pytest ", slow" "slow and not engine" --ignore=tests/e2e; }
test_rest() { own_pytest "" "$rest and not programs" --ignore=tests/e2e; }
# What is about the repository is not about the wheel.
test_repository() {
  own_pytest ", repository" "programs and not engine and not slow" \
    --ignore=tests/e2e --ignore=tests/common --ignore=tests/gateway --ignore=tests/lab --ignore=tests/launcher
}
test_make() { run "make $1" "" make --no-print-directory VENV="$own" ARGS= "$1"; } # as a whole

# The last other Python, set up once; the one that is there already where there is no other.
find_last() {
  local version
  exec {last}>"$work/last.lock"
  flock "$last" || return 1
  if [ ! -s "$work/last" ]; then
    echo "$own_version $own" >"$work/last"
    for version in 3.13 3.12 3.11; do
      [ "$version" != "$own_version" ] && set_up "$version" >&2 || continue
      echo "$version .venv-$version" >"$work/last"
      break
    done
  fi
  exec {last}>&-
  cat "$work/last"
}
wheel_pytest() { # LABEL MARKED
  local version venv
  read -r version venv < <(find_last)
  run "$version, wheel$1" "$2" scripts/test_wheel.sh "$venv"
}
test_wheel() { wheel_pytest "" "$rest and not programs"; }
test_programs() { wheel_pytest ", programs" "$rest and programs"; }
# The longest first.
targets=" ${ALSO:-} check "
parts=(${ALSO:-} service engine programs slow wheel rest check repository)
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
    case $targets in
      *" $part "*) test_make "$part" ;;
      *) "test_$part" ;;
    esac
    echo "$part" >>"$work/ended"
  done
}
touch "$work/ended"
workers=()
for _ in $(seq $(($(nproc) + 1))); do
  run_parts &
  workers+=($!)
done
for worker in "${workers[@]}"; do
  wait "$worker" || echo "failed: a worker" >>"$failures"
done
# A part that nobody took, or that was broken off, has failed too.
for part in "${parts[@]}"; do
  grep -qx "$part" "$work/ended" || echo "not run to its end: $part" >>"$failures"
done
# Once more at the end, where they are looked for.
if [ -s "$failures" ]; then
  sed 's/^/test: /' "$failures" >&2
  exit 1
fi
