"""Files and batches over durable storage."""
