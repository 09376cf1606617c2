package main

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
)

// Addresses in qemu's user-mode network (slirp): the guest's own, and the gateway to the host's loopback interface.
const (
	guestAddress = "10.0.2.15/24"
	gateway      = "10.0.2.2"
)

// network starts lo and eth0. The driver registers eth0 asynchronously, so network waits for it, for a limited time.
func network(wait time.Duration) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the network interface lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set the network interface lo up: %w", err)
	}
	eth, err := findLink("eth0", wait)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(guestAddress)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(eth, addr); err != nil {
		return fmt.Errorf("add the address %s to eth0: %w", guestAddress, err)
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return fmt.Errorf("set the network interface eth0 up: %w", err)
	}
	route := &netlink.Route{LinkIndex: eth.Attrs().Index, Gw: net.ParseIP(gateway)}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add a route through %s: %w", gateway, err)
	}
	return nil
}

func findLink(name string, wait time.Duration) (netlink.Link, error) {
	deadline := time.Now().Add(wait)
	for {
		l, err := netlink.LinkByName(name)
		if err == nil {
			return l, nil
		}
		var missing netlink.LinkNotFoundError
		if !errors.As(err, &missing) || time.Now().After(deadline) {
			return nil, fmt.Errorf("find the network interface %s: %w", name, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
