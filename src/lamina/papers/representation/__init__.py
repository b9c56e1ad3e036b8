"""What the stream holds at each depth, and how blocks change it."""
