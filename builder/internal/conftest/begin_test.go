package conftest_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/conftest"
)

// TestBeginnings checks the headers with which a test's program begins. The rows have the formats of conftest.sh in
// NVIDIA's releases 515 to 595.
func TestBeginnings(t *testing.T) {
	t.Parallel()
	const frame = "#!/bin/sh\ncompile_check_conftest() {\n}\n\ncompile_test() {\n    case \"$1\" in\n@\n        *)\n    " +
		"    ;;\n    esac\n}\n    test_kernel_header)\n    compile_tests)\n        for i in $*; do compile_test $i; done\n"
	type beginnings []conftest.Prefix
	rows := map[string]struct {
		text, headers string
		want          beginnings
	}{
		"one header": {"CODE=\"\n            #include <linux/mm.h>\n            int f(void);\"", "", beginnings{
			{[]string{"#include <linux/mm.h>"}, []string{"<linux/mm.h>"}},
		}},
		"two, by echo": {"echo \"$CONFTEST_PREAMBLE\n    #include <linux/pci.h>\n\n\t#include <linux/vfio.h>\n    void " +
			"f(void) {}\" > conftest$$.c", "", beginnings{
			{[]string{"#include <linux/pci.h>"}, []string{"<linux/pci.h>"}},
			{[]string{"#include <linux/pci.h>", "#include <linux/vfio.h>"}, []string{"<linux/pci.h>", "<linux/vfio.h>"}},
		}},
		"a header that is not there": {"CODE=\"\n #if defined(NV_DRM_DRMP_H_PRESENT)\n #include <drm/drmP.h>\n #endif\n " +
			"#include <drm/drm_drv.h>\n x\"", "#undef NV_DRM_DRMP_H_PRESENT\n", beginnings{
			{[]string{"#if defined(NV_DRM_DRMP_H_PRESENT)", "#include <drm/drmP.h>", "#endif", "#include <drm/drm_drv.h>"},
				[]string{"<drm/drm_drv.h>"}},
		}},
		"a header that is there": {"CODE=\"\n #if defined NV_A_PRESENT\n #include <a.h>\n #elif defined(NV_B_PRESENT)\n " +
			"#include <b.h>\n #else\n #include <c.h>\n #endif\n x\"", "#define NV_A_PRESENT\n", beginnings{
			{[]string{"#if defined NV_A_PRESENT", "#include <a.h>"}, []string{"<a.h>"}},
		}},
		"the second branch": {"CODE=\"\n #if defined NV_A_PRESENT\n #include <a.h>\n #elif defined(NV_B_PRESENT)\n " +
			"#include <b.h>\n #else\n #include <c.h>\n #endif\n x\"", "#define NV_B_PRESENT\n", beginnings{
			{[]string{"#if defined NV_A_PRESENT", "#include <a.h>", "#elif defined(NV_B_PRESENT)", "#include <b.h>"},
				[]string{"<b.h>"}},
		}},
		"the last branch, within another": {"CODE=\"\n #ifndef NV_A_PRESENT\n #ifdef NV_B_PRESENT\n #include <b.h>\n " +
			"#else\n #include <c.h>\n #endif\n #endif\n x\"", "", beginnings{
			{[]string{"#ifndef NV_A_PRESENT", "#ifdef NV_B_PRESENT", "#include <b.h>", "#else", "#include <c.h>"},
				[]string{"<c.h>"}},
		}},
		"nothing within what is not there": {"CODE=\"\n #ifdef NV_A_PRESENT\n #ifndef NV_B_PRESENT\n #include <b.h>\n " +
			"#endif\n #endif\n x\"", "", nil},
		"a definition comes first":    {"CODE=\"\n #define X\n #include <b.h>\n x\"", "", nil},
		"a condition of another kind": {"CODE=\"\n #if !defined(CONFIG_DRM)\n #include <b.h>\n #endif\"", "", nil},
		"no program":                  {"if grep -q x y; then echo yes; fi", "", nil},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, err := conftest.ParseScript([]byte(strings.Replace(frame, "@",
				"        one)\n            "+row.text+"\n        ;;\n", 1)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(row.want, beginnings(s.Prefixes("one", row.headers))); diff != "" {
				t.Errorf("Prefixes differ (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzBeginnings(f *testing.F) {
	f.Add("CODE=\"\n #if defined(NV_A_PRESENT)\n #include <a.h>\n #else\n #endif\n #endif\n", "#define NV_A_PRESENT\n")
	f.Fuzz(func(t *testing.T, text, headers string) {
		s, err := conftest.ParseScript([]byte("#!/bin/sh\ncompile_check_conftest() {\n}\n\ncompile_test() {\n    case " +
			"\"$1\" in\n        one)\n" + text +
			"\n        ;;\n        *)\n        ;;\n    esac\n}\n    test_kernel_header)\n    compile_tests)\n        for i in " +
			"$*; do compile_test $i; done\n"))
		if err != nil {
			return
		}
		for _, b := range s.Prefixes("one", headers) {
			if len(b.Headers) == 0 || len(b.Lines) < len(b.Headers) {
				t.Errorf("a beginning of %q without headers: %+v", text, b)
			}
			if _, _, err := s.OnlyHeaders(b.Headers); err != nil {
				t.Errorf("OnlyHeaders(%q): %v", b.Headers, err)
			}
		}
	})
}
