// Command quitter ends at once, which process 1 must not.
package main

func main() {}
