"""Stored responses: conversations that are kept, and those answered in the background."""
