package mirror

import (
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
)

func TestDeriveSources(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		files map[string]string
		want  string // "" means an error
	}{
		{
			name: "deb822 with comments, two stanzas, a third-party archive",
			files: map[string]string{
				"sources.list.d/debian.sources": "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\nSuites: " +
					"bookworm bookworm-updates bookworm-backports\n" +
					"Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n\n\nTypes: deb\nURIs: " +
					"http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n",
				"sources.list.d/node.sources": "Types: deb\nURIs: http://other.example\nSuites: nodistro\nComponents: main\n",
			},
			want: "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: " +
				components + "\nSigned-By: /usr/share/keyrings/k.gpg\n\n" +
				"Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: " + components + "\n\n",
		},
		{
			name: "one line with options",
			files: map[string]string{
				"sources.list": "# deb http://no.example bookworm main\ndeb [arch=amd64,arm64 signed-by=/k.gpg] " +
					"http://mirror.example/debian bookworm main contrib # all\n" +
					"deb-src http://mirror.example/debian bookworm main\ndeb http://mirror.example/debian bookworm main\ndeb " +
					"http://mirror.example/debian trixie main\n",
			},
			want: "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: " + components +
				"\nSigned-By: /k.gpg\nArchitectures: amd64 arm64\n\n" +
				"Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: " + components + "\n\n",
		},
		{
			name: "a key in the stanza",
			files: map[string]string{
				"sources.list.d/x.sources": "Types: deb\nURIs: http://mirror.example\nSuites: bookworm\nComponents: " +
					"main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n AAAA\n",
			},
			want: "Types: deb\nURIs: http://mirror.example\nSuites: bookworm\nComponents: " + components +
				"\nSigned-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n AAAA\n\n",
		},
		{
			name: "the same twice",
			files: map[string]string{"sources.list": "deb http://m.example bookworm main\n",
				"sources.list.d/a.list": "deb http://m.example bookworm main non-free\n"},
			want: "Types: deb\nURIs: http://m.example\nSuites: bookworm\nComponents: " + components + "\n\n",
		},
		{name: "switched off", files: map[string]string{"sources.list.d/a.sources": "Enabled: no\nTypes: deb\nURIs: " +
			"http://m.example\nSuites: bookworm\nComponents: main\n"}},
		{name: "broken options", files: map[string]string{"sources.list": "deb [arch=amd64 http://m.example " +
			"bookworm main\n"}},
		{name: "nothing"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			etc := fstest.MapFS{}
			for name, text := range test.files {
				etc[name] = &fstest.MapFile{Data: []byte(text)}
			}
			got, err := DeriveSources(etc, "bookworm")
			if test.want == "" {
				if !fault.Is(err, fault.Unsupported) {
					t.Errorf("DeriveSources = %q, %v; want unsupported", got, err)
				}
				return
			}
			if diff := cmp.Diff(test.want, string(got)); err != nil || diff != "" {
				t.Errorf("DeriveSources: %v (-want +got)\n%s", err, diff)
			}
		})
	}
}

func TestOfNext(t *testing.T) {
	t.Parallel()
	const in = "Types: deb\nURIs: http://m.example/bookworm\nSuites: bookworm bookworm-updates\nComponents: " +
		"main\nSigned-By: /usr/share/keyrings/bookworm.gpg\n\n" +
		"Types: deb\nURIs: http://m.example/security\nSuites: bookworm-security bookworm/updates\nComponents: main\n\n"
	const want = "Types: deb\nURIs: http://m.example/bookworm\nSuites: trixie trixie-updates\nComponents: " +
		"main\nSigned-By: /usr/share/keyrings/bookworm.gpg\n\n" +
		"Types: deb\nURIs: http://m.example/security\nSuites: trixie-security trixie-security\nComponents: main\n\n"
	if diff := cmp.Diff(want, string(nextSources([]byte(in), "bookworm"))); diff != "" {
		t.Errorf("nextSources (-want +got)\n%s", diff)
	}
}

func FuzzDeriveSources(f *testing.F) {
	f.Add("Types: deb\nURIs: http://m.example\nSuites: bookworm\nComponents: main\nSigned-By:\n k\n",
		"deb [a=b] http://m.example bookworm main\n")
	f.Add(" x\n:\n#\n\nTypes:", "deb\ndeb []\ndeb [")
	f.Fuzz(func(t *testing.T, sources, list string) {
		etc := fstest.MapFS{"sources.list": {Data: []byte(list)}, "sources.list.d/a.sources": {Data: []byte(sources)}}
		got, err := DeriveSources(etc, "bookworm")
		if err != nil {
			return
		}
		// DeriveSources must return its own output unchanged.
		again, err := DeriveSources(fstest.MapFS{"sources.list.d/b.sources": {Data: got}}, "bookworm")
		if err != nil || string(again) != string(got) {
			t.Errorf("DeriveSources(its own output) = %q, %v; want %q", again, err, got)
		}
	})
}

func TestParseMadison(t *testing.T) {
	t.Parallel()
	out := strings.Join([]string{
		" nvidia-smi | 535.309.01-0+deb12u1 | http://m.example/security bookworm-security/non-free amd64 Packages",
		" nvidia-smi | 535.261.03-1 | http://m.example/debian bookworm/non-free amd64 Packages",
		" nvidia-smi | 535.261.03-1 | http://m.example/debian bookworm-updates/non-free amd64 Packages",
		"      linux | 6.1.192-2 | http://m.example/debian bookworm/main Sources",
		"zlib1g |  1:1.2.13.dfsg-1 | http://m.example/debian bookworm/main amd64 Packages",
		"N: nonsense", "", "a | b",
	}, "\n")
	want := map[string][]string{"nvidia-smi": {"535.309.01-0+deb12u1", "535.261.03-1"}, "zlib1g": {"1:1.2.13.dfsg-1"}}
	if diff := cmp.Diff(want, parseMadison([]byte(out))); diff != "" {
		t.Errorf("parseMadison (-want +got)\n%s", diff)
	}
	if got, want := (pkg{Version: "1:1.2.13.dfsg-1"}).upstream(), "1.2.13.dfsg"; got != want {
		t.Errorf("upstream = %s; want %s", got, want)
	}
}
