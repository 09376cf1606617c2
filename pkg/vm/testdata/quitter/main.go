// Command quitter ends at once. As process 1 it makes the kernel panic.
package main

func main() {}
