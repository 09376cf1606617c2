#!/usr/bin/env bash
# This script starts a PostgreSQL server, runs a command, and stops the server when the
# command has ended. The server listens only on a socket in a temporary folder.
#
# usage: deploy/postgres.sh COMMAND…   The command finds the URL of a database in its
# environment, in PREBAKE_TEST_POSTGRES.
set -euo pipefail

bin=$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
[[ -x $bin/initdb ]] || { echo "postgres: PostgreSQL is not installed; run: make setup" >&2; exit 1; }

# The tests read the URL, so Go's cache has their results for this URL only. Therefore the
# folder has the same name each time, unless another run uses it. The database is always new.
dir=${TMPDIR:-/tmp}/prebake-postgres-$EUID-$(basename "$(dirname "$bin")")
mkdir -m 700 "$dir" 2>/dev/null || dir=$(mktemp -d "${TMPDIR:-/tmp}/prebake-postgres-XXXXXX")
# PostgreSQL refuses to run as root. Therefore root runs it as the user postgres, which
# Debian's package has made.
as=()
if ((EUID == 0)); then
  as=(setpriv --reuid postgres --regid postgres --init-groups)
  chown postgres "$dir"
fi
started=
finish() {
  [[ -z $started ]] || (cd "$dir" && "${as[@]}" "$bin/pg_ctl" -D "$dir/data" -m fast -w stop >/dev/null) || true
  rm -rf "$dir"
}
trap finish EXIT

quiet() { (cd "$dir" && "${as[@]}" env LC_ALL=C.UTF-8 "$@") >"$dir/log" 2>&1 || { cat "$dir/log" >&2; exit 1; }; }
touch "$dir/log"
quiet "$bin/initdb" -D "$dir/data" -U prebake -A trust -E UTF8 --no-sync
quiet "$bin/pg_ctl" -D "$dir/data" -w -l "$dir/data/server.log" \
  -o "-c listen_addresses='' -c unix_socket_directories=$dir -c fsync=off" start
started=yes
quiet "$bin/createdb" -h "$dir" -U prebake prebake
chmod 755 "$dir"
PREBAKE_TEST_POSTGRES="postgres://prebake@/prebake?host=$dir" "$@"
