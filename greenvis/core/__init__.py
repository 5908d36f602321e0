"""How a technique goes on a model and off again: requests, live changes, wrapping, surgery,
processes."""
