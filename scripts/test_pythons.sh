#!/usr/bin/env bash
# Runs the tests that need no engine and are not marked `slow` on the other Pythons this project supports, where
# they are installed.
# usage: test_pythons.sh VENV      (`make test`; VENV is the one that has run everything already)
set -euo pipefail
cd "$(dirname "$0")/.."
done=$("$1/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
declare -A running=()
for version in 3.11 3.12 3.13; do
  [ "$version" = "$done" ] && continue
  if ! python3 scripts/setup.py --python "$version" --venv ".venv-$version" --engine none --dev; then
    echo "test: Python $version is not here, its tests are left out" >&2
    continue
  fi
  # Side by side: each takes hardly more than a core.
  ".venv-$version/bin/python" -m pytest -m "not engine and not slow" -q > "$logs/$version" 2>&1 &
  running[$version]=$!
done
failed=0
for version in "${!running[@]}"; do
  echo "test: Python $version"
  wait "${running[$version]}" || failed=1
  cat "$logs/$version"
done
exit "$failed"
