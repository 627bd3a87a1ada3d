"""What runs inside one forward: layer hooks, attention taps, and the mapping between logical and physical rows."""
