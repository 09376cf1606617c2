package host

import (
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// User is a process that has a device of the driver open.
type User struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
	// Pod is NAMESPACE/NAME of the process's pod, or the pod's uid if the name is unknown. It is "" outside of pods.
	Pod     string   `json:"pod,omitempty"`
	Devices []string `json:"devices"`
}

func (u User) String() string {
	text := fmt.Sprintf("%s (pid %d", u.Command, u.PID)
	if u.Pod != "" {
		text += ", pod " + u.Pod
	}
	return text + ")"
}

// Programs returns the names of the programs of these processes, each with its pod and the number of its processes. The
// result is sorted and has no process ids, so that it stays the same while the same programs run.
func Programs(users []User) []string {
	type program struct{ command, pod string }
	processes := map[program]int{}
	for _, u := range users {
		processes[program{u.Command, u.Pod}]++
	}
	var names []string
	for p, n := range processes {
		var more []string
		if p.pod != "" {
			more = append(more, "pod "+p.pod)
		}
		if n > 1 {
			more = append(more, fmt.Sprintf("%d processes", n))
		}
		name := p.command
		if len(more) > 0 {
			name += " (" + strings.Join(more, ", ") + ")"
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// maxUsers is the maximum number of processes that DeviceUsers returns.
const maxUsers = 256

// podUID matches a pod's uid in the path of a control group. The cgroupfs driver writes dashes, the systemd driver
// underscores.
var podUID = regexp.MustCompile(`pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})`)

// DeviceUsers returns the processes that have a device of the driver open, by the links in /proc/PID/fd (proc(5)). It
// needs root and the node's /proc to find all.
func DeviceUsers(root fs.FS) ([]User, error) {
	entries, err := fs.ReadDir(root, "proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var users []User
	var pods map[string]string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		dir := "proc/" + e.Name()
		fds, err := fs.ReadDir(root, dir+"/fd")
		if err != nil {
			continue // the process ended, or this program may not inspect it
		}
		var devices []string
		for _, fd := range fds {
			to, err := fs.ReadLink(root, dir+"/fd/"+fd.Name())
			if err == nil && strings.HasPrefix(to, "/dev/nvidia") && !slices.Contains(devices, to) {
				devices = append(devices, to)
			}
		}
		if len(devices) == 0 {
			continue
		}
		slices.Sort(devices)
		u := User{PID: pid, Devices: devices}
		if name, err := readOptional(root, dir+"/comm"); err == nil {
			u.Command = name
		}
		if group, err := readBounded(root, dir+"/cgroup"); err == nil {
			if m := podUID.FindStringSubmatch(group); m != nil {
				if pods == nil {
					pods = podNames(root)
				}
				uid := strings.ReplaceAll(m[1], "_", "-")
				if u.Pod = pods[uid]; u.Pod == "" {
					u.Pod = uid
				}
			}
		}
		if users = append(users, u); len(users) == maxUsers {
			break
		}
	}
	// Not slices.SortFunc, which adds 14 KB to the program.
	sort.Slice(users, func(i, j int) bool { return users[i].PID < users[j].PID })
	return users, nil
}

// podNames returns the names of this node's pods by uid. Log folders are named NAMESPACE_NAME_UID
// (BuildPodLogsDirectory in pkg/kubelet/kuberuntime/helpers.go).
func podNames(root fs.FS) map[string]string {
	names := map[string]string{}
	entries, err := fs.ReadDir(root, "var/log/pods")
	if err != nil {
		return names // no pods here
	}
	for _, e := range entries {
		if part := strings.Split(e.Name(), "_"); len(part) == 3 {
			names[part[2]] = part[0] + "/" + part[1]
		}
	}
	return names
}
