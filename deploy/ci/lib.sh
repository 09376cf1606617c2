# shellcheck shell=bash
# announce.sh and preflight.sh source this file. The function prebake runs the command line of
# Prebake's server. If PREBAKE_IMAGE is set, the command line runs in that container image, on
# docker's network PREBAKE_NETWORK (default: host). Otherwise it is the program PREBAKE_PROGRAM
# (default: "server", from PATH).
#
# PREBAKE_SERVER is the server's URL. PREBAKE_TOKEN, the server's token, is passed in the
# environment only, because everybody on a machine can read the command lines of programs.
# PREBAKE_PAUSE is the time between two tries, in seconds (default: 15).
#
# The scripts end with the exit statuses of the command line, which
# docs/reference/exit-codes.md lists.

# The exit statuses to which the scripts react.
usage=2 no_artifact=3 transient=10 pending=16 web_page=17

# refuse TEXT HINT prints an error with its hint, and ends the script with the status usage.
refuse() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit "$usage"
}

[[ -n ${PREBAKE_SERVER:-} ]] || refuse "PREBAKE_SERVER is not set" "set it to the URL of your Prebake server"
export PREBAKE_SERVER
[[ -n ${PREBAKE_IMAGE:-} ]] || command -v -- "${PREBAKE_PROGRAM:-server}" >/dev/null ||
  refuse "there is no program ${PREBAKE_PROGRAM:-server}, and PREBAKE_IMAGE is not set" \
    "set PREBAKE_IMAGE to the server's image in your registry"

prebake() {
  if [[ -n ${PREBAKE_IMAGE:-} ]]; then
    docker run --rm --network="${PREBAKE_NETWORK:-host}" -e PREBAKE_SERVER -e PREBAKE_TOKEN "$PREBAKE_IMAGE" "$@"
  else
    "${PREBAKE_PROGRAM:-server}" "$@"
  fi
}

# with_retries runs prebake. While the exit status is transient or web_page, which means that
# the failure may pass, it runs prebake again, up to five times in all. It returns the status
# of the last run.
with_retries() {
  local status try
  for try in 1 2 3 4 5; do
    status=0
    prebake "$@" || status=$?
    (((status == transient || status == web_page) && try < 5)) || return "$status"
    sleep "${PREBAKE_PAUSE:-15}"
  done
}

# is_build_id tests that a text has the form of a BUILD_ID, so that no text can be taken for a
# flag.
is_build_id() { [[ $1 =~ ^[0-9]+(\.[0-9]+){1,3}$ ]]; }
