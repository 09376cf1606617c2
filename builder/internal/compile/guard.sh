#!/bin/sh
# guard.sh runs the compiler and notes the compiler's own faults. It is first in PATH,
# so make and conftest call it as the compiler. The tests of kbuild and of the driver's
# conftest take any failure of the compiler as the answer "no". But a compiler that was
# killed, or had no memory or disk space, gives no answer. guard.sh writes such a fault
# to the file $note, and the builder then discards the result. The file has its full size
# already, so that writing to it works on a full disk too.
note=@TROUBLE@
said=/tmp/prebake-compiler.$$

# Kbuild tests a flag by compiling /dev/null into a temporary file. The answer depends
# on the compiler's arguments only. If the same test ran before, guard.sh returns the
# recorded answer.
name= line=
case "$*" in
*/dev/null*.tmp_*/tmp*)
	output= take= does= what=
	for arg; do
		if [ "$take" ]; then
			take= output=$arg
			continue
		fi
		case $arg in
		-o) take=1 && continue ;;
		-c) does=1 ;;
		/dev/null) what=1 ;;
		-include* | -imacros* | -M* | -Wp,*M* | -fplugin* | -fprofile* | -specs* | @* | *'
'*)
			output=
			does=
			break
			;;
		esac
		line="$line@SEPARATOR@$arg"
	done
	case $does$what$output in
	11*.tmp_*/tmp) name=$(printf %s "$line" | cksum) && name=${name% *}-${name#* } ;;
	esac
	if [ "$name" ] && [ -r "@FLAGTESTS@/$name" ]; then
		{
			read -r status
			IFS= read -r was
			if [ "$was" = "$line" ]; then
				while IFS= read -r text; do printf '%s\n' "$text" >&2; done
				exit "$status"
			fi
		} <"@FLAGTESTS@/$name"
	fi
	;;
esac

if ! true >"$said"; then
	echo "No space left on device: /tmp" 1<>"$note"
	exit 1
fi
@COMPILER@ "$@" 2>"$said"
status=$?
[ ! -s "$said" ] || cat "$said" >&2
if [ "$name" ] && [ -d "@NEWFLAGTESTS@" ] && [ "$status" -lt 128 ]; then
	{
		printf '%s\n%s\n' "$status" "$line"
		cat "$said"
	} >"@NEWFLAGTESTS@/$name.new" && mv "@NEWFLAGTESTS@/$name.new" "@NEWFLAGTESTS@/$name"
fi
[ "$status" -eq 0 ] && exit
if [ "$status" -ge 128 ] ||
	grep -q -i -e 'no space left on device' -e 'killed signal terminated' -e 'command: killed' -e 'cannot allocate memory' \
		-e 'memory exhausted' -e 'out of memory' -e 'temporarily unavailable' -e 'quota exceeded' -e 'input/output error' "$said"; then
	{ echo "status $status"; head -c 2000 "$said"; } 1<>"$note"
fi
exit "$status"
