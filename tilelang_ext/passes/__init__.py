"""What must hold of lowered TIR on every target, whatever upstream's passes left: one pass per file, named by what it does."""
