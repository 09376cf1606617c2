package cli

import (
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"
)

// Env names the environment variable behind a flag: PREBAKE_ and the flag's
// name in upper case.
func Env(flag string) ucli.ValueSourceChain { return ucli.EnvVars(envName(flag)) }

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

// TrustedRootFlag is --trusted-root, for whoever deals with certificates.
func TrustedRootFlag() ucli.Flag {
	return String("trusted-root", "", "`FILE` with Sigstore's root, which judges certificates")
}

// TrustFlags are --trusted-root and whom its certificates have to name, for
// commands that verify; the words are cosign's.
func TrustFlags() []ucli.Flag {
	return []ucli.Flag{
		TrustedRootFlag(),
		String("certificate-identity", "", "trust what `NAME` signed: the URL or mail address in a certificate"),
		String("certificate-identity-regexp", "", "in place of the name, a `PATTERN` for the whole of it"),
		String("certificate-oidc-issuer", "", "`URL` of the OpenID Connect issuer that vouches for it"),
	}
}

// LogFlags are --log-level and --log-format, for programs that run long.
func LogFlags() []ucli.Flag {
	return []ucli.Flag{
		String("log-level", "info", "least `LEVEL`: debug, info, warn or error"),
		String("log-format", "text", "`FORMAT` of log lines: text or json"),
	}
}
