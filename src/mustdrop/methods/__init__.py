"""One file per method; the file name is the method's name. See docs/add-a-method.md."""
