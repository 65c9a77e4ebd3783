"""Softmax attention of a prompt (`attention`) and of a few tokens over a long cache (`attention_decode`)."""
