#!/usr/bin/env bash
# Installs the Debian packages that some tests need, by group. Quick when all is there; starts nothing.
# usage: system.sh [--check] GROUP...
#   containers   dockerd, BuildKit, Compose v2, mmdebstrap (the stack test)
#   prometheus   Prometheus 3 with promtool (rules, dashboards)
#   browser      chromium (the page)
#   postgres     PostgreSQL (batches)
#   redis        redis-server (limits over several gateways)
#   kubernetes   kubectl with kustomize 5 (deploy/kubernetes)
#   operations   Caddy, Alertmanager (compose.tls.yaml, compose.alerts.yaml)
# --check installs nothing. Exit: 0 all is there, 77 something is missing and cannot be had here, 2 wrong usage.
set -euo pipefail

declare -A TOOLS=(
  [containers]="docker.io iptables iproute2 mmdebstrap docker-compose docker-buildx"
  [prometheus]="prometheus"
  [browser]="chromium fonts-noto-cjk"
  [postgres]="postgresql"
  [redis]="redis-server"
  [kubernetes]="kubectl"
  [operations]="caddy prometheus-alertmanager"
)
# The oldest release of Debian that has what is needed, for machines whose own release does not.
declare -A SUITE=([docker-compose]=trixie [docker-buildx]=trixie [prometheus]=forky [kubectl]=trixie)
PLUGIN_DIR=/usr/local/lib/docker/cli-plugins

main() {
  local check=false group
  local -a missing=()
  if [ "${1:-}" = --check ]; then check=true; shift; fi
  [ $# -gt 0 ] || { sed -n '2,12s/^# //p' "$0" >&2; exit 2; }
  for group in "$@"; do
    [ -n "${TOOLS[$group]:-}" ] || { echo "system: unknown group $group; known: ${!TOOLS[*]}" >&2; exit 2; }
  done
  mapfile -t missing < <(list_missing "$@")
  [ ${#missing[@]} -gt 0 ] || exit 0
  if ! $check && can_install; then
    install "${missing[@]}"
    hash -r
    mapfile -t missing < <(list_missing "$@")
    [ ${#missing[@]} -gt 0 ] || exit 0
  fi
  echo "system: missing here: ${missing[*]}" >&2
  exit 77
}

list_missing() {
  local group tool
  for group in "$@"; do
    for tool in ${TOOLS[$group]}; do
      is_there "$tool" || echo "$tool"
    done
  done
}

# By what it brings, not by the package's name: another distribution's build is as good.
is_there() {
  case $1 in
    docker.io) command -v dockerd && command -v containerd ;;
    docker-*) has_plugin "$1" ;;
    iproute2) command -v ip ;;
    prometheus) is_version_3 prometheus && is_version_3 promtool ;;
    kubectl) kubectl version --client 2>&1 | grep -q 'Kustomize Version: v[5-9]' ;;
    postgresql) command -v initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' ;;
    fonts-noto-cjk) compgen -G '/usr/share/fonts/*/*/*CJK*' ;;
    *) command -v "$1" ;;
  esac >/dev/null 2>&1
}

has_plugin() {
  local folder
  for folder in "${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins" $PLUGIN_DIR /usr/local/libexec/docker/cli-plugins \
    /usr/lib/docker/cli-plugins /usr/libexec/docker/cli-plugins; do
    [ ! -x "$folder/$1" ] || return 0
  done
  return 1
}

# compose.yaml runs version 3; version 2 writes some labels in another way.
is_version_3() { "$1" --version 2>&1 | grep -q 'version [3-9]\.'; }

can_install() {
  command -v apt-get >/dev/null || { echo "system: no apt-get here" >&2; return 1; }
  [ "$(id -u)" = 0 ] || { echo "system: installing packages needs root" >&2; return 1; }
}

install() {
  local tool native
  local -a packages=() elsewhere=()
  exec 9>/run/vllm-gateway-system.lock
  flock 9
  apt_get update -qq || true # one dead source of many is no reason to stop
  for tool in "$@"; do
    native=$(native_package "$tool")
    if [ -n "$native" ]; then packages+=("$native"); else elsewhere+=("$tool"); fi
  done
  if [ ${#packages[@]} -gt 0 ]; then
    echo "system: installing ${packages[*]}" >&2
    install_packages "${packages[@]}" || echo "system: apt-get could not install ${packages[*]}" >&2
  fi
  for tool in "${elsewhere[@]}"; do
    echo "system: installing $tool from Debian ${SUITE[$tool]}" >&2
    install_beside "$tool" "${SUITE[$tool]}" || echo "system: could not fetch $tool" >&2
  done
}

# What this release itself has, if that is new enough.
native_package() {
  case $1 in
    docker-compose)
      if has_candidate docker-compose-v2 2; then
        echo docker-compose-v2
      elif has_candidate docker-compose 2; then
        echo docker-compose
      fi
      ;;
    docker-buildx) if has_candidate docker-buildx 0; then echo docker-buildx; fi ;;
    prometheus) if has_candidate prometheus 3; then echo prometheus; fi ;;
    kubectl) if has_candidate kubectl 1.30; then echo kubectl; fi ;;
    *) echo "$1" ;;
  esac
}

has_candidate() {
  local version
  version=$(apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/ && $2 != "(none)" {print $2}')
  [ -n "$version" ] && dpkg --compare-versions "$version" ge "$2"
}

install_packages() {
  local policy=/usr/sbin/policy-rc.d status=0
  # dockerd, prometheus and Redis would be started as services of this machine; nobody asked for that.
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

# Unpacked beside the system's own packages, so that no other release is mixed into it.
install_beside() {
  local tool=$1 suite=$2 scratch mirror status=0
  local -a names=("$tool")
  [ "$tool" != prometheus ] || names+=(promtool)
  scratch=$(mktemp -d)
  mirror=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null) || true
  mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/root"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror:-http://deb.debian.org/debian}" \
    "$suite main" >"$scratch/sources.list"
  cat >"$scratch/apt.conf" <<CONF
Dir::Etc::sourcelist "$scratch/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$scratch/lists"; Dir::Cache "$scratch/cache"; Dir::State::status "/dev/null";
APT::Sandbox::User "root";
CONF
  (
    export APT_CONFIG=$scratch/apt.conf
    cd "$scratch" && apt_get update -qq && apt_get download -qq "${names[@]}" &&
      for deb in *.deb; do dpkg -x "$deb" root || exit; done &&
      place "$tool"
  ) || status=$?
  rm -rf "$scratch"
  return $status
}

place() {
  if [ "$1" = prometheus ]; then
    command install -m 755 root/usr/bin/prometheus root/usr/bin/promtool /usr/local/bin/
  elif [ "$1" = kubectl ]; then
    command install -m 755 root/usr/bin/kubectl /usr/local/bin/
  else
    mkdir -p $PLUGIN_DIR
    command install -m 755 root/usr/libexec/docker/cli-plugins/docker-* $PLUGIN_DIR/
  fi
}

apt_get() { apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 "$@"; }

main "$@"
