package cossrc_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/cossrc"
)

func FuzzParseEnv(f *testing.F) {
	f.Add([]byte("CC=x86_64-cros-linux-gnu-clang\nCXX=x86_64-cros-linux-gnu-clang++\n"))
	f.Add([]byte("CC=\"a b\"\n\nLD='ld.lld'"))
	f.Add([]byte("CC=$(rm -rf /)"))
	f.Fuzz(func(t *testing.T, text []byte) {
		env, err := cossrc.ParseEnv(text)
		if err != nil {
			return
		}
		var again strings.Builder
		for name, value := range env {
			if strings.ContainsAny(name+value, "$`;&|<>\\\n\x00") {
				t.Errorf("ParseEnv(%q) let %s=%q through", text, name, value)
			}
			fmt.Fprintf(&again, "%s=%q\n", name, value)
		}
		if again.Len() > 16<<10 {
			return
		}
		if env2, err := cossrc.ParseEnv([]byte(again.String())); err != nil || !maps.Equal(env, env2) {
			t.Errorf("ParseEnv(%q) = %v, printed and parsed again %v, %v", text, env, env2, err)
		}
	})
}
