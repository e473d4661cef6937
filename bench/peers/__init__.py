"""What is measured: the implementations of the loss, each called as its own users call it."""
