// Package testdriver is a very small driver for tests, which compiles in a moment. Its makefiles and its conftest.sh
// resemble those of NVIDIA's drivers and of kbuild. They have the same kinds of conftest tests, make rules, time stamps
// and .cmd files. The package does not prove that Prebake compiles NVIDIA's drivers; deploy/e2e compiles real drivers.
package testdriver

// Kbuild and Script are the driver's makefile and its conftest.sh. The makefile runs conftest.sh to find out whether
// two headers exist, and for three compile tests: has_size, has_old and symbol_a.
const (
	Kbuild = `obj := .
NV_KERNEL_SOURCES := $(SYSSRC)
NV_KERNEL_OUTPUT := $(SYSOUT)
NV_CFLAGS_FROM_CONFTEST := $(shell /bin/sh /prebake/src/conftest.sh "$(CC)" $(ARCH) $(SYSSRC) $(SYSOUT) build_cflags)
NV_CONFTEST_CFLAGS = $(NV_CFLAGS_FROM_CONFTEST) -I$(SYSSRC)/include -I/prebake/src -include $(SYSSRC)/include/generated/autoconf.h -DNV_VERSION_STRING=\"535.1\" $(KCFLAGS)
NV_CONFTEST_CMD := /bin/sh /prebake/src/conftest.sh "$(CC)" $(ARCH) $(SYSSRC) $(SYSOUT)
NV_HEADER_PRESENCE_TESTS = \
 linux/here.h \
 linux/gone.h

NV_CONFTEST_FUNCTION_COMPILE_TESTS += has_size
NV_CONFTEST_TYPE_COMPILE_TESTS += has_old symbol_a
PARTS := $(NV_HEADER_PRESENCE_TESTS:%=conftest/header_presence/%.part)
HEADERS := conftest/headers.h conftest/functions.h conftest/types.h conftest/patches.h
SOURCES := $(sort $(wildcard nvidia/*.c))
OBJECTS := $(SOURCES:.c=.o)

modules: nvidia.ko

BUILD_SANITY_CHECKS = cc_sanity_check
.PHONY: $(BUILD_SANITY_CHECKS) NV_GENERATE_UTS_RELEASE
$(BUILD_SANITY_CHECKS):
	@$(NV_CONFTEST_CMD) $@ full_output
NV_GENERATE_UTS_RELEASE:

$(HEADERS): | $(BUILD_SANITY_CHECKS)
conftest/uts_release: NV_GENERATE_UTS_RELEASE
	@mkdir -p conftest; new="// Kernel version: ` + "`$(NV_CONFTEST_CMD) compile_tests '$(NV_CONFTEST_CFLAGS)' uts_release`" + `"; \
	[ "$$new" = "` + "`cat $@ 2>/dev/null`" + `" ] || echo "$$new" > $@
conftest/patches.h: conftest.sh conftest/uts_release
	@mkdir -p conftest; $(NV_CONFTEST_CMD) patch_check > $@
$(PARTS): conftest/header_presence/%.part: conftest.sh conftest/uts_release
	@mkdir -p $(dir $@); echo " CONFTEST: $*"; $(NV_CONFTEST_CMD) test_kernel_header '$(NV_CONFTEST_CFLAGS)' '$*' > $@
conftest/headers.h: $(PARTS) conftest/uts_release
	@cat $^ > $@
conftest/compile-tests/%.h: conftest.sh conftest/headers.h
	@mkdir -p $(dir $@); echo " CONFTEST: $*"; $(NV_CONFTEST_CMD) compile_tests '$(NV_CONFTEST_CFLAGS)' $* > $@
conftest/functions.h: $(NV_CONFTEST_FUNCTION_COMPILE_TESTS:%=conftest/compile-tests/%.h) conftest/uts_release
	@cat $^ > $@
conftest/types.h: $(NV_CONFTEST_TYPE_COMPILE_TESTS:%=conftest/compile-tests/%.h) conftest/uts_release
	@cat $^ > $@

cmd = $(CC) -Wp,-MMD,nvidia/.$(*F).o.d $(NV_CONFTEST_CFLAGS) -c -o $@ $<
nvidia/%.o: nvidia/%.c $(HEADERS)
	@echo "  CC [M]  /prebake/src/$@"; $(cmd)
	@{ echo 'cmd_$@ := $(subst \",\\",$(cmd))'; echo; echo 'source_$@ := /prebake/src/$<'; echo; echo 'deps_$@ := \'; \
	  sed -e 's/^[^ ]*://' -e 's/\\$$//' nvidia/.$(*F).o.d | tr ' ' '\n' | grep -v -e '^$$' -e autoconf.h -e '^nvidia/.*\.c$$' | sed 's,^\([^/]\),/prebake/src/\1,; s/$$/ \\/'; echo; } > nvidia/.$(*F).o.cmd
nvidia.ko: $(OBJECTS)
	@echo "  MODPOST $@"
	@echo 'const char salt[] = CONFIG_BUILD_SALT;' > nvidia.mod.c
	@$(CC) $(NV_CONFTEST_CFLAGS) -c -o nvidia.mod.o nvidia.mod.c
	@echo "  LD [M]  $@"; $(LD) -r --build-id=sha1 -o $@ $^ nvidia.mod.o
`
	Script = `#!/bin/sh
CC="$1"
OUTPUT=$4
cd ${0%/*}
check() {
    echo "$1" > conftest$$.c
    if $CC $CFLAGS -c conftest$$.c > /dev/null 2>&1; then echo "#define $2"; else echo "#undef $2"; fi
    rm -f conftest$$.c conftest$$.o
}
test_header_presence() {
    def=NV_` + "`echo $1 | tr '/.a-z' '__A-Z'`" + `_PRESENT
    if echo "#include <$1>" | $CC $CFLAGS -E - > /dev/null 2>&1; then echo "#define $def"; else echo "#undef $def"; fi
}
compile_test() {
    case "$1" in
        has_size)
            check "#include <linux/here.h>
            int f(struct here *h) { return h->size; }" NV_HAS_SIZE
        ;;

        has_old)
            check "#include \"conftest/headers.h\"
            #ifndef NV_LINUX_GONE_H_PRESENT
            #error gone
            #endif" NV_HAS_OLD
        ;;

        symbol_*)
            if grep -q "	${1#symbol_}	" $OUTPUT/Module.symvers; then echo "#define NV_$1 1"; else echo "#define NV_$1 0"; fi
        ;;

        uts_release)
            echo "#include <generated/utsrelease.h>
            UTS_RELEASE" > conftest$$.c
            $CC $CFLAGS -E -P conftest$$.c | sed '/^$/d'
            rm -f conftest$$.c
        ;;

        *)
            exit 1
        ;;
    esac
}

case "$5" in
    build_cflags)
        echo -O2 -DKBUILD_BASENAME=\"#conftest$$\"
        exit 0
    ;;
    cc_sanity_check)
        exit 0
    ;;
    test_kernel_header)
        CFLAGS=$6
        test_header_presence "${7}"
        exit $?
    ;;
    patch_check)
        echo "no patches"
        exit 0
    ;;

    compile_tests)
        shift 5

        CFLAGS=$1
        shift

        for i in $*; do compile_test $i; done

        exit 0
    ;;
esac
`
)

