"""Arithmetic of the preconditioner: no rank and no host is known here."""
