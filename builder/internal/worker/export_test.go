package worker

// These constants limit the logs that a worker keeps for later: their number, and their total size in bytes.
const (
	MaxKept      = maxKept
	MaxKeptBytes = maxKeptBytes
)

// QueueName returns the name under which a worker takes builds from the queue.
func (cfg Config) QueueName() (string, error) { return cfg.queueName() }
