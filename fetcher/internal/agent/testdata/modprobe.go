// Command modprobe writes its arguments and the loaded modules to the file /asked.
package main

import (
	"os"
	"strings"
)

func main() {
	loaded, err := os.ReadFile("/proc/modules")
	if err != nil {
		os.Exit(1)
	}
	text := strings.Join(os.Args[1:], " ") + "\n" + string(loaded)
	if err := os.WriteFile("/asked", []byte(text), 0o644); err != nil {
		os.Exit(1)
	}
}
