# shellcheck shell=bash
# Read by announce.sh and preflight.sh. Runs the server's command line: out of the container
# image PREBAKE_IMAGE, or the program PREBAKE_PROGRAM ("server", from PATH).
#
# PREBAKE_SERVER is the server's URL. PREBAKE_TOKEN comes from the environment only: the
# command line of a program is there for everybody on its machine to read.
#
# Exit statuses are those of the command line; the table is in the README of the repository.

# The statuses that the scripts act upon.
usage=2 no_artifact=3 transient=10 pending=16

# refuse TEXT HINT ends the script.
refuse() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit "$usage"
}

[[ -n ${PREBAKE_SERVER:-} ]] || refuse "PREBAKE_SERVER is not set" "set it to the URL of your Prebake server"
export PREBAKE_SERVER

prebake() {
  if [[ -n ${PREBAKE_IMAGE:-} ]]; then
    docker run --rm --network="${PREBAKE_NETWORK:-host}" -e PREBAKE_SERVER -e PREBAKE_TOKEN "$PREBAKE_IMAGE" "$@"
  else
    "${PREBAKE_PROGRAM:-server}" "$@"
  fi
}

# patiently is prebake, five times over what may pass.
patiently() {
  local status try
  for try in 1 2 3 4 5; do
    status=0
    prebake "$@" || status=$?
    ((status == transient && try < 5)) || return "$status"
    sleep "${PREBAKE_PAUSE:-15}"
  done
}

# is_build_id is what may stand on a command line as a COS build, and cannot be a flag.
is_build_id() { [[ $1 =~ ^[0-9]+(\.[0-9]+){1,3}$ ]]; }
