"""Where code of ours may go: what gives way to a jump, and who is inside of it."""
