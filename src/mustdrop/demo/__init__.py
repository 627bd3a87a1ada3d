"""A tiny trained vision-language model and the scenes it answers questions about."""
