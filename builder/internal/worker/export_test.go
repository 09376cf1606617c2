package worker

// These constants are the bounds of the logs that a worker keeps.
const (
	MaxKept      = maxKept
	MaxKeptBytes = maxKeptBytes
)

// QueueName returns the name of a worker in the queue.
func (cfg Config) QueueName() (string, error) { return cfg.queueName() }
