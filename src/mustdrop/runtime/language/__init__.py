"""The stages of the language model: what enters, the filters between its layers, and its cache."""
