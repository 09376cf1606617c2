// Command probe stands in for nvmlprobe in tests of the static checks: it says what the
// stand-in for a driver says.
package main

import "fmt"

func main() { fmt.Println(`{"driverVersion":"1.2.3","devices":[]}`) }
