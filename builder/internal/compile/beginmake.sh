#!/bin/sh
# beginmake.sh runs in place of the compiler while conftest compiles a program that
# consists of headers only. It writes four things to @BEGIN@: the compiler's flags, the
# program, the precompiled header, and the file "works" if the program compiles with
# that precompiled header.
src=
for arg; do
	case $arg in conftest*.c) src=$arg ;; esac
done
[ -n "$src" ] || exec @COMPILER@ "$@"
printf '%s\n' "$@" | sed "s/^$src\$/conftest.c/" >@BEGIN@/flags
# Each test has its own conftest/headers.h, so text.h must not include that file: it gets
# the file's content in place of the #include line.
sed -e '/^[[:space:]]*#include "conftest\/headers.h"/{' -e 'r conftest/headers.h' -e 'd' -e '}' "$src" >@BEGIN@/text.h
sed -e 's/^[[:space:]]*//' -e '/^$/d' "$src" >@BEGIN@/program
left=$#
while [ "$left" -gt 0 ]; do
	arg=$1
	shift
	left=$((left - 1))
	case $arg in
	-c | "$src") ;;
	*) set -- "$@" "$arg" ;;
	esac
done
@COMPILER@ "$@" -x c-header -o @BEGIN@/text.h.gch @BEGIN@/text.h &&
	@COMPILER@ @USE@ @STRICT@ "$@" -c -o @BEGIN@/try.o "$src" &&
	: >@BEGIN@/works
