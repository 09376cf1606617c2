package cli

import (
	"fmt"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"
)

// Env names the environment variable behind a flag: PREBAKE_ and the flag's
// name in upper case.
func Env(flag string) ucli.ValueSourceChain { return variables(flag) }

func envName(flag string) string {
	return "PREBAKE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// String is a flag with its default and its environment variable; the back
// quotes of usage hold the value's name. So are the functions below.
func String(name, value, usage string) *ucli.StringFlag {
	return &ucli.StringFlag{Name: name, Value: value, Usage: usage, Sources: Env(name)}
}

// Strings is a flag that may be repeated.
func Strings(name, usage string) *ucli.StringSliceFlag {
	return &ucli.StringSliceFlag{Name: name, Usage: usage, Sources: Env(name)}
}

// Bool is a flag without a value.
func Bool(name, usage string) *ucli.BoolFlag {
	return &ucli.BoolFlag{Name: name, Usage: usage, Sources: Env(name)}
}

// Int is a flag with a number.
func Int(name string, value int, usage string) *ucli.IntFlag {
	return &ucli.IntFlag{Name: name, Value: value, Usage: usage, Sources: Env(name)}
}

// Duration is a flag with a time, as in 10m.
func Duration(name string, value time.Duration, usage string) *ucli.DurationFlag {
	return &ucli.DurationFlag{Name: name, Value: value, Usage: usage, Sources: Env(name)}
}

// choiceFlag is a flag with few values. They are known to completion and to the schema of
// the configuration file.
type choiceFlag struct {
	*ucli.StringFlag
	choices []string
}

// Choice is a flag whose value is one of few words.
func Choice[T ~string](name string, value T, usage string, choices ...T) ucli.Flag {
	f := &choiceFlag{StringFlag: String(name, string(value), usage)}
	for _, c := range choices {
		f.choices = append(f.choices, string(c))
	}
	f.Validator = func(s string) error {
		if !slices.Contains(f.choices, s) {
			return fmt.Errorf("%s %q: want %s", name, s, either(f.choices))
		}
		return nil
	}
	return f
}

// either lists words of which one is wanted.
func either(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

// rangeFlag is a flag with a number that has bounds.
type rangeFlag struct {
	*ucli.IntFlag
	least, most int
}

// Range is a flag with a number between two bounds, which belong to it.
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

// WasCalled keeps an earlier name of a flag, and of its variable, working. A command with the
// flag ends with an error of kind Usage where both variables are set, and differ.
func WasCalled[T, C any, V ucli.ValueCreator[T, C]](f *ucli.FlagBase[T, C, V], earlier string) *ucli.FlagBase[T, C, V] {
	f.Aliases = append(f.Aliases, earlier)
	f.Sources = variables(f.Name, earlier)
	return f
}

// TrustedRootFlag is --trusted-root, for commands that handle certificates.
func TrustedRootFlag() ucli.Flag {
	return String("trusted-root", "", "Sigstore trusted_root.json `FILE`, for keyless signers")
}

// TrustFlags are --trusted-root and whom its certificates have to name, for
// commands that verify; the words are cosign's.
func TrustFlags() []ucli.Flag {
	return append(IdentityFlags(),
		String("certificate-identity-regexp", "", "trust each signer whose whole name matches `PATTERN`"))
}

// IdentityFlags are [TrustFlags] without patterns.
func IdentityFlags() []ucli.Flag {
	return []ucli.Flag{
		TrustedRootFlag(),
		String("certificate-identity", "", "trust the keyless signer `NAME`: URL or mail address"),
		String("certificate-oidc-issuer", "", "`URL` of the OpenID Connect issuer of that signer"),
	}
}

// LogFlags are --log-level and --log-format, for programs that run long.
func LogFlags() []ucli.Flag {
	return []ucli.Flag{
		Choice("log-level", "info", "lowest `LEVEL`: debug, info, warn or error", "debug", "info", "warn", "error"),
		Choice("log-format", "text", "`FORMAT` of log lines: text or json", "text", "json"),
	}
}
