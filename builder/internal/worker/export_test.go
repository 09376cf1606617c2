package worker

// QueueName returns the name of a worker in the queue.
func (cfg Config) QueueName() (string, error) { return cfg.queueName() }
