"""What techniques of several families share."""
