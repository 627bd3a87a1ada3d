"""Triton kernels and what launches them. Imported when a kernel first runs: `import mustdrop` needs no triton."""
