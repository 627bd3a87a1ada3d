"""Attention statistics without materialised attention maps. `reference` is the specification."""
