// Command probe replaces nvmlprobe in tests of the static checks. The command prints the answer of a driver's
// replacement.
package main

import "fmt"

func main() { fmt.Println(`{"driverVersion":"1.2.3","devices":[]}`) }
