package cli_test

import (
	"context"
	"strings"
	"testing"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
)

// TestLoggedDurations checks that a log shows a duration as text such as 1m30s, also in the format JSON.
func TestLoggedDurations(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{"json": `"grace":"1m30s"`, "text": "grace=1m30s"} {
		tool := &ucli.Command{Name: "tool", Flags: cli.LogFlags(), Action: func(_ context.Context, cmd *ucli.Command) error {
			log, err := cli.Logger(cmd)
			if err == nil {
				log.Info("stopping", "grace", 90*time.Second)
			}
			return err
		}}
		var out, errs strings.Builder
		code := cli.Run(t.Context(), tool, []string{"tool", "--log-format", format}, &out, &errs)
		if code != 0 || !strings.Contains(errs.String(), want) {
			t.Errorf("a log as %s = %d, %q; want %q in it", format, code, errs.String(), want)
		}
	}
}
