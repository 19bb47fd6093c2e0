#!/usr/bin/env bash
# Installs the Debian packages that some tests need, by group. Quick when all is there; starts nothing.
# usage: system.sh [--check] GROUP...
#   containers   dockerd, BuildKit, Compose v2, mmdebstrap (the stack test)
#   prometheus   prometheus and promtool (rules, dashboards)
#   browser      chromium (the page)
# --check installs nothing. Exit: 0 all is there, 77 something is missing and cannot be had here, 2 wrong usage.
set -euo pipefail

declare -A PACKAGES=(
  [containers]="docker.io iptables iproute2 mmdebstrap"
  [prometheus]="prometheus"
  [browser]="chromium fonts-noto-cjk"
)
# Compose v2 and BuildKit for Debian releases that have neither: the oldest one that does.
PLUGIN_SUITE=trixie
PLUGIN_DIR=/usr/local/lib/docker/cli-plugins

main() {
  local check=false group
  local -a missing=()
  if [ "${1:-}" = --check ]; then check=true; shift; fi
  [ $# -gt 0 ] || { sed -n '2,8s/^# //p' "$0" >&2; exit 2; }
  for group in "$@"; do
    [ -n "${PACKAGES[$group]:-}" ] || { echo "system: unknown group $group; known: ${!PACKAGES[*]}" >&2; exit 2; }
  done
  mapfile -t missing < <(list_missing "$@")
  [ ${#missing[@]} -gt 0 ] || exit 0
  if ! $check && can_install; then
    install "${missing[@]}"
    mapfile -t missing < <(list_missing "$@")
    [ ${#missing[@]} -gt 0 ] || exit 0
  fi
  echo "system: missing here: ${missing[*]}" >&2
  exit 77
}

list_missing() {
  local group package
  for group in "$@"; do
    for package in ${PACKAGES[$group]}; do
      is_installed "$package" || echo "$package"
    done
    if [ "$group" = containers ]; then
      for package in compose buildx; do
        has_plugin "$package" || echo "docker-$package"
      done
    fi
  done
}

# By what it brings, not by the package's name: another distribution's build is as good.
is_installed() {
  case $1 in
    docker.io) command -v dockerd && command -v containerd ;;
    iproute2) command -v ip ;;
    prometheus) command -v prometheus && command -v promtool ;;
    fonts-noto-cjk) compgen -G '/usr/share/fonts/*/*/*CJK*' ;;
    *) command -v "$1" ;;
  esac >/dev/null
}

has_plugin() {
  local folder
  for folder in "${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins" $PLUGIN_DIR /usr/local/libexec/docker/cli-plugins \
    /usr/lib/docker/cli-plugins /usr/libexec/docker/cli-plugins; do
    [ ! -x "$folder/docker-$1" ] || return 0
  done
  return 1
}

can_install() {
  command -v apt-get >/dev/null || { echo "system: no apt-get here" >&2; return 1; }
  [ "$(id -u)" = 0 ] || { echo "system: installing packages needs root" >&2; return 1; }
}

install() {
  local name native
  local -a packages=() plugins=()
  exec 9>/run/vllm-gateway-system.lock
  flock 9
  apt_get update -qq || true # one dead source of many is no reason to stop
  for name in "$@"; do
    case $name in
      docker-compose | docker-buildx)
        native=$(native_package "$name" | head -1)
        if [ -n "$native" ]; then packages+=("$native"); else plugins+=("$name"); fi
        ;;
      *) packages+=("$name") ;;
    esac
  done
  if [ ${#packages[@]} -gt 0 ]; then
    echo "system: installing ${packages[*]}" >&2
    install_packages "${packages[@]}" || echo "system: apt-get could not install ${packages[*]}" >&2
  fi
  if [ ${#plugins[@]} -gt 0 ]; then
    echo "system: installing ${plugins[*]}" >&2
    install_plugins "${plugins[@]}" || echo "system: could not fetch ${plugins[*]}" >&2
  fi
}

install_packages() {
  local policy=/usr/sbin/policy-rc.d status=0
  # dockerd and prometheus would be started as services of this machine; nobody asked for that.
  if [ -e $policy ]; then
    policy=
  else
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
  fi
  DEBIAN_FRONTEND=noninteractive apt_get install -y -qq --no-install-recommends "$@" >/dev/null || status=$?
  [ -z "$policy" ] || rm -f "$policy"
  return $status
}

install_plugins() {
  local scratch mirror deb status=0
  scratch=$(mktemp -d)
  mirror=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null) || true
  mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/root"
  chmod 755 "$scratch"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror:-http://deb.debian.org/debian}" \
    "$PLUGIN_SUITE main" >"$scratch/sources.list"
  cat >"$scratch/apt.conf" <<CONF
Dir::Etc::sourcelist "$scratch/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$scratch/lists"; Dir::Cache "$scratch/cache"; Dir::State::status "/dev/null";
APT::Sandbox::User "root";
CONF
  # Unpacked beside the system's own packages, so that no other release is mixed into it.
  (
    export APT_CONFIG=$scratch/apt.conf
    cd "$scratch" && apt_get update -qq && apt_get download -qq "$@" &&
      for deb in *.deb; do dpkg -x "$deb" root || exit; done &&
      mkdir -p $PLUGIN_DIR && command install -m 755 root/usr/libexec/docker/cli-plugins/docker-* $PLUGIN_DIR/
  ) || status=$?
  rm -rf "$scratch"
  return $status
}

# A release's own package, where it has the second Compose and BuildKit.
native_package() {
  case $1 in
    docker-compose)
      if has_candidate docker-compose-v2; then echo docker-compose-v2; fi
      if has_candidate docker-compose 2; then echo docker-compose; fi
      ;;
    *) if has_candidate "$1"; then echo "$1"; fi ;;
  esac
}

has_candidate() {
  local version
  version=$(apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/ && $2 != "(none)" {print $2}')
  [ -n "$version" ] && dpkg --compare-versions "$version" ge "${2:-0}"
}

apt_get() { apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 "$@"; }

main "$@"
