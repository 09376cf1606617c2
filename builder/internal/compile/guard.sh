#!/bin/sh
# Stands in front of the compiler, whoever calls it. Tests of the kernel, the
# driver's and Kbuild's own, take any failure for a "no". A compiler that was
# killed or found no room says nothing of the kind: that is noted, and whoever
# started the build throws it away. The note's room was taken beforehand, so that
# it is written on a full disk too.
note=@TROUBLE@
said=/tmp/prebake-compiler.$$
if ! true >"$said"; then
	echo "No space left on device: /tmp" 1<>"$note"
	exit 1
fi
@COMPILER@ "$@" 2>"$said"
status=$?
[ ! -s "$said" ] || cat "$said" >&2
[ "$status" -eq 0 ] && exit
if [ "$status" -ge 128 ] ||
	grep -q -i -e 'no space left on device' -e 'killed signal terminated' -e 'command: killed' -e 'cannot allocate memory' \
		-e 'memory exhausted' -e 'out of memory' -e 'temporarily unavailable' -e 'quota exceeded' -e 'input/output error' "$said"; then
	{ echo "status $status"; head -c 2000 "$said"; } 1<>"$note"
fi
exit "$status"
