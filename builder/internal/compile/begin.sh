#!/bin/sh
# Stands in front of the compiler while a test of conftest runs. A program that
# begins with the headers that were compiled beforehand, and with the same flags,
# is compiled from there. Any other one is compiled as ever, and so is one for which
# the compiler cannot read them: that says nothing of the program.
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
