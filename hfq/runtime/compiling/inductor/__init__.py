"""What speaks to torch's inductor: how graphs are rewritten, and the code that they become."""
