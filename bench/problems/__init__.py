"""What is measured on: shapes, and the inputs of the loss."""
