"""What is shown of an attached kernel, as plain values that JSON has; faces lay them out."""
