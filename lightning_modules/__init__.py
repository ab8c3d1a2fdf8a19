"""Everything that learns or judges: decoders, reward models, GenEval, decoding strategies."""
