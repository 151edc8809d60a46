"""Pure decisions: values in, values out; no clock, socket, logger, Ray or randomness of its own."""
