package cli

import (
	"context"
	"fmt"
	"os"
	"slices"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/fault"
)

// variable is an environment variable of a flag. The library reads it only if the flag is not on the command line.
type variable struct {
	key   string
	asked bool
}

// variables returns the variables of these flag names, in the order in which the library reads them.
func variables(flags ...string) (all ucli.ValueSourceChain) {
	for _, flag := range flags {
		all.Chain = append(all.Chain, &variable{key: envName(flag)})
	}
	return all
}

// Lookup implements [ucli.ValueSource].
func (v *variable) Lookup() (string, bool) {
	v.asked = true
	return os.LookupEnv(v.key)
}

// String describes the variable for an error.
func (v *variable) String() string { return fmt.Sprintf("environment variable %q", v.key) }

// GoString implements [ucli.ValueSource].
func (v *variable) GoString() string { return v.String() }

// IsFromEnv implements [ucli.EnvValueSource].
func (v *variable) IsFromEnv() bool { return true }

// Key implements [ucli.EnvValueSource].
func (v *variable) Key() string { return v.key }

// setVariables returns those environment variables of a flag that are set and could decide the flag's value: the first
// variable that the library has read, and all after it. If the flag is on the command line, the result is empty.
func setVariables(flag ucli.Flag) (set []string) {
	asked := false
	for _, source := range sources(flag).Chain {
		v, ok := source.(*variable)
		if !ok {
			continue
		}
		asked = asked || v.asked
		if _, found := os.LookupEnv(v.key); found && asked {
			set = append(set, v.key)
		}
	}
	return set
}

// sources returns the sources of a flag's value.
func sources(flag ucli.Flag) ucli.ValueSourceChain {
	switch f := flag.(type) {
	case *choiceFlag:
		return f.Sources
	case *rangeFlag:
		return f.Sources
	case *ucli.StringFlag:
		return f.Sources
	case *ucli.StringSliceFlag:
		return f.Sources
	case *ucli.BoolFlag:
		return f.Sources
	case *ucli.IntFlag:
		return f.Sources
	case *ucli.DurationFlag:
		return f.Sources
	}
	return ucli.ValueSourceChain{}
}

// fromEmptyVariable reports whether the value of a flag comes from an empty variable.
func fromEmptyVariable(flag ucli.Flag) bool {
	set := setVariables(flag)
	return len(set) > 0 && os.Getenv(set[0]) == ""
}

// oneVariable returns a callback that checks the environment variables of a command's flags, and then calls before. It
// returns an error if the variables of a flag's present name and of its earlier name are both set and differ.
func oneVariable(before ucli.BeforeFunc) ucli.BeforeFunc {
	return func(ctx context.Context, cmd *ucli.Command) (context.Context, error) {
		for _, flag := range cmd.Flags {
			set := setVariables(flag)
			if !slices.ContainsFunc(set, func(key string) bool { return os.Getenv(key) != os.Getenv(set[0]) }) {
				continue
			}
			return ctx, fault.New(fault.Usage,
				fmt.Sprintf("set --%s: %s and its earlier name %s are both set, and differ", flag.Names()[0], set[0], set[1]),
				"unset "+set[1])
		}
		if before == nil {
			return ctx, nil
		}
		return before(ctx, cmd)
	}
}