// Sources returns the driver's files by their path below kernel/ or kernel-open/.
func Sources() map[string]string {
	return map[string]string{
		"Makefile": "include Kbuild\n", "Kbuild": Kbuild, "conftest.sh": Script,
		"nvidia/nv.c": `#include <linux/here.h>
#include <generated/utsrelease.h>
#include "conftest/functions.h"
#include "conftest/types.h"
#ifdef NV_HAS_SIZE
int nv(struct here *h) { return h->size + NV_symbol_a; }
#endif
`,
		"nvidia/version.c": "#include <generated/utsrelease.h>\n#include \"conftest/headers.h\"\nconst char release[] = " +
			"UTS_RELEASE;\n",
	}
}

// Headers returns the files of a kernel's header tree by path, with the given UTS_RELEASE. The kernel exports one
// symbol, named "a", with the given checksum.
func Headers(release, crc string) map[string]string {
	return map[string]string{
		".config":                        "CONFIG_MODVERSIONS=y\nCONFIG_BUILD_SALT=\"" + release + "\"\n",
		"Makefile":                       "all:\n",
		"Module.symvers":                 crc + "\ta\tvmlinux\tEXPORT_SYMBOL\t\n",
		"include/linux/here.h":           "#ifndef _UTS_RELEASE_H\nstruct here { int size; };\n#endif\n",
		"include/generated/autoconf.h":   "#define CONFIG_X 1\n#define CONFIG_BUILD_SALT \"" + release + "\"\n",
		"include/generated/utsrelease.h": "#define UTS_RELEASE \"" + release + "\"\n",
	}
}
