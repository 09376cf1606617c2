#!/bin/sh
# Stands in front of the compiler, whoever calls it. Tests of the kernel, the
# driver's and Kbuild's own, take any failure for a "no". A compiler that was
# killed or found no room says nothing of the kind: that is noted, and whoever
# started the build throws it away. The note's room was taken beforehand, so that
# it is written on a full disk too.
note=@TROUBLE@
said=/tmp/prebake-compiler.$$

# Kbuild's test of a flag compiles nothing into a file that nobody reads. What the
# compiler answers hangs on its arguments alone: where an equal test was made before,
# the answer is that one.
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
