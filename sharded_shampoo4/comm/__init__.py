"""Collectives: agreement on the host, and the exchange of gradients and directions."""
