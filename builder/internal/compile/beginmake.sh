#!/bin/sh
# Stands in front of the compiler while conftest compiles headers and nothing else:
# keeps the flags, the program's text, and the headers as the compiler has read
# them, if the program compiles from there.
src=
for arg; do
	case $arg in conftest*.c) src=$arg ;; esac
done
[ -n "$src" ] || exec @COMPILER@ "$@"
printf '%s\n' "$@" | sed "s/^$src\$/conftest.c/" >@BEGIN@/flags
# The file of answers is another one for each test.
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
