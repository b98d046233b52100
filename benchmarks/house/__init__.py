"""How large the house is, how far its trips go, and whether its results stay: counts, trips, unchanged."""
