"""One engine on several hosts: their launchers find each other, start together and end together."""
