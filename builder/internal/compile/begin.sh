#!/bin/sh
# begin.sh runs in place of the compiler while conftest runs a test. It uses the
# precompiled header on two conditions: the test's program begins with the headers in it,
# and the compiler gets the same flags as when the precompiled header was made. It
# compiles every other program in the normal way. If the compiler cannot read the
# precompiled header, begin.sh compiles the program in the normal way too, because that
# error says nothing about the program.
src=
for arg; do
	case $arg in conftest*.c) src=$arg ;; esac
done
if [ -n "$src" ] &&
	[ "$(printf '%s\n' "$@" | sed "s/^$src\$/conftest.c/")" = "$(cat @BEGIN@/flags)" ] &&
	[ "$(sed -e 's/^[[:space:]]*//' -e '/^$/d' "$src" | head -n "$PREBAKE_LINES")" = "$PREBAKE_BEGIN" ]; then
	said=/tmp/prebake-begin.$$
	if true >"$said"; then
		@COMPILER@ @USE@ "$@" 2>"$said"
		status=$?
		cat "$said" >&2
		[ "$status" -eq 0 ] && exit
		grep -q -i -e pch -e precompiled -e 'ast file' "$said" || exit "$status"
	fi
fi
exec @COMPILER@ "$@"
