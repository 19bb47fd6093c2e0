"""Where engines are found: in the settings, by DNS, in Kubernetes; added and drained meanwhile."""
