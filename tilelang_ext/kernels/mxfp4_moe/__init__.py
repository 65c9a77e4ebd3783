"""A two-stage mixture of experts with MXFP4 weights."""
