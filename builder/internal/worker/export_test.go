package worker

// QueueName is the name under which the queue knows a worker.
func (cfg Config) QueueName() (string, error) { return cfg.queueName() }
