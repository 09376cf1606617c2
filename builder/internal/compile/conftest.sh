#!/bin/sh
# This script replaces the driver's conftest.sh while make runs. The answers are in
# the folder conftest/ already. The driver's sanity checks passed before the builder
# asked for the answers, so here each sanity check succeeds without a test.
case $5 in
build_cflags)
	cat <<'END'
@CFLAGS@
END
	exit 0
	;;
*_sanity_check | cc_version_check) exit 0 ;;
compile_tests)
	if [ "$7" = uts_release ]; then
		tail -c +20 @RELEASE@ # after "// Kernel version: "
		exit 0
	fi
	;;
esac
echo "prebake: conftest has no answer: $5 $7" >&2
exit 1
