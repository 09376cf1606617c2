package cli

import (
	"fmt"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"
)

// Env returns the source that reads a flag's environment variable: PREBAKE_ and the flag's name in upper case, with _
// for -.
func Env(flag string) ucli.ValueSourceChain { return variables(flag) }

func envName(flag string) string {
	return "PREBAKE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// String returns a flag with a text value, a default, and an environment variable. In every usage text, the name of the
// value is in back quotes, such as `FILE`.
func String(name, value, usage string) *ucli.StringFlag {
	return &ucli.StringFlag{Name: name, Value: value, Usage: usage, Sources: Env(name)}
}

// Strings returns a flag whose value is a list of texts: the flag may be repeated.
func Strings(name, usage string) *ucli.StringSliceFlag {
	return &ucli.StringSliceFlag{Name: name, Usage: usage, Sources: Env(name)}
}

// Bool returns a flag without a value.
func Bool(name, usage string) *ucli.BoolFlag {
	return &ucli.BoolFlag{Name: name, Usage: usage, Sources: Env(name)}
}

// Int returns a flag whose value is a number.
func Int(name string, value int, usage string) *ucli.IntFlag {
	return &ucli.IntFlag{Name: name, Value: value, Usage: usage, Sources: Env(name)}
}

// Duration returns a flag whose value is a duration, such as 10m.
func Duration(name string, value time.Duration, usage string) *ucli.DurationFlag {
	return &ucli.DurationFlag{Name: name, Value: value, Usage: usage, Sources: Env(name)}
}

// choiceFlag is a flag with a fixed list of values. The schema of the configuration file contains the list.
type choiceFlag struct {
	*ucli.StringFlag
	choices []string
}

// Choice returns a flag whose value is one of a few words.
func Choice[T ~string](name string, value T, usage string, choices ...T) ucli.Flag {
	f := &choiceFlag{StringFlag: String(name, string(value), usage)}
	for _, c := range choices {
		f.choices = append(f.choices, string(c))
	}
	f.Validator = func(s string) error {
		if !slices.Contains(f.choices, s) {
			return fmt.Errorf("%s %q: want %s", name, s, joinOr(f.choices))
		}
		return nil
	}
	return f
}

// joinOr returns the possible words as one text for an error, with "or" before the last word.
func joinOr(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

// rangeFlag is a flag with a number between two bounds.
type rangeFlag struct {
	*ucli.IntFlag
	least, most int
}

// Range returns a flag with a number between two bounds, which are both allowed.
func Range(name string, value, least, most int, usage string) ucli.Flag {
	f := &rangeFlag{IntFlag: Int(name, value, usage), least: least, most: most}
	f.Validator = func(n int) error {
		if n < least || n > most {
			return fmt.Errorf("%s %d: want a number from %d to %d", name, n, least, most)
		}
		return nil
	}
	return f
}

// WasCalled lets users still set a flag by its earlier name, and by the environment variable of that name. If the
// variables of both names are set and differ, the command fails with an error of kind Usage.
func WasCalled[T, C any, V ucli.ValueCreator[T, C]](f *ucli.FlagBase[T, C, V], earlier string) *ucli.FlagBase[T, C, V] {
	f.Aliases = append(f.Aliases, earlier)
	f.Sources = variables(f.Name, earlier)
	return f
}

// TrustedRootFlag returns --trusted-root, for commands that use certificates.
func TrustedRootFlag() ucli.Flag {
	return String("trusted-root", "", "Sigstore's `FILE` trusted_root.json (keyless signers)")
}

// TrustFlags returns --trusted-root and the flags for trusted keyless signers, named as in cosign.
func TrustFlags() []ucli.Flag {
	return append(IdentityFlags(),
		String("certificate-identity-regexp", "", "trust each signer whose whole name matches `PATTERN`"))
}

// IdentityFlags returns [TrustFlags] without --certificate-identity-regexp.
func IdentityFlags() []ucli.Flag {
	return []ucli.Flag{
		TrustedRootFlag(),
		String("certificate-identity", "", "trust the keyless signer `NAME`, a URL or mail address"),
		String("certificate-oidc-issuer", "", "`URL` of the keyless signer's OpenID Connect issuer"),
	}
}

// LogFlags returns --log-level and --log-format, for long-running programs.
func LogFlags() []ucli.Flag {
	return []ucli.Flag{
		Choice("log-level", "info", "log `LEVEL`: debug, info, warn or error", "debug", "info", "warn", "error"),
		Choice("log-format", "text", "`FORMAT` of log lines: text or json", "text", "json"),
	}
}
