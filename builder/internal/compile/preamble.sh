#!/bin/sh
# preamble.sh runs in place of clang. If a source file begins with the same includes
# (the preamble) as other files of its module, preamble.sh compiles it with a
# precompiled header. After any error it compiles the file in the normal way.
compiler=@COMPILER@
sources=@SOURCES@
kernel=@KERNEL@
preambles=@PREAMBLES@

src= dep= own= does=
for arg; do
	case $arg in
	"$sources"/*.c) src=${arg#"$sources"/} ;;
	-Wp,-MMD,*) dep=${arg#-Wp,-MMD,} ;;
	-DKBUILD_BASENAME=*) own=$arg ;;
	-c) does=compile ;;
	esac
done
if [ -z "$src" ] || [ -z "$dep" ] || [ -z "$own" ] || [ -z "$does" ] || ! [ -f "$preambles/of/$src" ]; then
	exec "$compiler" "$@"
fi
{ read -r name; read -r first; read -r through; } <"$preambles/of/$src"

# prepare sets $compiled to the name of the precompiled header for these flags. The
# first call for these flags makes the precompiled header.
prepare() {
	left=$#
	while [ "$left" -gt 0 ]; do
		arg=$1
		shift
		left=$((left - 1))
		case $arg in
		-c | "$own" | "$sources/$src" | -Wp,-MMD,*) ;;
		-o)
			shift
			left=$((left - 1))
			;;
		*) set -- "$@" "$arg" ;;
		esac
	done
	sum=$(printf '%s\n' "$@" | cksum)
	compiled=$preambles/$name-${sum%% *}
	[ -e "$compiled.pch" ] || [ -e "$compiled.failed" ] || (
		flock 9
		[ -e "$compiled.pch" ] || [ -e "$compiled.failed" ] ||
			{ "$compiler" "$@" -x c-header -o "$compiled.$$" "$preambles/$name.h" >"$compiled.said" 2>&1 && mv "$compiled.$$" "$compiled.pch"; } ||
			: >"$compiled.failed"
	) 9>"$compiled.lock"
	[ -e "$compiled.pch" ]
}

# relist rewrites the dependency list in the order of a compilation without a
# precompiled header, because modpost computes checksums in that order.
relist() {
	awk -v source="$sources/$src" -v first="$first" -v through="$through" -v kernel="$kernel/" -v made="$preambles/" '
		{ for (i = 1; i <= NF; i++) if ($i != "\\") word[++n] = $i }
		END {
			on_the_way = split(through, way, " ")
			for (i = 1; i <= on_the_way; i++) listed[way[i]] = 1
			listed[source] = 1
			printf "%s %s", word[1], source
			for (i = 2; i <= n; i++) {
				if (word[i] == first) for (k = 1; k <= on_the_way; k++) printf " \\\n %s", way[k]
				if (listed[word[i]]++ || index(word[i], made) == 1) continue
				sub("^" kernel, "", word[i])
				printf " \\\n %s", word[i]
			}
			print ""
		}' "$dep" >"$dep.new" && mv "$dep.new" "$dep"
}

prepare "$@" || exec "$compiler" "$@"
said=$preambles/said.$$
if "$compiler" -include-pch "$compiled.pch" "$@" 2>"$said" && relist; then
	cat "$said" >&2
	rm -f "$said"
	exit
fi
rm -f "$said"
exec "$compiler" "$@"
