#!/bin/sh
# Starts Grafana ("$@") unless others than this machine could log in with a password that all know.
# Grafana keeps its first password: published, it has data of its own, where `admin` never was one.
case "$GRAFANA_BIND" in
    127.* | localhost | ::1 | "[::1]") ;;
    *)
        case "$GF_SECURITY_ADMIN_PASSWORD" in
            "" | admin)
                echo "grafana: GRAFANA_BIND=$GRAFANA_BIND shows it to others, who would log in as" \
                    "admin, admin: set GRAFANA_PASSWORD to a password of your own" >&2
                exit 2
                ;;
        esac
        export GF_PATHS_DATA="${GF_PATHS_DATA:-/var/lib/grafana}/published"
        mkdir -p "$GF_PATHS_DATA" || exit 2
        ;;
esac
exec "$@"
