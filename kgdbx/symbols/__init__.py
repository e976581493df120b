"""The one place where names become addresses and types, and addresses names."""
