"""What must hold of lowered TIR on every target, whatever upstream's passes left: one pass a file, named by what it does."""
