"""The engines behind the gateway: which there are, how they are, and each call of one."""
